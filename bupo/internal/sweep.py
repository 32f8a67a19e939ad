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
from typing import Any, NamedTuple

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
"""Whose vectors x are H^l, A^l and F^l"""
VIEWS = (*POLICIES, *(f"{policy}_normed" for policy in POLICIES))
"""Each raw, and with the model's final norm before the unembedding"""
PLACE = "place"
"""The stream of a batch that says where its measured tokens are among those of all texts"""
Figures = Iterable[tuple[str, str, Tensor]]
"""A kind of figure ("entropy"), a name ("ffn_normed") and the values of n tokens, [n, ...]"""


class Policy(NamedTuple):
    """softmax(x E_u^T) for a vector x of each token."""

    layer: int
    """1..L; 0: the model's own"""
    view: str
    """One of VIEWS; "final": the model's own"""

    @property
    def vector(self) -> Policy:
        """The same without the norm."""
        return Policy(self.layer, self.view.removesuffix("_normed"))


FINAL = Policy(0, "final")


class Rows(NamedTuple):
    """What a policy says before some of the measured tokens."""

    targets: Tensor
    """[n]: the tokens"""
    vectors: Tensor
    """[n, D]: x, before any norm"""
    log_probs: Tensor
    """[n, V]"""


class Measure:
    """What is to be found out in a sweep. A subclass overrides the methods that it needs; what they
    yield is put where the tokens stand, in the order of texts and places."""

    takes_apart = False
    """Whether layer() is called: for families whose layers can be taken apart"""
    policies: tuple[Policy, ...] = ()
    """Those that compare() is called with: FINAL first, then the others in this order"""

    def __init__(
        self, function: str, texts: Sequence[Sample], chosen: NDArray[np.bool_] | None = None
    ) -> None:
        """Of the texts of a sweep; chosen [token]: of these tokens alone. Errors: as measured."""
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

    def compare(self, policy: Policy, rows: Rows) -> Figures:
        """What a policy says; called for all policies before the next rows come."""
        return ()

    def put(self, layer: int, places: Tensor, figures: Figures) -> None:
        """Notes figures of tokens, given their places among all. A generator is not begun where
        none of them is chosen."""
        columns = self._column[places.cpu().numpy()]
        mine = columns >= 0
        for kind, name, values in figures if mine.any() else ():
            new = values.cpu().numpy()[mine]
            shape = (len(self.tokens.text), *new.shape[1:])
            array = self.found.setdefault((kind, name, layer), np.empty(shape, new.dtype))
            array[columns[mine]] = new

    def table(self, kind: str) -> dict[str, NDArray[Any]]:
        """[layer, token, ...] by name."""
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
        Sample(text.token_ids, text.loss_mask, streams={PLACE: torch.arange(*ends)})
        for text, ends in zip(texts, pairwise(starts))
    ]
    total, done = sum(len(text.token_ids) for text in texts), 0
    device, training = unembedding(model).weight.device, model.training
    model.eval()
    try:
        for batch in micro_batches(placed, batch_tokens, device, equal_lengths=True):
            before, done = done, done + batch.input_ids.numel()
            with progress.part(before / total, done / total):
                with progress.part(0, 0.5):
                    kept = _forward(model, batch, measures)
                with progress.part(0.5, 1):
                    _compare(model, batch, kept, measures, temperature)
                progress.report(1)
    finally:
        model.train(training)


def _forward(model: nn.Module, batch: Batch, measures: Sequence[Measure]) -> dict[Policy, Tensor]:
    """Runs a batch; returns what _compare needs, the vectors [T, D] of its measured tokens."""
    layers, kept = decoder_stack(model).layers, dict[Policy, Tensor]()
    looking = [measure for measure in measures if measure.takes_apart]
    wanted = {policy.vector for measure in measures for policy in measure.policies}

    def keep(index: int, name: str, x: Tensor) -> None:
        if (policy := Policy(index, name)) in wanted:
            kept[policy] = batch.pick(x).cpu()

    def visit(layer: Layer) -> None:
        for name, x in zip(POLICIES, (layer.after, layer.attention, layer.ffn)):
            keep(layer.index, name, x)
        for measure in looking:
            measure.put(layer.index, batch.streams[PLACE], measure.layer(batch, layer))
        progress.report(layer.index / len(layers))

    def output(index: int, module: nn.Module, args: Any, out: Any) -> None:
        x = first_tensor((out,), {})
        assert x is not None
        keep(index, "layer", x)

    with ExitStack() as hooks:
        if looking:
            hooks.enter_context(decomposed(model, visit))
        else:  # works for families too whose layers cannot be taken apart
            for index, layer in enumerate(layers, start=1):
                hook = layer.register_forward_hook(partial(output, index))
                hooks.callback(hook.remove)
        final = kept[FINAL] = batch.pick(hidden_states(model, batch.input_ids))
    for measure in measures:
        measure.put(0, batch.streams[PLACE], measure.end(batch, final))
    return kept


def _compare(
    model: nn.Module,
    batch: Batch,
    kept: dict[Policy, Tensor],
    measures: Sequence[Measure],
    temperature: float,
) -> None:
    """Shows the measures what the policies say that they read, CHUNK tokens at a time."""
    head, norm = unembedding(model), decoder_stack(model).norm
    compared = sorted((p for m in measures for p in m.policies), key=lambda p: p != FINAL)
    readers = {p: [m for m in measures if p in m.policies] for p in compared}
    chunks = [slice(first, first + CHUNK) for first in range(0, len(batch.targets), CHUNK)]
    for n, chunk in enumerate(chunks):
        for k, (policy, reading) in enumerate(readers.items(), start=1):
            x = kept[policy.vector][chunk].to(batch.targets.device)
            logp = log_probs(head, norm(x) if policy != policy.vector else x, temperature)
            rows = Rows(batch.targets[chunk], x, logp)
            for measure in reading:
                places = batch.streams[PLACE][chunk]
                measure.put(policy.layer, places, measure.compare(policy, rows))
            progress.report((n + k / len(readers)) / len(chunks))
