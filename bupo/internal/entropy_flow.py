"""Entropy of every internal policy at each token, from one forward and one sweep of the head.

    pi^l_Layer = softmax(H^l E_u^T)   pi^l_ATTN = softmax(A^l E_u^T)   pi^l_FFN = softmax(F^l E_u^T)
    dH_Layer = H(H^l) - H(H^{l-1})    dH_ATTN = H(A^l) - H(input)      dH_FFN = H(F^l) - H(input)

(arXiv 2512.19673). A module's input is what it reads, after its own norm; for layers, both
entropies are raw. "normed" policies apply the model's final norm before the unembedding (the logit
lens); the last layer's normed policy is the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bupo import ops
from bupo.internal.decomposition import Layer
from bupo.internal.sweep import POLICIES, VIEWS, Figures, Measure, sweep
from bupo.internal.texts import Tokens
from bupo.policy import decoder_stack, num_layers, unembedding
from bupo.samples import Batch, Sample

Array = NDArray[np.float32]
MODULE_INPUTS = ("attention_input", "ffn_input")
ROWS = {"cpu": 1024, "cuda": 8192}
"""Hidden states in one call of the op. Vectors of short texts are joined up to this number, and
those of long texts are split to bound memory. More save no time on a CPU; 1024 do not fill a GPU.
"""


@dataclass
class EntropyFlow(Tokens):
    """Arrays over [layer, token], with the tokens of all texts concatenated and layers 1..L.

    Entropies and log-probs are in nats. `entropy["layer"]` etc. are raw; `entropy["layer_normed"]`
    has the final norm; `entropy["attention_input"]` and `["ffn_input"]` are of the modules' inputs.
    """

    vocab: int
    entropy: dict[str, Array]
    logprob: dict[str, Array]
    embedding_entropy: Array
    """[token]: H(H^0)"""
    final_entropy: Array
    """[token]: that of the model itself"""
    final_logprob: Array
    norm: dict[str, Array]
    """|H^l|, |A^l|, |F^l| under layer, attention, ffn"""
    cosine: dict[str, Array]
    """attention: cos(A^l, stream it adds to); ffn: cos(F^l, stream it adds to)"""
    parallel: bool
    """Whether attention and FFN read the same stream"""
    decomposition_error: float
    """|H^0 + sum A + sum F - H^L| / |H^L|"""
    last_layer_error: float
    """Largest difference between the last layer's normed log-probs and the model's own, in nats"""

    @property
    def layers(self) -> int:
        return int(self.entropy["layer"].shape[0])

    def change(self, policy: str) -> Array:
        """Returns dH of a policy, [layer, token]: > 0 is exploration, about 0 integration and < 0
        convergence. Raises ValueError for an unknown policy."""
        if policy not in POLICIES:
            raise ValueError(f"change: policy: expected one of {POLICIES}, got {policy!r}")
        after = self.entropy[policy]
        if policy == "layer":
            before = np.concatenate([self.embedding_entropy[None], after[:-1]])
        else:
            before = self.entropy[f"{policy}_input"]
        change: Array = after - before
        return change

    def by_text(self, values: Array) -> Array:
        """Returns the means over each text's tokens: [layer, token] -> [layer, text]."""
        sums = np.stack([np.bincount(self.text, row) for row in values])
        return np.asarray(sums / np.bincount(self.text), np.float32)


def entropy_flow(
    model: nn.Module,
    texts: Sequence[Sample],
    temperature: float = 1.0,
    batch_tokens: int = 1024,
) -> EntropyFlow:
    """Measures every internal policy of a model over the measured tokens of texts.

    Memory is that of one layer's activations, [batch_tokens, D], for any L and V. Errors:
    ValueError if there is no text or a text without a measured token; DecompositionError for a
    family whose layers cannot be decomposed. bupo.internal.checks checks the figures' bounds.
    """
    measure = FlowMeasure(model, texts, temperature)
    sweep(model, texts, [measure], temperature, batch_tokens)
    return measure.result()


class FlowMeasure(Measure):
    """EntropyFlow as a measure of a sweep."""

    takes_apart = True

    def __init__(
        self,
        model: nn.Module,
        texts: Sequence[Sample],
        temperature: float,
        chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        super().__init__("entropy_flow", texts, chosen=chosen)
        self._head, self._norm = unembedding(model), decoder_stack(model).norm
        self._depth, self._temperature = num_layers(model), temperature
        self._parallel, self._decomposition_error = False, 0.0
        self._total = torch.empty(0)  # H^0 + sum A + sum F over the layers so far

    def layer(self, batch: Batch, layer: Layer) -> Figures:
        before, after = batch.pick(layer.before), batch.pick(layer.after)
        attention, ffn = batch.pick(layer.attention), batch.pick(layer.ffn)
        written = {"layer": after, "attention": attention, "ffn": ffn}

        def vectors() -> Iterator[tuple[str, Tensor]]:  # lazily: copies of all would be large
            for name, x in written.items():
                yield name, x
                yield f"{name}_normed", self._norm(x)
            for name in MODULE_INPUTS:
                yield name, batch.pick(getattr(layer, name))
            if layer.index == 1:
                yield "embedding", before

        for name, logprob, entropy in self._policies(batch.targets, vectors()):
            yield "embedding" if name == "embedding" else "entropy", name, entropy
            if name in VIEWS:
                yield "logprob", name, logprob
        for name, x in written.items():
            yield "norm", name, x.float().norm(dim=-1)
        for name, onto in (("attention", before), ("ffn", batch.pick(layer.ffn_stream))):
            pair = (written[name].float(), onto.float())
            yield "cosine", name, nn.functional.cosine_similarity(*pair, dim=-1)
        self._total = before.double() if layer.index == 1 else self._total
        self._total.add_(attention).add_(ffn)
        if layer.index == self._depth:
            off = self._total.sub_(after).norm() / after.double().norm().clamp(min=1e-30)
            # np.maximum keeps a nan; max() may drop it.
            self._decomposition_error = float(np.maximum(self._decomposition_error, float(off)))
        self._parallel = layer.parallel

    def end(self, batch: Batch, final: Tensor) -> Figures:
        for _, logprob, entropy in self._policies(batch.targets, [("final", final)]):
            yield "final_entropy", "final", entropy
            yield "final_logprob", "final", logprob

    def _policies(
        self, targets: Tensor, vectors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields name, log-probs of the targets and entropies of softmax(x E_u^T) for all vectors
        x, with about ROWS hidden states in one call of the op."""
        head, count, left = self._head, len(targets), iter(vectors)
        most = ROWS.get(targets.device.type, 1024)
        while group := list(islice(left, max(1, most // count))):
            states = [x.to(head.weight.dtype) for _, x in group]
            stacked = states[0] if len(states) == 1 else torch.cat(states)
            repeated = targets.repeat(len(group))
            outs = [
                ops.lm_head_logprobs(
                    x,
                    head.weight,
                    target,
                    bias=head.bias,
                    softcap=head.softcap,
                    temperature=head.temperature * self._temperature,
                )
                for x, target in zip(torch.split(stacked, most), torch.split(repeated, most))
            ]
            logprobs, entropies = (
                torch.cat(parts).float().view(len(group), count)
                for parts in ([out.logprobs for out in outs], [out.entropy for out in outs])
            )
            yield from zip((name for name, _ in group), logprobs, entropies)

    def result(self) -> EntropyFlow:
        """Returns the result after the sweep."""
        logprob, final = self.table("logprob"), self.found["final_logprob", "final", 0]
        return EntropyFlow(
            **vars(self.tokens),
            vocab=int(self._head.weight.shape[0]),
            entropy=self.table("entropy"),
            logprob=logprob,
            embedding_entropy=self.found["embedding", "embedding", 1],
            final_entropy=self.found["final_entropy", "final", 0],
            final_logprob=final,
            norm=self.table("norm"),
            cosine=self.table("cosine"),
            parallel=self._parallel,
            decomposition_error=self._decomposition_error,
            last_layer_error=float(np.abs(logprob["layer_normed"][-1] - final).max()),
        )
