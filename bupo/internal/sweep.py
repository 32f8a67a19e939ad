"""One pass of a model over texts, from which every figure of this package is taken.

Each batch of texts runs through the model once. A measure sees the layers as the model reaches
them, and afterwards, when the model's own policy is known, whole rows of log-probs of the policies
that it compares, CHUNK tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bupo import progress
from bupo.internal.decomposition import Layer, decomposed, first_tensor
from bupo.internal.log_probs import log_probs
from bupo.policy import decoder_stack, hidden_states, unembedding
from bupo.samples import Batch, Sample, micro_batches

CHUNK = 64
"""Tokens whose rows of log-probs are in memory at once"""
POLICIES = ("layer", "attention", "ffn")
"""Whose vectors x are H^l, A^l and F^l"""
VIEWS = (*POLICIES, *(f"{policy}_normed" for policy in POLICIES))
"""Each raw, and with the model's final norm before the unembedding"""
Places = NDArray[np.int64]
"""Where measured tokens are among those of all texts, [n]"""


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

    places: Places
    targets: Tensor
    """[n]: the tokens"""
    vectors: Tensor
    """[n, D]: x, before any norm"""
    log_probs: Tensor
    """[n, V]"""


class Measure:
    """What is to be found out in a sweep. A subclass overrides what it needs."""

    takes_apart = False
    """Whether layer() is called: for families whose layers can be taken apart"""
    policies: tuple[Policy, ...] = ()
    """Those that compare() is called with: FINAL first, then the others in this order"""

    def layer(self, batch: Batch, places: Places, layer: Layer) -> None:
        """The model has got to the end of a layer."""

    def end(self, batch: Batch, places: Places, final: Tensor) -> None:
        """The model has ended; final [T, D] is what its unembedding sees."""

    def compare(self, policy: Policy, rows: Rows) -> None:
        """What a policy says; called for all policies before the next rows come."""


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
    compared = sorted((p for m in measures for p in m.policies), key=lambda p: p != FINAL)
    readers = {p: [m for m in measures if p in m.policies] for p in compared}
    starts = np.cumsum([0, *(text.count for text in texts)])
    total, done = sum(len(text.token_ids) for text in texts), 0
    device, training = unembedding(model).weight.device, model.training
    model.eval()
    try:
        for batch in micro_batches(texts, batch_tokens, device, equal_lengths=True):
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch.members])
            before, done = done, done + batch.input_ids.numel()
            with progress.part(before / total, done / total):
                # A forward takes little time beside the products with the head.
                middle = (0.5 if readers else 1.0) if any(m.takes_apart for m in measures) else 0.0
                with progress.part(0, middle):
                    kept = _forward(model, batch, places, measures, {p.vector for p in readers})
                with progress.part(middle, 1):
                    _compare(model, batch, places, readers, kept, temperature)
    finally:
        model.train(training)


def _forward(
    model: nn.Module,
    batch: Batch,
    places: Places,
    measures: Sequence[Measure],
    wanted: set[Policy],
) -> dict[Policy, Tensor]:
    """Runs a batch; returns the wanted vectors of its measured tokens, [T, D] each."""
    layers, kept = decoder_stack(model).layers, dict[Policy, Tensor]()
    looking = [measure for measure in measures if measure.takes_apart]

    def keep(index: int, name: str, x: Tensor) -> None:
        if (policy := Policy(index, name)) in wanted:
            kept[policy] = batch.pick(x).cpu()

    def visit(layer: Layer) -> None:
        for name, x in zip(POLICIES, (layer.after, layer.attention, layer.ffn)):
            keep(layer.index, name, x)
        for measure in looking:
            measure.layer(batch, places, layer)
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
        measure.end(batch, places, final)
    return kept


def _compare(
    model: nn.Module,
    batch: Batch,
    places: Places,
    readers: dict[Policy, list[Measure]],
    kept: dict[Policy, Tensor],
    temperature: float,
) -> None:
    """Shows the measures what the policies say that they read."""
    head, norm = unembedding(model), decoder_stack(model).norm
    chunks = [slice(first, first + CHUNK) for first in range(0, len(places), CHUNK)]
    for n, chunk in enumerate(chunks):
        for k, (policy, measures) in enumerate(readers.items(), start=1):
            x = kept[policy.vector][chunk].to(batch.targets.device)
            logp = log_probs(head, norm(x) if policy != policy.vector else x, temperature)
            for measure in measures:
                measure.compare(policy, Rows(places[chunk], batch.targets[chunk], x, logp))
            progress.report((n + k / len(readers)) / len(chunks))
