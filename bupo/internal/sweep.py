"""One pass of a model over texts, from which all figures of this package are computed.

Each batch of texts runs through the model once. A measure sees each layer as the model reaches it.
After the forward, when the model's own policy is known, it sees whole rows of log-probs of the
policies that it compares, CHUNK tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bupo import progress
from bupo.internal.decomposition import Layer, decomposed, first_tensor
from bupo.internal.log_probs import log_probs
from bupo.internal.texts import Tokens, measured
from bupo.policy import decoder_stack, hidden_states, unembedding
from bupo.samples import Batch, Sample, micro_batches

CHUNK = 64
"""Number of tokens whose rows of log-probs are in memory at once"""
POLICIES = ("layer", "attention", "ffn")
"""The policies softmax(x E_u^T) for the vectors x = H^l, A^l and F^l"""
VIEWS = (*POLICIES, *(f"{policy}_normed" for policy in POLICIES))
"""Each policy raw, and with the model's final norm before the unembedding"""
Policy = tuple[int, str]
"""A layer, 1..L, and one of VIEWS; or FINAL"""
FINAL: Policy = (0, "final")
"""The model's own policy"""
Figures = Iterable[tuple[str, str, Tensor]]
"""Kinds of figures ("entropy"), names ("ffn_normed") and the values of n tokens, [n, ...]"""


class Measure:
    """A set of figures to measure in a sweep. A subclass overrides the methods that it needs and
    yields the figures of a batch's tokens, which are kept in the order of texts and positions."""

    takes_apart = False
    """Whether layer() is called, which needs a family whose layers can be decomposed"""

    def __init__(
        self,
        function: str,
        texts: Sequence[Sample],
        policies: Iterable[Policy] = (),
        chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        """texts: those of the sweep. policies: those that compare() is called with, FINAL first and
        the others in this order. chosen [token]: the tokens to measure, all unless given.
        function: the name in error messages. Errors: as measured()."""
        self.policies = tuple(policies)
        tokens = measured(function, texts)
        mine = np.ones(len(tokens.text), bool) if chosen is None else chosen
        self.tokens = Tokens(tokens.text[mine], tokens.position[mine], tokens.token[mine])
        self._column = np.where(mine, np.cumsum(mine) - 1, -1)
        self.found: dict[tuple[str, str, int], NDArray[Any]] = {}
        """[token, ...] by kind, name and layer"""

    def layer(self, batch: Batch, layer: Layer) -> Figures:
        """Called when the model has reached the end of a layer."""
        return ()

    def end(self, batch: Batch, final: Tensor) -> Figures:
        """Called after the forward; final [T, D] is the input of the unembedding."""
        return ()

    def compare(self, policy: Policy, targets: Tensor, x: Tensor, logp: Tensor) -> Figures:
        """Called with the log-probs logp [n, V] of a policy before n tokens, targets [n], and with
        its raw vectors x [n, D]. It is called for all policies before the next tokens."""
        return ()

    def put(self, layer: int, places: Tensor, figures: Figures) -> None:
        """Keeps the figures of a layer (0: the model) for the tokens with these indices among all.
        If none of these tokens is chosen, a generator of figures is not started."""
        columns = self._column[places.cpu().numpy()]
        mine = columns >= 0
        for kind, name, values in figures if mine.any() else ():
            new = values.cpu().numpy()[mine]
            shape = (len(self.tokens.text), *new.shape[1:])
            if (kind, name, layer) not in self.found:
                self.found[kind, name, layer] = np.empty(shape, new.dtype)
            self.found[kind, name, layer][columns[mine]] = new

    def table(self, kind: str) -> dict[str, NDArray[Any]]:
        """Removes all figures of a kind from found; returns them by name, [layer, token, ...]."""
        layers: dict[str, list[NDArray[Any]]] = {}
        for key in [key for key in self.found if key[0] == kind]:
            layers.setdefault(key[1], []).append(self.found.pop(key))
        return {name: np.stack(arrays) for name, arrays in layers.items()}


@torch.no_grad()
def sweep(
    model: nn.Module,
    texts: Sequence[Sample],
    measures: Sequence[Measure],
    temperature: float = 1.0,
    batch_tokens: int = 1024,
) -> None:
    """Runs texts through the model in evaluation mode, at most batch_tokens tokens or one text at a
    time. The texts of a batch have equal lengths, so that nothing is padded.

    temperature: that of the policies that are compared. Their vectors are kept in the host's memory
    until the batch's forward ends. Reports to bupo.progress. Errors: as decomposed and bupo.policy.
    """
    starts = np.cumsum([0, *(text.count for text in texts)]).tolist()
    placed = [
        Sample(text.token_ids, text.loss_mask, streams={"place": torch.arange(*ends)})
        for text, ends in zip(texts, pairwise(starts))
    ]
    total, done = sum(len(text.token_ids) for text in texts), 0
    device, training = unembedding(model).weight.device, model.training
    # For progress: without decomposition, a forward takes little time compared with the head.
    apart = any(measure.takes_apart for measure in measures)
    middle = (0.5 if any(measure.policies for measure in measures) else 1.0) if apart else 0.0
    model.eval()
    try:
        for batch in micro_batches(placed, batch_tokens, device, equal_lengths=True):
            before, done = done, done + batch.input_ids.numel()
            with progress.part(before / total, done / total):
                with progress.part(0, middle):
                    kept = _forward(model, batch, measures)
                with progress.part(middle, 1):
                    _compare(model, batch, kept, measures, temperature)
    finally:
        model.train(training)


def _forward(model: nn.Module, batch: Batch, measures: Sequence[Measure]) -> dict[Policy, Tensor]:
    """Runs a batch and returns the vectors [T, D] of its measured tokens, which _compare needs."""
    layers, kept = decoder_stack(model).layers, dict[Policy, Tensor]()
    visitors = [measure for measure in measures if measure.takes_apart]
    wanted = {(m, view.removesuffix("_normed")) for x in measures for m, view in x.policies}

    def keep(m: int, name: str, x: Any) -> None:
        if (m, name) in wanted:
            kept[m, name] = batch.pick(x).cpu()

    def visit(layer: Layer) -> None:
        for name, x in zip(POLICIES, (layer.after, layer.attention, layer.ffn)):
            keep(layer.index, name, x)
        for measure in visitors:
            measure.put(layer.index, batch.streams["place"], measure.layer(batch, layer))
        progress.report(layer.index / len(layers))

    def output(m: int, module: nn.Module, args: Any, out: Any) -> None:
        keep(m, "layer", first_tensor((out,), {}))

    with ExitStack() as hooks:
        if visitors:
            hooks.enter_context(decomposed(model, visit))
        else:  # this also works for families whose layers cannot be decomposed
            for m, module in enumerate(layers, start=1):
                hooks.callback(module.register_forward_hook(partial(output, m)).remove)
        final = kept[FINAL] = batch.pick(hidden_states(model, batch.input_ids))
    for measure in measures:
        measure.put(0, batch.streams["place"], measure.end(batch, final))
    return kept


def _compare(
    model: nn.Module,
    batch: Batch,
    kept: dict[Policy, Tensor],
    measures: Sequence[Measure],
    temperature: float,
) -> None:
    """Passes the policies' log-probs to the measures that compare them, CHUNK tokens at a time."""
    head, norm, targets = unembedding(model), decoder_stack(model).norm, batch.targets
    compared = sorted((p for x in measures for p in x.policies), key=lambda p: p != FINAL)
    readers = {p: [x for x in measures if p in x.policies] for p in compared}
    for first in range(0, len(targets), CHUNK):
        chunk = slice(first, first + CHUNK)
        for k, (policy, reading) in enumerate(readers.items(), start=1):
            m, view = policy
            x = kept[m, view.removesuffix("_normed")][chunk].to(targets.device)
            logp = log_probs(head, norm(x) if view.endswith("_normed") else x, temperature)
            for measure in reading:
                figures = measure.compare(policy, targets[chunk], x, logp)
                measure.put(m, batch.streams["place"][chunk], figures)
            progress.report((first + k / len(readers) * len(targets[chunk])) / len(targets))
