"""One pass of a model over texts, from which every figure of this package is taken.

Each batch of texts runs through the model once. A measure sees the layers as the model reaches
them, and afterwards, when the model's own policy is known, whole rows of log-probs of the policies
that it compares, CHUNK tokens at a time.
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
"""Tokens whose rows of log-probs are in memory at once"""
POLICIES = ("layer", "attention", "ffn")
"""softmax(x E_u^T) for the vectors x = H^l, A^l and F^l"""
VIEWS = (*POLICIES, *(f"{policy}_normed" for policy in POLICIES))
"""Each raw, and with the model's final norm before the unembedding"""
Policy = tuple[int, str]
"""A layer, 1..L, and one of VIEWS; or FINAL"""
FINAL: Policy = (0, "final")
"""The model's own policy"""
Figures = Iterable[tuple[str, str, Tensor]]
"""A kind of figure ("entropy"), a name ("ffn_normed") and the values of n tokens, [n, ...]"""


class Measure:
    """What is measured in a sweep. A subclass overrides the methods that it needs, and yields the
    figures of the tokens of a batch; they are kept in the order of texts and places."""

    takes_apart = False
    """Whether layer() is called, which needs a family whose layers can be taken apart"""

    def __init__(
        self,
        function: str,
        texts: Sequence[Sample],
        policies: Iterable[Policy] = (),
        chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        """texts: those of the sweep. policies: those that compare() is called with, FINAL first and
        the others in this order. chosen [token]: which tokens are measured, all of them unless
        given. Errors: as measured, in the name of a function."""
        self.policies = tuple(policies)
        tokens = measured(function, texts)
        mine = np.ones(len(tokens.text), bool) if chosen is None else chosen
        self.tokens = Tokens(tokens.text[mine], tokens.position[mine], tokens.token[mine])
        self._column = np.where(mine, np.cumsum(mine) - 1, -1)
        self.found: dict[tuple[str, str, int], NDArray[Any]] = {}
        """[token, ...] by kind, name and layer"""

    def layer(self, batch: Batch, layer: Layer) -> Figures:
        """The model has got to the end of a layer."""
        return ()

    def end(self, batch: Batch, final: Tensor) -> Figures:
        """The model has ended; final [T, D] is what its unembedding sees."""
        return ()

    def compare(self, policy: Policy, targets: Tensor, x: Tensor, logp: Tensor) -> Figures:
        """What a policy says, logp [n, V], before n tokens, targets [n], of vectors x [n, D], raw.
        Called for all policies before the next tokens come."""
        return ()

    def put(self, layer: int, places: Tensor, figures: Figures) -> None:
        """Keeps figures of a layer (0: of the model), of the tokens at these places among all. A
        generator is not begun where none of these tokens is chosen."""
        columns = self._column[places.cpu().numpy()]
        mine = columns >= 0
        for kind, name, values in figures if mine.any() else ():
            new = values.cpu().numpy()[mine]
            shape = (len(self.tokens.text), *new.shape[1:])
            if (kind, name, layer) not in self.found:
                self.found[kind, name, layer] = np.empty(shape, new.dtype)
            self.found[kind, name, layer][columns[mine]] = new

    def table(self, kind: str) -> dict[str, NDArray[Any]]:
        """All figures of a kind by name, [layer, token, ...]."""
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
    """Runs texts through the model in evaluation mode, those of equal length together, so that
    nothing is padded: at most batch_tokens tokens, or one text, at a time.

    temperature: of the policies that are compared. Their vectors wait in the host's memory for the
    end of the batch's forward. Tells bupo.progress. Errors: as decomposed and bupo.policy.
    """
    starts = np.cumsum([0, *(text.count for text in texts)]).tolist()
    placed = [
        Sample(text.token_ids, text.loss_mask, streams={"place": torch.arange(*ends)})
        for text, ends in zip(texts, pairwise(starts))
    ]
    total, done = sum(len(text.token_ids) for text in texts), 0
    device, training = unembedding(model).weight.device, model.training
    # A forward takes little time beside the products with the head.
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
    """Runs a batch; returns what _compare needs, the vectors [T, D] of its measured tokens."""
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
        else:  # works for families too whose layers cannot be taken apart
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
    """Shows the measures what the policies say that they read, CHUNK tokens at a time."""
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
