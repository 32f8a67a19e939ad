"""How far the policies of the layers are from one another, in a few figures: means over tokens.

    H(pi^m)    KL(pi^m || pi)    KL(pi^l || pi^m)    cos(H^l, H^m)    exp(-mean log pi(o_t))

pi^m = softmax(H^m E_u^T) of layer m, raw as in the paper (arXiv 2512.19673); pi the model; l the
anchor, the layer that phase 1 trains. What a run asks for on its probes, again and again: one
forward and L + 1 products with the head over the measured tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bupo.internal.decomposition import first_tensor
from bupo.internal.log_probs import CHUNK, evaluating, kl_rows, log_probs
from bupo.internal.texts import Batch, Text, batches_of
from bupo.policy import decoder_stack, hidden_states, num_layers, unembedding

BATCH = 1024
"""Tokens of texts of one forward; what all layers make of those that are measured is in memory"""


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
    texts: Sequence[Text],
    anchor: int | None = None,
    layers: Sequence[int] | None = None,
    temperature: float = 1.0,
    final_norm: bool = False,
    share: Callable[[float], object] = lambda share: None,
) -> Distances:
    """Entropies, divergences and similarities of layers' policies, means over measured tokens.

    anchor: l, 1..L; layers: all of them unless given; temperature: of all policies; final_norm:
    puts the model's final norm before the unembedding of every layer (not into the cosine);
    share: called with the share that is done. The same model and texts give the same figures to
    the bit. Errors: ValueError for no text or a layer outside 1..L.
    """
    depth = num_layers(model)
    wanted = list(range(1, depth + 1)) if layers is None else list(layers)
    if not texts:
        raise ValueError("distances: texts: expected at least one, came none")
    asked = [("layers", m) for m in wanted] + [("anchor", m) for m in (anchor,) if m is not None]
    for name, value in asked:
        if not 1 <= value <= depth:
            raise ValueError(f"distances: {name}: expected 1..{depth}, came {value}")
    with evaluating(model):
        measure = _Measure(model, texts, anchor, wanted, temperature, final_norm)
        return measure.run(share)


class _Measure:
    def __init__(
        self,
        model: nn.Module,
        texts: Sequence[Text],
        anchor: int | None,
        layers: list[int],
        temperature: float,
        final_norm: bool,
    ) -> None:
        self.model, self.texts, self.anchor, self.layers = model, texts, anchor, layers
        self.head, self.temperature = unembedding(model), temperature
        self.norm = decoder_stack(model).norm if final_norm else nn.Identity()
        exact: Any = {"dtype": torch.float64, "device": self.head.weight.device}
        self.sums, self.final = torch.zeros(4, len(layers), **exact), torch.zeros(2, **exact)

    def run(self, share: Callable[[float], object]) -> Distances:
        tokens, total = 0, sum(text.measured for text in self.texts)
        for batch in batches_of(self.texts, BATCH, self.head.weight.device):
            needed = {*self.layers, *([self.anchor] if self.anchor else [])}
            with _layer_outputs(self.model, needed, batch) as streams:
                final = batch.pick(hidden_states(self.model, batch.ids))
            for first in range(0, len(batch.targets), CHUNK):
                rows = slice(first, first + CHUNK)
                self._chunk(batch, final[rows], {m: x[rows] for m, x in streams.items()}, rows)
                share((tokens + min(rows.stop, len(batch.targets))) / total)
            tokens += len(batch.targets)
        entropy, to_final, from_anchor, similarity = (self.sums / tokens).tolist()
        final_entropy, log_perplexity = (self.final / tokens).tolist()
        if self.anchor is None:
            from_anchor = similarity = []
        return Distances(
            self.layers, entropy, to_final, from_anchor, similarity, final_entropy, log_perplexity
        )

    def _chunk(self, batch: Batch, final: Tensor, streams: dict[int, Tensor], rows: slice) -> None:
        model = log_probs(self.head, final, self.temperature)
        anchor = self._policy(streams[self.anchor]) if self.anchor else None
        token = model.gather(1, batch.targets[rows, None])
        self.final += torch.stack([_entropy(model), -token.double().sum()])
        for place, m in enumerate(self.layers):
            known = anchor if m == self.anchor else None
            policy = self._policy(streams[m]) if known is None else known
            found = [_entropy(policy), kl_rows(policy, model).double().sum()]
            if self.anchor and anchor is not None:
                pair = (streams[self.anchor].float(), streams[m].float())
                cosine = nn.functional.cosine_similarity(*pair, dim=-1).double().sum()
                found += [kl_rows(anchor, policy).double().sum(), cosine]
            self.sums[: len(found), place] += torch.stack(found)

    def _policy(self, stream: Tensor) -> Tensor:
        """[n, D] -> [n, V]"""
        return log_probs(self.head, self.norm(stream), self.temperature)


def _entropy(logp: Tensor) -> Tensor:
    """Sum over rows. xlogy's convention: an entry of probability 0 adds nothing."""
    return torch.special.entr(logp.exp()).double().sum()


@contextmanager
def _layer_outputs(model: nn.Module, wanted: set[int], batch: Batch) -> Iterator[dict[int, Tensor]]:
    """H^m of the forward inside, where measured tokens are predicted, [N, D], by m."""
    outputs: dict[int, Tensor] = {}

    def keep(m: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = first_tensor((output,), {})
            assert found is not None
            outputs[m] = batch.pick(found)

        return hook

    stack = decoder_stack(model).layers
    hooks = [stack[m - 1].register_forward_hook(keep(m)) for m in sorted(wanted)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
