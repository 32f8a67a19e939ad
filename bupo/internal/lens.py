"""What each internal policy would say: its most likely tokens, and how far it is from the model.

For a policy q of layer l (layer, attention or FFN; raw or with the final norm) and the final policy
pi, of each measured token t:

    rank = #{j : q_j > q_t}    KL(q || pi) = sum_j q_j (log q_j - log pi_j)    argmax q = argmax pi?

These need whole rows of log-probs beside each other; entropy_flow() does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bupo.internal.decomposition import Layer
from bupo.internal.log_probs import kl_rows
from bupo.internal.sweep import FINAL, VIEWS, Measure, Places, Policy, Rows, sweep
from bupo.internal.texts import Tokens, measured
from bupo.policy import num_layers, unembedding
from bupo.samples import Batch, Sample

COMPARED = 256
"""Tokens of a batch, evenly spaced, whose H^1..H^L are kept for the cosines between layers"""


@dataclass
class Lens(Tokens):
    """Arrays over [layer, token], by view ("layer", ..., "ffn_normed"); rows as in `layers`."""

    rank: dict[str, NDArray[np.int64]]
    """Of the measured token, 0 for the most likely"""
    kl: dict[str, NDArray[np.float32]]
    """KL(internal || final), nats"""
    agrees: dict[str, NDArray[np.bool_]]
    """Same most likely token as the model"""
    top_tokens: dict[str, NDArray[np.int64]]
    """[layer, token, k]"""
    top_logprobs: dict[str, NDArray[np.float32]]
    final_top: NDArray[np.int64]
    """[token]: the model's most likely token"""
    similarity: NDArray[np.float32]
    """[L, L]: cos(H^l, H^m), mean over tokens, of a batch over at most COMPARED of them"""
    layers: list[int]
    """Which layers the rows are, counted from 1"""


def lens(
    model: nn.Module,
    texts: Sequence[Sample],
    top_k: int = 5,
    views: Sequence[str] = VIEWS,
    temperature: float = 1.0,
    layers: Sequence[int] | None = None,
    batch_tokens: int = 1024,
) -> Lens:
    """Ranks, distances and top tokens of layers' policies over the measured tokens.

    layers: which, counted from 1; None: all. Memory on the host is that of what these layers write
    for the tokens of one batch. Errors: ValueError for no text, or one without a measured token, an
    unknown view or layer, top_k outside 1..V; DecompositionError for a family whose layers cannot
    be taken apart.
    """
    measure = LensMeasure(model, texts, top_k, views, layers)
    sweep(model, texts, [measure], temperature, batch_tokens)
    return measure.result()


class LensMeasure(Measure):
    """Lens as a measure of a sweep over texts, or (chosen [token]) over some of their tokens."""

    takes_apart = True

    def __init__(
        self,
        model: nn.Module,
        texts: Sequence[Sample],
        top_k: int,
        views: Sequence[str],
        layers: Sequence[int] | None,
        chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        tokens = measured("lens", texts)
        if unknown := [v for v in views if v not in VIEWS]:
            raise ValueError(f"lens: views: expected some of {VIEWS}, came {unknown}")
        vocabulary, depth = unembedding(model).weight.shape[0], num_layers(model)
        if not 1 <= top_k <= vocabulary:
            raise ValueError(f"lens: top_k: expected 1..{vocabulary}, came {top_k}")
        kept = sorted(set(range(1, depth + 1) if layers is None else layers))
        if not kept or kept[0] < 1 or kept[-1] > depth:
            raise ValueError(f"lens: layers: expected some of 1..{depth}, came {layers}")
        self.policies = (FINAL, *(Policy(layer, view) for layer in kept for view in views))
        self._top_k = top_k
        mine = np.ones(len(tokens.text), bool) if chosen is None else chosen
        self._column = np.where(mine, np.cumsum(mine) - 1, -1)
        self._stream: list[Tensor] = []
        self._similarity = np.zeros((depth, depth))
        count = int(mine.sum())

        def empty(kind: Any, *rest: int) -> dict[str, NDArray[Any]]:
            return {view: np.empty((len(kept), count, *rest), kind) for view in views}

        self._lens = Lens(
            **{name: column[mine] for name, column in vars(tokens).items()},
            rank=empty(np.int64),
            kl=empty(np.float32),
            agrees=empty(np.bool_),
            top_tokens=empty(np.int64, top_k),
            top_logprobs=empty(np.float32, top_k),
            final_top=np.empty(count, np.int64),
            similarity=np.empty((0, 0), np.float32),
            layers=kept,
        )

    def layer(self, batch: Batch, places: Places, layer: Layer) -> None:
        mine = np.flatnonzero(self._column[places] >= 0)
        spaced = np.linspace(0, len(mine) - 1, min(len(mine), COMPARED)).round().astype(np.int64)
        self._stream.append(batch.pick(layer.after)[mine[spaced].tolist()].float())

    def end(self, batch: Batch, places: Places, final: Tensor) -> None:
        unit = nn.functional.normalize(torch.stack(self._stream), dim=-1)
        self._stream.clear()
        if unit.shape[1]:
            mean = torch.einsum("ind,jnd->ij", unit, unit).div(unit.shape[1]).cpu().double()
            share = (self._column[places] >= 0).sum() / len(self._lens.text)
            self._similarity += share * mean.numpy()

    def compare(self, policy: Policy, rows: Rows) -> None:
        columns = self._column[rows.places]
        mine, logp = columns >= 0, rows.log_probs
        if not mine.any():
            return
        if policy == FINAL:
            self._final, self._said = logp, logp.argmax(-1)
            self._lens.final_top[columns[mine]] = self._said.cpu().numpy()[mine]
            return
        if self._top_k > 1:
            best, first = logp.topk(self._top_k, dim=-1)
        else:  # much cheaper
            best, first = logp.max(-1, keepdim=True)
        found = {
            "rank": (logp > logp.gather(1, rows.targets[:, None])).sum(-1),
            "kl": kl_rows(logp, self._final),
            "agrees": first[:, 0] == self._said,
            "top_tokens": first,
            "top_logprobs": best,
        }
        row = self._lens.layers.index(policy.layer)
        for kind, values in found.items():
            getattr(self._lens, kind)[policy.view][row, columns[mine]] = values.cpu().numpy()[mine]

    def result(self) -> Lens:
        """After the sweep."""
        self._lens.similarity = self._similarity.astype(np.float32)
        return self._lens
