"""New weights to the rollout engine: only what changed, then a probe that they arrived."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bupo.config import RunError


class SyncError(RunError):
    """The engine does not hold the trainer's weights."""


def changed_tensors(model: nn.Module, changed: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every changed parameter, a tied one under each of its names: an engine
    that keeps a copy for the head has to hear of both."""
    named = dict(model.named_parameters())
    identities = {id(named[name]) for name in changed}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in identities:
            yield name, parameter.detach()


def gap(engine: Sequence[Tensor], trainer: Sequence[Tensor]) -> float:
    """Mean absolute difference of log-probs of the same tokens, in nats."""
    pairs = [(a, b[: len(a)]) for a, b in zip(engine, trainer)]
    if not sum(len(a) for a, _ in pairs):
        return 0.0
    difference = torch.cat([a.double() - b.double() for a, b in pairs])
    return float(difference.abs().mean())


def check(found: float, limit: float, what: str) -> None:
    """Raises SyncError if the gap is over the limit, or nan."""
    if not found <= limit:
        raise SyncError(
            f"sync/logprob_gap: {what} differ from the trainer's by {found:.3g} nats on average, "
            f"more than rollout.max_logprob_gap={limit:g}: the rollout engine holds stale or wrong "
            "weights, or computes at a much lower precision than the trainer"
        )


class WeightSync:
    """Hands the trainer's weights to an engine after each update."""

    def __init__(self, engine: Any, model: nn.Module, limit: float) -> None:
        """engine: a RolloutEngine."""
        self._engine, self._model, self._limit = engine, model, limit

    def __call__(
        self, changed: Collection[str], probe: Sequence[Any], trainer: Any
    ) -> float | None:
        """Loads what changed, then compares the log-probs of the probe's rollouts, by the engine
        and by trainer(rollouts). Returns the gap, None for an engine without weights of its own."""
        self._engine.load(changed_tensors(self._model, changed))
        scores = self._engine.score(probe)
        if scores is None:
            return None
        found = gap(scores, trainer(probe))
        check(found, self._limit, "log-probs by the engine, after new weights were loaded,")
        return found
