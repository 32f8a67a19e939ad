"""How far the policies of a model's layers are from one another.

    H(pi^m)    KL(pi^m || pi)    KL(pi^l || pi^m)    cos(H^l, H^m)    exp(-mean log pi(o_t))

pi^m = softmax(H^m E_u^T) of layer m, raw as in the paper (arXiv 2512.19673), or with the model's
final norm, softmax(LN(H^m) E_u^T); pi the model; l the anchor, the layer that phase 1 trains. A run
asks for the means over its probes again and again: one forward and L + 1 products with the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bupo.internal.log_probs import kl_rows
from bupo.internal.sweep import FINAL, Measure, Policy, Rows, sweep
from bupo.internal.texts import measured
from bupo.policy import num_layers
from bupo.samples import Sample


@dataclass(frozen=True)
class Distances:
    """Lists over the layers that were asked for; nats."""

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
    """Entropies, divergences and similarities of layers' policies, means over measured tokens.

    anchor: l, 1..L; layers: all of them unless given; temperature: of all policies; final_norm:
    puts the model's final norm before the unembedding of every layer (not into the cosine). The
    same model and texts give the same figures to the bit. Errors: ValueError for no text, one
    without a measured token, or a layer outside 1..L.
    """
    depth, count = num_layers(model), len(measured("distances", texts).text)
    wanted = list(range(1, depth + 1)) if layers is None else list(layers)
    for name, value in [*(("layers", m) for m in wanted), ("anchor", anchor)]:
        if value is not None and not 1 <= value <= depth:
            raise ValueError(f"distances: {name}: expected 1..{depth}, came {value}")
    policies = [_policy(m, final_norm) for m in wanted]
    measure = _Between(_policy(anchor, final_norm), policies, count)
    sweep(model, texts, [measure], temperature, batch_tokens)
    means = {p: dict(zip(FIGURES, x.mean(axis=1).tolist())) for p, x in measure.found.items()}
    anchored = policies if anchor is not None else []
    return Distances(
        layers=wanted,
        entropy=[means[p]["entropy"] for p in policies],
        kl_to_final=[means[p]["to_final"] for p in policies],
        kl_from_anchor=[means[p]["from_anchor"] for p in anchored],
        similarity=[means[p]["cosine"] for p in anchored],
        final_entropy=means[FINAL]["entropy"],
        log_perplexity=-means[FINAL]["logprob"],
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
    """KL(pi^l || pi^m) = sum_j pi^l_j (log pi^l_j - log pi^m_j) of every measured token, [token],
    in nats and in the order of texts and places.

    l, m: layers 1..L; None is the final policy, which has its norm in any case. Errors: ValueError
    for no text, one without a measured token, or a layer outside 1..L.
    """
    depth, count = num_layers(model), len(measured("kl_between", texts).text)
    for layer in (l, m):
        if layer is not None and not 1 <= layer <= depth:
            raise ValueError(f"kl_between: layer: expected an int in 1..{depth}, came {layer}")
    first, second = _policy(l, final_norm), _policy(m, final_norm)
    measure = _Between(first, [second], count)
    sweep(model, texts, [measure], temperature, batch_tokens)
    policy, figure = (first, "to_final") if m is None else (second, "from_anchor")
    return np.asarray(measure.found[policy][FIGURES.index(figure)], dtype=np.float32)


def _policy(layer: int | None, final_norm: bool) -> Policy:
    return FINAL if layer is None else Policy(layer, "layer_normed" if final_norm else "layer")


FIGURES = ("entropy", "logprob", "to_final", "from_anchor", "cosine")


class _Between(Measure):
    """FIGURES [figure, token] of policies: entropy, log-prob of the token, KL to the model, KL from
    an anchor, and the cosine of the vector with that of the anchor."""

    def __init__(self, anchor: Policy, policies: Sequence[Policy], count: int) -> None:
        self.policies, self._anchor = (FINAL, anchor, *policies), anchor
        self.found = {policy: np.empty((len(FIGURES), count)) for policy in self.policies}

    def compare(self, policy: Policy, rows: Rows) -> None:
        if policy == FINAL:
            self._final = self._from = rows  # the anchor comes next
        if policy == self._anchor:
            self._from = rows
        logp = rows.log_probs
        figures = [
            # xlogy's convention: an entry of probability 0 adds nothing.
            torch.special.entr(logp.exp()).double().sum(-1),
            logp.gather(1, rows.targets[:, None])[:, 0],
            kl_rows(logp, self._final.log_probs),
            kl_rows(self._from.log_probs, logp),
            nn.functional.cosine_similarity(
                self._from.vectors.float(), rows.vectors.float(), dim=-1
            ),
        ]
        together = torch.stack([x.double() for x in figures])
        self.found[policy][:, rows.places] = together.cpu().numpy()
