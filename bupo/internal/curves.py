"""Figures by layer, with their spread over texts: what is plotted and summarised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bupo.internal.entropy_flow import EntropyFlow
from bupo.internal.lens import Lens
from bupo.internal.sweep import POLICIES


@dataclass(frozen=True)
class Curve:
    """A quantity by layer; the unit is the text, whose value is the mean over its tokens."""

    layers: list[int]
    by_text: NDArray[np.floating]
    """[layer, text]"""

    @property
    def mean(self) -> NDArray[np.floating]:
        return np.asarray(self.by_text.mean(axis=1))

    @property
    def error(self) -> NDArray[np.floating] | None:
        """Standard error of the mean over texts, None of one text."""
        count = self.by_text.shape[1]
        if count < 2:
            return None
        return np.asarray(self.by_text.std(axis=1, ddof=1) / math.sqrt(count))

    @property
    def band(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """The middle 80 % of texts."""
        low, high = np.quantile(self.by_text, (0.1, 0.9), axis=1)
        return low, high


def curves(flow: EntropyFlow, lens: Lens) -> dict[str, Curve]:
    """By name: entropy.layer, entropy.ffn_normed, entropy_change.ffn, logprob.layer, norm.layer,
    cosine.attention, kl.layer_normed, agreement.layer, rank.layer, ..."""
    every = list(range(1, flow.layers + 1))
    found = {
        f"{kind}.{name}": Curve(every, _by_text(flow, values))
        for kind in ("entropy", "logprob", "norm", "cosine")
        for name, values in getattr(flow, kind).items()
    }
    for policy in POLICIES:
        found[f"entropy_change.{policy}"] = Curve(every, _by_text(flow, flow.change(policy)))
    for kind, of_lens in (("kl", lens.kl), ("agreement", lens.agrees), ("rank", lens.rank)):
        for name, values in of_lens.items():
            found[f"{kind}.{name}"] = Curve(lens.layers, _by_text(flow, values))
    return found


def single(flow: EntropyFlow) -> dict[str, Curve]:
    """What has no layer: the embedding's and the model's entropy, the model's log-prob."""
    names = ("embedding_entropy", "final_entropy", "final_logprob")
    return {name: Curve([], _by_text(flow, getattr(flow, name)[None])) for name in names}


def _by_text(flow: EntropyFlow, values: NDArray[Any]) -> NDArray[np.floating]:
    return flow.by_text(values.astype(np.float64)).astype(np.float64)
