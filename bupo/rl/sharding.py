"""Divides a model's parameters, gradients and optimizer state among the ranks, by torch's FSDP2.

The parameters of a layer, and those outside of the layers, are gathered when a forward or backward
needs them. Layers above that of an internal policy are not called, so they are never gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bupo import adapters, ranks
from bupo.policy import decoder_stack, unembedding


def shard(model: nn.Module) -> None:
    """Divides a model among the ranks; all of them call this with equal models."""
    if ranks.world() == 1:
        return
    unembedding(model)  # measures the head while it is whole
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (ranks.world(),))
    for layer in decoder_stack(model).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_head(head: nn.Linear) -> None:
    """Divides a small layer that is called apart from its model."""
    if ranks.world() > 1:
        mesh = init_device_mesh(head.weight.device.type, (ranks.world(),))
        fully_shard(head, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "reshard")


def reshard(model: Any) -> None:
    """Frees what a forward without gradient has gathered; until then, the parameters outside of the
    layers are others than those that the optimizer knows."""
    if is_sharded(model):
        model.reshard()


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Inside, every rank holds the whole model, so that each may call it as often as it likes."""
    if not is_sharded(model):
        yield
        return
    layers: list[Any] = list(decoder_stack(model).layers)
    for layer in layers:
        layer.set_reshard_after_forward(False)
    for part in (model, *layers):
        part.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
        for part in (model, *layers):
            part.reshard()


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Returns what a checkpoint of a divided model holds, its state_dict() or that of its adapters,
    on the host of rank 0; nothing on the others; None for a model that is whole."""
    if not is_sharded(model):
        return None
    adapted = bool(adapters.parameters(model))
    state = model.state_dict().items()
    return ranks.all_on_first((n, x) for n, x in state if not adapted or ".lora_" in n)
