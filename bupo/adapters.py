"""LoRA adapters (arXiv 2106.09685) on a model, by the library peft: W + (alpha / rank) B A.

The adapters are put into the model itself, so a layer's internal policy reads them as it reads the
layer. Everything else of the model is frozen and has neither gradients nor optimizer state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bupo.config import ConfigError, LoraConfig, first_line

WEIGHTS = "adapter_model.safetensors"


def add(model: Any, config: LoraConfig, source: str, seed: int, saved: Path | None = None) -> None:
    """Adds adapters that change nothing yet or, if a checkpoint `saved` is given, its adapters.
    source: where the model is from, for the checkpoints. Raises ConfigError."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"lora.rank needs the package peft (bupo[lora]): {error}") from None
    if Path(source).is_dir():
        source = str(Path(source).resolve())
    assert config.rank is not None
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=config.targets or "all-linear",
        base_model_name_or_path=source,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.add_adapter(settings)
        except ValueError as error:
            raise ConfigError(f"lora.targets: {first_line(error)}") from None
    for parameter in model.parameters():
        if parameter.requires_grad:  # not rounded as the model may be
            parameter.data = parameter.data.float()
    if saved is not None:
        from safetensors.torch import load_file

        found: Any = peft.set_peft_model_state_dict(model, load_file(saved / WEIGHTS))
        if found.unexpected_keys:
            raise ValueError(f"{WEIGHTS} has {found.unexpected_keys[0]}, which the model lacks")


def merged(model: nn.Module, changed: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of the weights that have an adapter among the parameters `changed`, as
    in a model without adapters."""
    modules = {name.partition(".lora_")[0] for name in changed}
    for name, module in model.named_modules():
        if name in modules:
            layer: Any = module
            weight = layer.get_base_layer().weight.detach()
            with torch.no_grad():
                delta = layer.get_delta_weight(layer.active_adapters[0])
            yield f"{name}.weight", (weight + delta.to(weight.device)).to(weight.dtype)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of adapters by name; none if the model has no adapters."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


@contextmanager
def left_out(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes without its adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trained = {p: p.requires_grad for layer in layers for p in layer.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, trains in trained.items():
            parameter.requires_grad_(trains)
