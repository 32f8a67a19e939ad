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
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.add_adapter(settings)
        except ValueError as error:
            raise ConfigError(f"lora: {first_line(error)}") from None
    model.peft_config["default"].base_model_name_or_path = source  # peft has put another there
    for parameter in model.parameters():
        if parameter.requires_grad:  # not rounded as the model may be
            parameter.data = parameter.data.float()
    if saved is not None:
        from safetensors.torch import load_file

        found: Any = peft.set_peft_model_state_dict(model, load_file(saved / WEIGHTS))
        if found.unexpected_keys:
            raise ValueError(f"{WEIGHTS} has {found.unexpected_keys[0]}, which the model lacks")


def merged(
    model: nn.Module, changed: Collection[str], half: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of the weights whose adapters are among the parameters `changed`, as in
    a model without adapters. Their linear neighbours (k_proj of q_proj) follow unchanged, because
    vLLM fuses these and loads a fused layer as a whole.

    half: whether the receiver holds them in bfloat16. Each sum is then rounded up or down, with the
    probabilities that keep its mean: rounded to the nearest, most small changes would vanish.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    parents = {name.partition(".lora_")[0].rpartition(".")[0] for name in changed}
    for name, module in model.named_modules():
        layer: Any = module
        if name.rpartition(".")[0] not in parents:
            continue
        if isinstance(module, BaseTunerLayer):
            base = layer.get_base_layer()
            with torch.no_grad():
                delta = layer.get_delta_weight(layer.active_adapters[0]).to(base.weight.device)
                weight = base.weight.to(torch.promote_types(base.weight.dtype, torch.float32))
                total = _dithered(weight + delta) if half else weight + delta
            yield f"{name}.weight", total.to(base.weight.dtype)
        elif isinstance(module, nn.Linear):
            base = layer
            yield f"{name}.weight", base.weight.detach()
        else:
            continue
        if base.bias is not None:
            yield f"{name}.bias", base.bias.detach()


def all_weights(model: nn.Module, half: bool = False) -> dict[str, Tensor]:
    """Returns all weights by name, as in a model without adapters. half: as for merged()."""
    named = model.named_parameters(remove_duplicate=False)
    found = {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in named
        if ".lora_" not in name
    }
    if trained := parameters(model):
        found |= dict(merged(model, trained, half))
    return found


def _dithered(values: Tensor) -> Tensor:
    """Rounds float32 values to ones that bfloat16 has. The random numbers are the same at every
    call, so an entry moves when its sum has moved far enough."""
    generator = torch.Generator(values.device).manual_seed(0)
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    noise.random_(0, 1 << 16, generator=generator)
    return ((values.float().view(torch.int32) + noise) & ~0xFFFF).view(torch.float32)


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
