"""Small models and their layers, taken apart: shared by the tests of bupo.internal."""

import families
import torch
from torch import Tensor, nn

from bupo.internal import Layer, Sample, decomposed

VOCAB = families.VOCAB


def build(family: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return families.build(family, **changes).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def split_at(tokens: Tensor, start: int) -> Sample:
    """The tokens from `start` on are measured."""
    return Sample.of(tokens.tolist()[:start], tokens.tolist()[start:])


def layers_of(model: nn.Module, tokens: Tensor) -> list[Layer]:
    found: list[Layer] = []
    with torch.no_grad(), decomposed(model, found.append):
        model(tokens, use_cache=False)
    return found
