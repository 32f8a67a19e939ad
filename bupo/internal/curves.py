"""Figures by layer with their spread over texts, for plots and summaries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bupo.internal.entropy_flow import EntropyFlow
from bupo.internal.lens import Lens
from bupo.internal.sweep import POLICIES


@dataclass(frozen=True)
class Curve:
    """A quantity by layer. The statistical unit is the text, with the mean over its tokens."""

    layers: list[int]
    by_text: NDArray[np.floating]
    """[layer, text]"""

    @property
    def mean(self) -> NDArray[np.floating]:
        return np.asarray(self.by_text.mean(axis=1))

    @property
    def error(self) -> NDArray[np.floating] | None:
        """Standard error of the mean over texts; None for a single text"""
        count = self.by_text.shape[1]
        if count < 2:
            return None
        return np.asarray(self.by_text.std(axis=1, ddof=1) / math.sqrt(count))

    @property
    def band(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Bounds of the middle 80 % of texts"""
        low, high = np.quantile(self.by_text, (0.1, 0.9), axis=1)
        return low, high


def by_layer(flow: EntropyFlow, lens: Lens) -> Iterator[tuple[str, str, list[int], NDArray[Any]]]:
    """Yields kind, name, layers and values [layer, token] of every figure that has layers."""
    every = list(range(1, flow.layers + 1))
    for kind in ("entropy", "logprob", "norm", "cosine"):
        for name, values in getattr(flow, kind).items():
            yield kind, name, every, values
    for policy in POLICIES:
        yield "entropy_change", policy, every, flow.change(policy)
    for kind in ("kl", "agrees", "rank"):
        for name, values in getattr(lens, kind).items():
            yield kind, name, lens.layers, values


def curves(flow: EntropyFlow, lens: Lens) -> dict[str, Curve]:
    """Returns the curves by name: entropy.layer, entropy.ffn_normed, entropy_change.ffn,
    logprob.layer, norm.layer, cosine.attention, kl.layer_normed, agreement.layer, rank.layer, ...
    """
    return {
        f"{'agreement' if kind == 'agrees' else kind}.{name}": Curve(layers, _by_text(flow, values))
        for kind, name, layers, values in by_layer(flow, lens)
    }


def single(flow: EntropyFlow) -> dict[str, Curve]:
    """Returns the figures without layers: the embedding's and the model's entropy, and the model's
    log-prob."""
    names = ("embedding_entropy", "final_entropy", "final_logprob")
    return {name: Curve([], _by_text(flow, getattr(flow, name)[None])) for name in names}


def _by_text(flow: EntropyFlow, values: NDArray[Any]) -> NDArray[np.floating]:
    return flow.by_text(values.astype(np.float64)).astype(np.float64)
