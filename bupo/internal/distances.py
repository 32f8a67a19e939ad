"""How far the policies of the layers are from one another: means over tokens, in a few figures, and
the divergence of two of them, token by token.

    H(pi^m)    KL(pi^m || pi)    KL(pi^l || pi^m)    cos(H^l, H^m)    exp(-mean log pi(o_t))

pi^m = softmax(H^m E_u^T) of layer m, raw as in the paper (arXiv 2512.19673), or with the model's
final norm, softmax(LN(H^m) E_u^T); pi the model; l the anchor, the layer that phase 1 trains. The
means are what a run asks for on its probes, again and again: one forward and L + 1 products with
the head over the measured tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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
    same model and texts give the same figures to the bit. Errors: ValueError for no text, or one
    without a measured token, or a layer outside 1..L.
    """
    depth, count = num_layers(model), len(measured("distances", texts)[0])
    wanted = list(range(1, depth + 1)) if layers is None else list(layers)
    for name, value in [*(("layers", m) for m in wanted), ("anchor", anchor)]:
        if value is not None and not 1 <= value <= depth:
            raise ValueError(f"distances: {name}: expected 1..{depth}, came {value}")
    measure = _Means(anchor, wanted, "layer_normed" if final_norm else "layer")
    sweep(model, texts, [measure], temperature, batch_tokens)
    means = {m: (sums / count).tolist() for m, sums in measure.sums.items()}
    with_anchor = wanted if anchor is not None else []
    return Distances(
        layers=wanted,
        entropy=[means[m][0] for m in wanted],
        kl_to_final=[means[m][1] for m in wanted],
        kl_from_anchor=[means[m][2] for m in with_anchor],
        similarity=[means[m][3] for m in with_anchor],
        final_entropy=means[None][0],
        log_perplexity=means[None][1],
    )


class _Means(Measure):
    """Sums over tokens, of each layer: entropy and KL(pi^m || pi) and, with an anchor, KL(pi^l ||
    pi^m) and cos(H^l, H^m). Of None, the model: entropy and -log pi(token)."""

    def __init__(self, anchor: int | None, layers: Sequence[int], view: str) -> None:
        first = [] if anchor is None else [anchor]
        self.policies = (FINAL, *(Policy(m, view) for m in [*first, *layers]))
        self.sums: dict[int | None, Tensor] = {}
        self._anchor = anchor

    def compare(self, policy: Policy, rows: Rows) -> None:
        logp = rows.log_probs
        # xlogy's convention: an entry of probability 0 adds nothing.
        figures = [torch.special.entr(logp.exp())]
        if policy == FINAL:
            self._final = logp
            figures.append(-logp.gather(1, rows.targets[:, None]))
        else:
            figures.append(kl_rows(logp, self._final))
        if policy.layer == self._anchor:  # the first of the layers
            self._rows = rows
        if self._anchor is not None and policy != FINAL:
            pair = (self._rows.vectors.float(), rows.vectors.float())
            figures.append(kl_rows(self._rows.log_probs, logp))
            figures.append(nn.functional.cosine_similarity(*pair, dim=-1))
        sums = torch.stack([x.double().sum() for x in figures])
        self.sums[policy.layer] = self.sums.get(policy.layer, 0) + sums


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
    for no text, or one without a measured token, or a layer outside 1..L.
    """
    depth, count = num_layers(model), len(measured("kl_between", texts)[0])
    for layer in (l, m):
        if layer is not None and not 1 <= layer <= depth:
            raise ValueError(f"kl_between: layer: expected an int in 1..{depth}, came {layer}")
    view = "layer_normed" if final_norm else "layer"
    pair = tuple(FINAL if layer is None else Policy(layer, view) for layer in (l, m))
    measure = _Divergence(pair, count)
    sweep(model, texts, [measure], temperature, batch_tokens)
    return measure.found


class _Divergence(Measure):
    def __init__(self, pair: tuple[Policy, ...], count: int) -> None:
        self.policies = pair
        self.found = np.empty(count, np.float32)
        self._seen: dict[Policy, Tensor] = {}

    def compare(self, policy: Policy, rows: Rows) -> None:
        self._seen[policy] = rows.log_probs
        if self._seen.keys() == set(self.policies):
            ours, theirs = (self._seen[p] for p in self.policies)
            self.found[rows.places] = kl_rows(ours, theirs).cpu().numpy()
            self._seen.clear()
