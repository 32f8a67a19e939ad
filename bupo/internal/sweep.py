"""One pass of a model over texts, from which every figure of this package is taken.

Each batch of texts runs through the model once. A measure sees the layers as the model reaches
them, and afterwards, when the model's own policy is known, whole rows of log-probs of the policies
that it compares, CHUNK tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn, no_grad

from bupo import progress
from bupo.internal.decomposition import Layer, decomposed, layer_outputs
from bupo.internal.log_probs import log_probs
from bupo.policy import decoder_stack, hidden_states, num_layers, unembedding
from bupo.samples import Batch, Sample, micro_batches

CHUNK = 64
"""Tokens whose rows of log-probs are in memory at once"""
POLICIES = ("layer", "attention", "ffn")
"""Whose vectors are H^l, A^l and F^l"""
VIEWS = (*POLICIES, *(f"{policy}_normed" for policy in POLICIES))
"""Each raw, and with the model's final norm before the unembedding"""


class Policy(NamedTuple):
    """softmax(x E_u^T) for one vector x of a token."""

    layer: int | None
    """1..L; None of the model's own"""
    view: str
    """One of VIEWS, "final" of the model's own"""

    @property
    def vector(self) -> Policy:
        """The same without the norm."""
        return Policy(self.layer, self.view.removesuffix("_normed"))


FINAL = Policy(None, "final")


class Forward(NamedTuple):
    """A batch that runs through the model."""

    batch: Batch
    places: NDArray[np.int64]
    """[T]: where its measured tokens are among those of all texts"""


class Rows(NamedTuple):
    """What a policy says before some of the measured tokens."""

    places: NDArray[np.int64]
    """[n]: where they are among those of all texts"""
    targets: Tensor
    """[n]: the tokens"""
    vectors: Tensor
    """[n, D]: H^l, A^l or F^l, before any norm"""
    log_probs: Tensor
    """[n, V]"""


class Measure:
    """What is to be found out in a sweep. A subclass overrides what it needs."""

    takes_apart = False
    """Whether layer() is called: for families whose layers can be taken apart"""
    policies: tuple[Policy, ...] = ()
    """Those that compare() is called with, the model's own first and the others in this order"""

    def layer(self, forward: Forward, layer: Layer) -> None:
        """The model has got to the end of a layer."""

    def end(self, forward: Forward, final: Tensor) -> None:
        """The model has ended; final [T, D] is what its unembedding sees."""

    def compare(self, policy: Policy, rows: Rows) -> None:
        """What a policy says; for all policies before the next rows come."""


def sweep(
    model: nn.Module,
    texts: Sequence[Sample],
    measures: Sequence[Measure],
    temperature: float = 1.0,
    batch_tokens: int = 1024,
) -> None:
    """Runs texts through the model, those of equal length together, so that nothing is padded, in
    batches of at most batch_tokens tokens or one text.

    temperature: of the policies that are compared. Their vectors wait in the host's memory for the
    end of a batch's forward. The model is in evaluation mode and has no gradient meanwhile; the
    work that is done is told to bupo.progress. Errors: as decomposed and bupo.policy.
    """
    compared = sorted((p for m in measures for p in m.policies), key=lambda p: p != FINAL)
    readers = {p: [m for m in measures if p in m.policies] for p in compared}
    starts = np.cumsum([0, *(text.count for text in texts)])
    lengths = np.cumsum([0, *(len(text.token_ids) for text in texts)])
    done, device = 0, unembedding(model).weight.device
    with _evaluating(model):
        for batch in micro_batches(texts, batch_tokens, device, equal_lengths=True):
            places = [np.arange(starts[i], starts[i + 1]) for i in batch.members]
            forward = Forward(batch, np.concatenate(places))
            before, done = done, done + batch.input_ids.numel()
            with progress.part(before / lengths[-1], done / lengths[-1]):
                _run(model, forward, measures, readers, temperature)


def _run(
    model: nn.Module,
    forward: Forward,
    measures: Sequence[Measure],
    readers: dict[Policy, list[Measure]],
    temperature: float,
) -> None:
    """One batch: its forward, then the comparisons of what it has left."""
    batch, depth = forward.batch, num_layers(model)
    wanted = {policy.vector for policy in readers}
    kept: dict[Policy, Tensor] = {}
    looking = [measure for measure in measures if measure.takes_apart]
    # A share of the work for each half that there is; without a look at them, layers take no time.
    half = (0.5 if readers else 1.0) if looking else 0.0

    def keep(index: int, name: str, x: Tensor) -> None:
        if (index, name) in wanted:
            kept[Policy(index, name)] = batch.pick(x).cpu()

    def visit(layer: Layer) -> None:
        for name, x in (("layer", layer.after), ("attention", layer.attention), ("ffn", layer.ffn)):
            keep(layer.index, name, x)
        for measure in looking:
            measure.layer(forward, layer)
        progress.report(half * layer.index / depth)

    watched = (
        decomposed(model, visit)
        if looking
        else layer_outputs(model, lambda index, x: keep(index, "layer", x))
    )
    with watched:
        final = kept[FINAL] = batch.pick(hidden_states(model, batch.input_ids))
    for measure in measures:
        measure.end(forward, final)
    if readers:
        with progress.part(half, 1):
            _compare(model, forward, readers, kept, temperature)


def _compare(
    model: nn.Module,
    forward: Forward,
    readers: dict[Policy, list[Measure]],
    kept: dict[Policy, Tensor],
    temperature: float,
) -> None:
    head, norm = unembedding(model), decoder_stack(model).norm
    targets = forward.batch.targets
    for first in range(0, len(targets), CHUNK):
        part = slice(first, first + CHUNK)
        for policy, measures in readers.items():
            x = kept[policy.vector][part].to(targets.device)
            logp = log_probs(head, norm(x) if policy != policy.vector else x, temperature)
            rows = Rows(forward.places[part], targets[part], x, logp)
            for measure in measures:
                measure.compare(policy, rows)
        progress.report(min(part.stop / len(targets), 1))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, without gradient and in evaluation mode; then as it was."""
    training = model.training
    model.eval()
    try:
        with no_grad():
            yield
    finally:
        model.train(training)
