"""Entropy of every internal policy, token by token, from one forward and one sweep of the head.

    pi^l_Layer = softmax(H^l E_u^T)   pi^l_ATTN = softmax(A^l E_u^T)   pi^l_FFN = softmax(F^l E_u^T)
    dH_Layer = H(H^l) - H(H^{l-1})    dH_ATTN = H(A^l) - H(input)      dH_FFN = H(F^l) - H(input)

(arXiv 2512.19673). A module's input is what it reads, after its own norm; layers are raw on both
sides. "normed" policies put the model's final norm before the unembedding (the logit lens); there
the last layer is the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bupo import ops
from bupo.internal.decomposition import Layer, decomposed
from bupo.internal.log_probs import evaluating
from bupo.internal.texts import Batch, Text, batches_of
from bupo.policy import Unembedding, decoder_stack, hidden_states, num_layers, unembedding

Array = NDArray[np.float32]
POLICIES = ("layer", "attention", "ffn")
MODULE_INPUTS = ("attention_input", "ffn_input")
ROWS = {"cpu": 1024, "cuda": 8192}
"""Hidden states that one call of the op takes: many of short texts, and memory does not grow with
long ones. On a CPU more take no less time; 1024 do not fill a GPU."""


@dataclass
class EntropyFlow:
    """Arrays over [layer, token]; tokens of all texts behind one another, layers 1..L.

    Entropies and log-probs are in nats. `entropy["layer"]` etc. are raw, `entropy["layer_normed"]`
    with the final norm; `entropy["attention_input"]` and `["ffn_input"]` what the modules read.
    """

    text: NDArray[np.int64]
    """[token]: which text"""
    position: NDArray[np.int64]
    """[token]: its place in the text"""
    token: NDArray[np.int64]
    """[token]: its id, the target of every policy's log-prob"""
    vocab: int
    entropy: dict[str, Array] = field(default_factory=dict)
    logprob: dict[str, Array] = field(default_factory=dict)
    embedding_entropy: Array = field(default_factory=lambda: np.empty(0, np.float32))
    """[token]: H(H^0)"""
    final_entropy: Array = field(default_factory=lambda: np.empty(0, np.float32))
    """[token]: the model's own"""
    final_logprob: Array = field(default_factory=lambda: np.empty(0, np.float32))
    norm: dict[str, Array] = field(default_factory=dict)
    """|H^l|, |A^l|, |F^l| under layer, attention, ffn"""
    cosine: dict[str, Array] = field(default_factory=dict)
    """attention: cos(A^l, stream it adds to); ffn: cos(F^l, stream it adds to)"""
    parallel: bool = False
    """Attention and FFN read the same stream"""
    decomposition_error: float = 0.0
    """|H^0 + sum A + sum F - H^L| / |H^L|"""
    last_layer_error: float = 0.0
    """Largest difference, in nats, of the last layer's normed log-probs to the model's own"""

    @property
    def layers(self) -> int:
        return int(self.entropy["layer"].shape[0])

    def change(self, policy: str) -> Array:
        """dH of a policy, [layer, token]: > 0 exploration, about 0 integration, < 0 convergence."""
        after = self.entropy[policy]
        if policy == "layer":
            return after - np.concatenate([self.embedding_entropy[None], after[:-1]])
        if policy not in POLICIES:
            raise ValueError(f"change: policy: expected one of {POLICIES}, came {policy!r}")
        return after - self.entropy[f"{policy}_input"]

    def by_text(self, values: Array) -> Array:
        """[layer, token] -> [layer, text]: means over each text's tokens."""
        count = int(self.text.max()) + 1
        sums = np.stack([np.bincount(self.text, row, minlength=count) for row in values])
        return (sums / np.bincount(self.text, minlength=count)).astype(np.float32)


def entropy_flow(
    model: nn.Module,
    texts: Sequence[Text],
    temperature: float = 1.0,
    batch_tokens: int = 1024,
    share: Callable[[float], object] = lambda share: None,
) -> EntropyFlow:
    """Every internal policy of a model over the measured tokens of texts.

    Memory is that of one layer's activations, [batch_tokens, D], whatever L and V. Texts run one by
    one or, those of equal length, together, so nothing is padded. share is called with the share
    done. Errors: ValueError for no text; DecompositionError for a family whose layers cannot be
    taken apart. bupo.internal.checks has the bounds that the figures must keep.
    """
    if not texts:
        raise ValueError("entropy_flow: texts: expected at least one, came none")
    done, total = 0, sum(len(t.token_ids) for t in texts)

    def of_batch(batch: Batch) -> EntropyFlow:
        nonlocal done
        begin, size = done, batch.ids.numel()
        sweep = _Sweep(model, batch, temperature)
        sweep.share = lambda part: share((begin + part * size) / total)
        done += size
        return sweep.run()

    with evaluating(model):
        device = unembedding(model).weight.device
        parts = [of_batch(batch) for batch in batches_of(texts, batch_tokens, device)]
    return _joined(parts)


class _Sweep:
    """One batch of texts of equal length."""

    share: Callable[[float], object]

    def __init__(self, model: nn.Module, batch: Batch, temperature: float) -> None:
        self.model, self.head, self.norm = model, unembedding(model), decoder_stack(model).norm
        self.batch, self.temperature = batch, temperature
        self.flow = EntropyFlow(
            text=batch.text,
            position=batch.position,
            token=batch.targets.cpu().numpy(),
            vocab=int(self.head.weight.shape[0]),
        )
        self.depth = num_layers(model)
        self.found: dict[str, dict[str, list[Array]]] = {}
        self.total: Tensor | None = None

    def run(self) -> EntropyFlow:
        flow = self.flow
        with decomposed(self.model, self._visit):
            final = self.batch.pick(hidden_states(self.model, self.batch.ids))
        for _, flow.final_logprob, flow.final_entropy in self._policies([("final", final)]):
            del final
        for kind, columns in self.found.items():
            getattr(flow, kind).update({name: np.stack(x) for name, x in columns.items()})
        gap = flow.logprob["layer_normed"][-1] - flow.final_logprob
        flow.last_layer_error = float(np.abs(gap).max())
        return flow

    def _visit(self, layer: Layer) -> None:
        before, after = self.batch.pick(layer.before), self.batch.pick(layer.after)
        attention, ffn = self.batch.pick(layer.attention), self.batch.pick(layer.ffn)
        stream = self.batch.pick(layer.ffn_stream)

        def vectors() -> Iterator[tuple[str, Tensor]]:  # one by one: a copy of each would be much
            for name, x in (("layer", after), ("attention", attention), ("ffn", ffn)):
                yield name, x
                yield f"{name}_normed", self.norm(x)
            yield "attention_input", self.batch.pick(layer.attention_input)
            yield "ffn_input", self.batch.pick(layer.ffn_input)
            if layer.index == 1:
                yield "embedding", before

        for name, logprob, entropy in self._policies(vectors()):
            if name == "embedding":
                self.flow.embedding_entropy = entropy
                continue
            self._note("entropy", name, entropy)
            if name not in MODULE_INPUTS:
                self._note("logprob", name, logprob)
        for name, x in (("layer", after), ("attention", attention), ("ffn", ffn)):
            self._note("norm", name, x.float().norm(dim=-1).cpu().numpy())
        for name, write, onto in (("attention", attention, before), ("ffn", ffn, stream)):
            cosine = nn.functional.cosine_similarity(write.float(), onto.float(), dim=-1)
            self._note("cosine", name, cosine.cpu().numpy())
        self.total = before.double() if self.total is None else self.total
        self.total.add_(attention).add_(ffn)
        if layer.index == self.depth:
            off = self.total.sub_(after).norm() / after.double().norm().clamp(min=1e-30)
            self.flow.decomposition_error = float(off)
        self.flow.parallel = layer.parallel
        self.share(layer.index / self.depth)

    def _note(self, kind: str, name: str, values: Array) -> None:
        self.found.setdefault(kind, {}).setdefault(name, []).append(values)

    def _policies(
        self, vectors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Array, Array]]:
        """Name, log-probs of the next tokens and entropies of softmax(x E_u^T), of every vector;
        as many of them in one call of the op as ROWS says."""
        count, left = len(self.batch.targets), iter(vectors)
        most = ROWS.get(self.batch.targets.device.type, 1024)
        while group := list(islice(left, max(1, most // count))):
            states = [x.to(self.head.weight.dtype) for _, x in group]
            stacked = states[0] if len(states) == 1 else torch.cat(states)
            targets = self.batch.targets.repeat(len(group))
            found = np.empty((2, len(stacked)), np.float32)
            for first in range(0, len(stacked), most):
                rows = slice(first, first + most)
                out = _policy(self.head, stacked[rows], targets[rows], self.temperature)
                for n, values in enumerate((out.logprobs, out.entropy)):
                    found[n, rows] = values.float().cpu().numpy()
            of_each = found.reshape(2, len(group), count)
            for n, (name, _) in enumerate(group):
                yield name, of_each[0, n].copy(), of_each[1, n].copy()


def _policy(head: Unembedding, x: Tensor, targets: Tensor, temperature: float) -> ops.LogProbs:
    return ops.lm_head_logprobs(
        x,
        head.weight,
        targets,
        bias=head.bias,
        softcap=head.softcap,
        temperature=head.temperature * temperature,
    )


def _joined(parts: list[EntropyFlow]) -> EntropyFlow:
    """One flow of several, tokens in the order of texts and places."""
    order = np.lexsort(
        (np.concatenate([p.position for p in parts]), np.concatenate([p.text for p in parts]))
    )

    def together(values: list[Any], axis: int = -1) -> Any:
        return np.take(np.concatenate(values, axis=axis), order, axis=axis)

    def tables(name: str) -> dict[str, Array]:
        found = [getattr(p, name) for p in parts]
        return {key: together([f[key] for f in found]) for key in found[0]}

    singles = ("text", "position", "token", "embedding_entropy", "final_entropy", "final_logprob")
    columns = {name: together([getattr(p, name) for p in parts]) for name in singles}
    return EntropyFlow(
        **columns,
        entropy=tables("entropy"),
        logprob=tables("logprob"),
        norm=tables("norm"),
        cosine=tables("cosine"),
        vocab=parts[0].vocab,
        parallel=parts[0].parallel,
        decomposition_error=float(np.max([p.decomposition_error for p in parts])),  # nan is kept
        last_layer_error=float(np.max([p.last_layer_error for p in parts])),
    )
