"""Divides a model's parameters, gradients and optimizer state among the ranks, by torch's FSDP2.

The parameters of a layer, and those outside of the layers, are gathered when a forward or backward
needs them. Layers above that of an internal policy are not called, so they are never gathered.

With model.shard_ranks, that many ranks divide the model, and each such group has a copy of it. With
model.shard_ranks=1, each rank has the whole model, and only gradients are exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from bupo import adapters, ranks
from bupo.config import ModelConfig
from bupo.policy import decoder_stack, unembedding


def shard(model: nn.Module, settings: ModelConfig) -> None:
    """Divides a model among the ranks; all of them call this with equal models."""
    # FSDP moves a layer to the GPU before it divides it.
    mesh = _mesh("cuda" if torch.cuda.is_available() else "cpu", settings)
    if mesh is None:
        return
    for layer in decoder_stack(model).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    unembedding(model)  # measures the head, for which all ranks are needed


def shard_head(head: nn.Linear, settings: ModelConfig) -> None:
    """Divides a small layer that is called apart from its model."""
    if mesh := _mesh(head.weight.device.type, settings):
        fully_shard(head, mesh=mesh)


def _mesh(device: str, settings: ModelConfig) -> DeviceMesh | None:
    """Returns the arrangement of the ranks: all that divide a model in its last dimension, and its
    copies in one before that, if there are any. None: the model stays whole."""
    world = ranks.world()
    size = settings.parts(world)
    if size == 1:
        return None
    if size == world:
        return ranks.mesh_of(device, (world,))
    return ranks.mesh_of(device, (world // size, size), ("copies", "rows"))


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "reshard")


def prepare_backward(model: Any, is_last: bool) -> None:
    """Says whether the next backward of an update is its last one. Until then, what is outside of
    the layers, such as the head, stays gathered and its gradients stay where they are, and no
    gradients are added up over the copies of the model."""
    if is_sharded(model):
        model.set_requires_all_reduce(is_last)
        model.set_requires_gradient_sync(is_last, recurse=False)
        model.set_reshard_after_backward(is_last, recurse=False)


def add_gradients(model: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the gradients of all ranks, unless FSDP has done it."""
    if ranks.world() > 1 and not is_sharded(model):
        ranks.add_up(p.grad for p in parameters if p.grad is not None)


def reshard(model: Any) -> None:
    """Frees what a forward without gradient has gathered; until then, the parameters outside of the
    layers are others than those that the optimizer knows."""
    if is_sharded(model):
        model.reshard()


@contextmanager
def gathered(model: Any, with_layers: bool = True) -> Iterator[None]:
    """Inside, every rank holds the whole model, so that each may call it as often as it likes.
    with_layers=False: it holds only what is outside of the layers, such as the head."""
    if not is_sharded(model):
        yield
        return
    layers: list[Any] = list(decoder_stack(model).layers) if with_layers else []
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


def whole_state(model: nn.Module, copy: bool) -> dict[str, Tensor]:
    """Returns what a checkpoint of a model holds, its state_dict() or that of its adapters, on the
    host of rank 0; nothing on the others. copy: tensors of a model that is whole are copied; else
    they are as they are, on their device."""
    adapted = bool(adapters.parameters(model))
    named = [(n, x) for n, x in model.state_dict().items() if not adapted or ".lora_" in n]
    if is_sharded(model):
        first: dict[int, str] = {}
        same = {
            name: first.setdefault(id(p), name)
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        found = ranks.all_on_first((n, x) for n, x in named if same.get(n, n) == n)
        return {n: found[same.get(n, n)] for n, _ in named} if found else {}
    if not ranks.is_first():
        return {}
    if not copy:
        return dict(named)
    # Tied parameters stay one tensor.
    copies = {(x.data_ptr(), x.shape): x.detach().to("cpu", copy=True) for _, x in named}
    return {name: copies[x.data_ptr(), x.shape] for name, x in named}
