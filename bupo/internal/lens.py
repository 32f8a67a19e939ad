"""The predictions of each internal policy: its most likely tokens and its distance from the model.

For a policy q of layer l (layer, attention or FFN; raw or with the final norm), the final policy pi
and each measured token t, they are:

    rank = #{j : q_j > q_t}    KL(q || pi) = sum_j q_j (log q_j - log pi_j)    argmax q = argmax pi?

Unlike the figures of entropy_flow(), these need whole rows of log-probs of both policies at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bupo.internal.decomposition import Layer
from bupo.internal.log_probs import kl_rows
from bupo.internal.sweep import FINAL, VIEWS, Figures, Measure, Policy, sweep
from bupo.internal.texts import Tokens
from bupo.policy import num_layers, unembedding
from bupo.samples import Batch, Sample

COMPARED = 256
"""Number of evenly spaced tokens of a batch whose H^1..H^L are kept for cosines between layers"""


@dataclass
class Lens(Tokens):
    """Arrays over [layer, token] by view ("layer", ..., "ffn_normed"), with rows as in `layers`."""

    rank: dict[str, NDArray[np.int64]]
    """Rank of the measured token, 0 for the most likely"""
    kl: dict[str, NDArray[np.float32]]
    """KL(internal || final), nats"""
    agrees: dict[str, NDArray[np.bool_]]
    """Whether the most likely token is that of the model"""
    top_tokens: dict[str, NDArray[np.int64]]
    """[layer, token, k]"""
    top_logprobs: dict[str, NDArray[np.float32]]
    final_top: NDArray[np.int64]
    """[token]: the model's most likely token"""
    similarity: NDArray[np.float32]
    """[L, L]: cos(H^l, H^m), mean over the texts' tokens, with at most COMPARED of each batch"""
    layers: list[int]
    """The layers of the rows, counted from 1"""


def lens(
    model: nn.Module,
    texts: Sequence[Sample],
    top_k: int = 5,
    views: Sequence[str] = VIEWS,
    temperature: float = 1.0,
    layers: Sequence[int] | None = None,
    batch_tokens: int = 1024,
) -> Lens:
    """Measures ranks, distances and top tokens of layers' policies over the measured tokens.

    layers: those to measure, counted from 1, or None for all. The host's memory holds what these
    layers write for the tokens of one batch. Errors: ValueError if there is no text, a text without
    a measured token, an unknown view or layer, or a top_k outside 1..V; DecompositionError for a
    family whose layers cannot be decomposed.
    """
    measure, similarity = LensMeasure(model, texts, top_k, views, layers), SimilarityMeasure(texts)
    sweep(model, texts, [measure, similarity], temperature, batch_tokens)
    return measure.result(similarity)


class LensMeasure(Measure):
    """Lens as a measure of a sweep over texts, or over those of their tokens that are chosen."""

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
        if unknown := [v for v in views if v not in VIEWS]:
            raise ValueError(f"lens: views: expected some of {VIEWS}, got {unknown}")
        vocabulary, depth = unembedding(model).weight.shape[0], num_layers(model)
        if not 1 <= top_k <= vocabulary:
            raise ValueError(f"lens: top_k: expected 1..{vocabulary}, got {top_k}")
        self._layers = sorted(set(range(1, depth + 1) if layers is None else layers))
        if not self._layers or self._layers[0] < 1 or self._layers[-1] > depth:
            raise ValueError(f"lens: layers: expected some of 1..{depth}, got {layers}")
        self._top_k = top_k
        policies = [FINAL, *((m, view) for m in self._layers for view in views)]
        super().__init__("lens", texts, policies, chosen)

    def compare(self, policy: Policy, targets: Tensor, x: Tensor, logp: Tensor) -> Figures:
        view = policy[1]
        if policy == FINAL:
            self._final, self._said = logp, logp.argmax(-1)
            yield "final_top", view, self._said
            return
        if self._top_k > 1:
            best, first = logp.topk(self._top_k, dim=-1)
        else:  # much cheaper than topk(1)
            best, first = logp.max(-1, keepdim=True)
        yield "rank", view, (logp > logp.gather(1, targets[:, None])).sum(-1)
        yield "kl", view, kl_rows(logp, self._final)
        yield "agrees", view, first[:, 0] == self._said
        yield "top_tokens", view, first
        yield "top_logprobs", view, best

    def result(self, similarity: SimilarityMeasure) -> Lens:
        """Returns the result after the sweep."""
        return Lens(
            **vars(self.tokens),
            rank=self.table("rank"),
            kl=self.table("kl"),
            agrees=self.table("agrees"),
            top_tokens=self.table("top_tokens"),
            top_logprobs=self.table("top_logprobs"),
            final_top=self.found["final_top", "final", 0],
            similarity=similarity.mean.astype(np.float32),
            layers=self._layers,
        )


class SimilarityMeasure(Measure):
    """cos(H^l, H^m) as a measure of a sweep over texts: the mean over tokens, [L, L]."""

    takes_apart = True

    def __init__(self, texts: Sequence[Sample]) -> None:
        super().__init__("lens", texts)
        self.mean = np.zeros(())
        self._stream: list[Tensor] = []

    def layer(self, batch: Batch, layer: Layer) -> Figures:
        count = len(batch.targets)
        spaced = np.linspace(0, count - 1, min(count, COMPARED)).round().astype(np.int64)
        self._stream.append(batch.pick(layer.after)[spaced.tolist()].float())
        return ()

    def end(self, batch: Batch, final: Tensor) -> Figures:
        unit = nn.functional.normalize(torch.stack(self._stream), dim=-1)
        self._stream.clear()
        cosines = torch.einsum("ind,jnd->ij", unit, unit).div(unit.shape[1]).cpu().double().numpy()
        self.mean = self.mean + len(batch.targets) / len(self.tokens.text) * cosines
        return ()
