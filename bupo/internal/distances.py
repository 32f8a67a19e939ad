"""Distances between the policies of a model's layers.

    H(pi^m)    KL(pi^m || pi)    KL(pi^l || pi^m)    cos(H^l, H^m)    exp(-mean log pi(o_t))

pi^m = softmax(H^m E_u^T) is the policy of layer m, raw as in the paper (arXiv 2512.19673), or with
the model's final norm, softmax(LN(H^m) E_u^T); pi is the model; l is the anchor, the layer that
phase 1 trains. A run computes the means over its probes repeatedly, so the cost is low: one forward
and L + 1 products with the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bupo.internal.log_probs import kl_rows
from bupo.internal.sweep import FINAL, Figures, Measure, Policy, sweep
from bupo.policy import num_layers
from bupo.samples import Sample


@dataclass(frozen=True)
class Distances:
    """Lists over the requested layers, in nats."""

    layers: list[int]
    entropy: list[float]
    kl_to_final: list[float]
    """KL(pi^m || pi)"""
    kl_from_anchor: list[float]
    """KL(pi^l || pi^m); empty without an anchor"""
    similarity: list[float]
    """cos(H^l, H^m); empty without an anchor"""
    final_entropy: float
    log_perplexity: float
    """-mean log pi(token)"""


def distances(
    model: nn.Module,
    texts: Sequence[Sample],
    anchor: int | None = None,
    layers: Sequence[int] | None = None,
    temperature: float = 1.0,
    final_norm: bool = False,
    batch_tokens: int = 1024,
) -> Distances:
    """Measures entropies, divergences and similarities of layers' policies as means over measured
    tokens.

    anchor: l, 1..L, or None. layers: all layers unless given. temperature: that of all policies.
    final_norm: applies the model's final norm before the unembedding of every layer (not for the
    cosine). The same model and texts give bit-identical figures. Errors: ValueError if there is no
    text, a text without a measured token, or a layer outside 1..L.
    """
    depth = num_layers(model)
    wanted = list(range(1, depth + 1)) if layers is None else list(layers)
    for name, value in [*(("layers", m) for m in wanted), ("anchor", anchor)]:
        if value is not None and not 1 <= value <= depth:
            raise ValueError(f"distances: {name}: expected 1..{depth}, got {value}")
    policies = [_policy(m, final_norm) for m in wanted]
    measure = _DistancesMeasure("distances", texts, [FINAL, _policy(anchor, final_norm), *policies])
    sweep(model, texts, [measure], temperature, batch_tokens)

    def means(figure: str, policies: Sequence[Policy]) -> list[float]:
        found = [measure.found[figure, view, m] for m, view in policies]
        return [float(values.mean(dtype=np.float64)) for values in found]

    return Distances(
        layers=wanted,
        entropy=means("entropy", policies),
        kl_to_final=means("to_final", policies),
        kl_from_anchor=means("from_anchor", policies if anchor else []),
        similarity=means("cosine", policies if anchor else []),
        final_entropy=means("entropy", [FINAL])[0],
        log_perplexity=-means("logprob", [FINAL])[0],
    )


def kl_between(
    model: nn.Module,
    texts: Sequence[Sample],
    l: int | None,
    m: int | None,
    final_norm: bool = False,
    temperature: float = 1.0,
    batch_tokens: int = 1024,
) -> NDArray[np.float32]:
    """Returns KL(pi^l || pi^m) = sum_j pi^l_j (log pi^l_j - log pi^m_j) for every measured token,
    [token], in nats, ordered by text and position.

    l, m: layers 1..L, or None for the final policy, which always has its norm. Errors: ValueError
    if there is no text, a text without a measured token, or a layer outside 1..L.
    """
    depth = num_layers(model)
    for layer in (l, m):
        if layer is not None and not 1 <= layer <= depth:
            raise ValueError(f"kl_between: layer: expected an int in 1..{depth}, got {layer}")
    pair = [_policy(l, final_norm), _policy(m, final_norm)]
    measure = _DivergenceMeasure("kl_between", texts, pair)
    sweep(model, texts, [measure], temperature, batch_tokens)
    (kl,) = measure.found.values()
    return kl


def _policy(layer: int | None, final_norm: bool) -> Policy:
    return FINAL if layer is None else (layer, "layer_normed" if final_norm else "layer")


class _DistancesMeasure(Measure):
    """Measures the figures of Distances. The policies are FINAL, the anchor (FINAL if there is
    none) and the requested layers."""

    def compare(self, policy: Policy, targets: Tensor, x: Tensor, logp: Tensor) -> Figures:
        view, anchor = policy[1], self.policies[1]
        # entr gives 0 for an entry of probability 0.
        yield "entropy", view, torch.special.entr(logp.exp()).double().sum(-1)
        if policy == FINAL:
            self._final = logp
            yield "logprob", view, logp.gather(1, targets[:, None])[:, 0]
            return
        yield "to_final", view, kl_rows(logp, self._final)
        if policy == anchor:  # it comes before the requested layers
            self._anchor, self._vector = logp, x.float()
        if anchor != FINAL:
            yield "from_anchor", view, kl_rows(self._anchor, logp)
            yield "cosine", view, nn.functional.cosine_similarity(self._vector, x.float(), dim=-1)


class _DivergenceMeasure(Measure):
    """Measures KL(p || q) for two policies p and q."""

    def compare(self, policy: Policy, targets: Tensor, x: Tensor, logp: Tensor) -> Figures:
        p, q = self.policies
        if policy == p:
            self._p = logp
        if policy == q:
            self._q = logp
        if policy == (p if q == FINAL else q):  # FINAL comes first
            yield "kl", "", kl_rows(self._p, self._q)
