"""What the tests of bupo.policy share: families, hidden states and gradients by other ways."""

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, VOCAB
from torch import Tensor, nn

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def seed_and_one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small more threads only wait for each other
    yield
    torch.set_num_threads(threads)


def batch(rows: int = 2, tokens: int = 6) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


def parts(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """Layers and final norm, by name: the tests do not trust the search of policy.py."""
    names = {
        "gpt2": "h ln_f",
        "bloom": "h ln_f",
        "falcon": "h ln_f",
        "phi": "layers final_layernorm",
    }
    names |= {"gpt_neox": "layers final_layer_norm", "opt": "layers final_layer_norm"}
    layers, norm = names.get(model.config.model_type, "layers norm").split()
    backbone = model.base_model
    backbone = backbone.decoder if model.config.model_type == "opt" else backbone
    return getattr(backbone, layers), getattr(backbone, norm)


def own_hidden_states(model: nn.Module, ids: Tensor, **kw: Tensor) -> list[Tensor]:
    """H^0 .. H^L of the unchanged model; H^L is the norm's input, hidden_states[-1] its output."""
    last = []
    with parts(model)[1].register_forward_pre_hook(lambda _, args: last.append(args[0])):
        output = model(ids, output_hidden_states=True, use_cache=False, **kw)
    return [*output.hidden_states[:-1], *last]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def above(model: nn.Module, layer: int) -> set[str]:
    """Names of the parameters that pi^layer does not contain: layers above and the final norm."""
    layers, norm = parts(model)
    outside = {id(p) for m in [*layers[layer:], norm] for p in m.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in outside}


def some_loss(logits: Tensor) -> Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return (logits.log_softmax(-1) * weights).sum()
