"""Identities that must hold for any model; otherwise the figures of an analysis are wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from bupo.internal.decomposition import rounding
from bupo.internal.entropy_flow import EntropyFlow

LAST_LAYER = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference between two computations of the model's log-probs, in nats; 0.1 in 16 bits"""


class IdentityError(ValueError):
    """Raised if an identity of the definitions does not hold; the message names it."""


@dataclass(frozen=True)
class Check:
    """An identity and the size of its violation."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit  # false for nan


def identities(flow: EntropyFlow, dtype: torch.dtype) -> list[Check]:
    """Checks finiteness, decomposition, last layer and the bounds of entropies for a model that ran
    in this dtype. Raises IdentityError naming the first that is violated."""
    # Python's max() may drop a nan, np.max does not.
    everything = [*flow.entropy.values(), flow.embedding_entropy[None], flow.final_entropy[None]]
    highest = float(np.max([x.max() for x in everything]))
    lowest = float(np.min([x.min() for x in everything]))
    bound = math.log(flow.vocab)
    last = LAST_LAYER.get(dtype, 0.1)
    figures = [*everything, *flow.logprob.values(), *flow.norm.values(), *flow.cosine.values()]
    bad = sum(int((~np.isfinite(x)).sum()) for x in figures)
    checks = [
        Check("figures that are not finite", bad, 0),
        Check("|H^0 + sum A + sum F - H^L| / |H^L|", flow.decomposition_error, rounding(dtype)),
        Check("last layer with final norm = the model, nats", flow.last_layer_error, last),
        Check("entropy <= ln V, nats above it", highest - bound, 1e-4 * bound),
        Check("entropy >= 0, nats below it", -lowest, 1e-4 * bound),
    ]
    for check in checks:
        if not check.holds:
            raise IdentityError(
                f"{check.name}: expected at most {check.limit:.1e}, got {check.value:.1e}"
            )
    return checks
