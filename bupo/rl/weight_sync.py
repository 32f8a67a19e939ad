"""Hands new weights to the rollout engine: only those that changed. Probes check that they arrive.

The check consists of two tests on tokens that stay the same for the whole run. Engine and trainer
compute the same policy with different kernels, so their log-probs differ by rounding, by b on
average before the first update. A tensor that never arrives leaves a difference that grows with
every update:

1. gap: mean |engine - trainer| is at most FACTOR * b, or FLOOR if b is tiny. Rounding grows as a
   policy becomes sharper: in bfloat16, b grows with the trainer's own distance to float32.
2. direction: since the run began, the engine's log-probs have moved like the trainer's. The slope
   of one movement over the other is 1, to within its standard error and the effect of rounding. It
   averages over all tokens, so in bfloat16 it detects what the gap cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from bupo import adapters, ranks
from bupo.config import RunError
from bupo.rl import sharding
from bupo.samples import Sample
from bupo.types import Prompt, RolloutEngine

PROBES, PROBE_TOKENS = 16, 32
"""Number of sequences, and number of tokens compared in each"""
FACTOR = {"float32": 10.0, "bfloat16": 2.0}
"""Largest allowed gap as a multiple of the gap before the first update"""
FLOOR = {"float32": 1e-4, "bfloat16": 1e-3}
"""Gaps up to this size, in nats, are always allowed"""
SAMPLED_FACTOR, SAMPLED_FLOOR = 3.0, 0.02
"""The same limits for sampled tokens in bfloat16, which differ from step to step"""
CEILING = {"float32": 1e-2, "bfloat16": 0.1}
"""Gaps above this size, in nats, are errors even before the first update"""


class SyncError(RunError):
    """The engine does not hold the trainer's weights."""


def changed_tensors(
    model: nn.Module, changed: Collection[str], half: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and value of every changed parameter. A tied parameter appears under each of
    its names, because an engine that keeps a copy for the head needs both. For adapters, yields the
    weights with them. half: whether the engine holds them in bfloat16."""
    if adapters.parameters(model):
        yield from adapters.merged(model, changed, half)
        return
    named = dict(model.named_parameters())
    identities = {id(named[name]) for name in changed}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in identities:
            yield name, ranks.whole(parameter.detach())


def load(
    engine: RolloutEngine, model: nn.Module, changed: Collection[str], half: bool = False
) -> None:
    """Loads what changed into an engine; all ranks load it into theirs. half: as above."""
    merges = bool(adapters.parameters(model))  # sums of whole matrices
    with sharding.gathered(model) if merges else nullcontext():
        engine.load(changed_tensors(model, changed, half))


def load_all(engine: RolloutEngine, model: nn.Module, half: bool = False) -> None:
    """Loads all weights into an engine that may hold any others."""
    if adapters.parameters(model):
        with sharding.gathered(model):
            engine.load(adapters.all_weights(model, half).items())
    else:
        engine.load(changed_tensors(model, dict(model.named_parameters())))


def gap(engine: Sequence[Tensor], trainer: Sequence[Tensor]) -> float:
    """Returns the mean absolute difference between log-probs of the same tokens, in nats."""
    pairs = [(a, b[: len(a)]) for a, b in zip(engine, trainer)]
    if not sum(len(a) for a, _ in pairs):
        return 0.0
    difference = torch.cat([a.double() - b.double() for a, b in pairs])
    return float(difference.abs().mean())


class GapLimit:
    """The largest gap allowed between engine and trainer, relative to the gap at the beginning,
    when they hold the same weights."""

    def __init__(self, dtype: str, fixed: float | None, sampled: bool = False) -> None:
        """dtype: model.compute_dtype. fixed: a limit set by the user instead, in nats. sampled:
        whether the tokens differ from step to step."""
        self._dtype, self._fixed = dtype, fixed
        self._factor, self._floor = FACTOR[dtype], FLOOR[dtype]
        if sampled and dtype == "bfloat16":
            self._factor, self._floor = SAMPLED_FACTOR, SAMPLED_FLOOR
        self._first: tuple[float, float] | None = None

    def check(self, found: float, what: str, rounding: float = 1.0) -> None:
        """Checks a gap; the first call sets the limit. Raises SyncError for a gap beyond it, or
        nan. rounding: the trainer's distance from exact values in any unit; it raises the limit."""
        if self._first is None and math.isfinite(found):
            self._first = found, rounding
        first, as_it_was = self._first or (math.nan, 1.0)
        limit = max(first * self._factor * max(1.0, rounding / as_it_was), self._floor)
        limit = min(limit, CEILING[self._dtype]) if self._fixed is None else self._fixed
        if not found <= limit:
            whose = "rollout.max_logprob_gap" if self._fixed else "rounding explains"
            raise SyncError(
                f"sync/logprob_gap: {what} differ from the trainer's by {found:.3g} nats on "
                f"average, more than {whose} ({limit:.3g}): the rollout engine holds stale or "
                "wrong weights, or computes at a much lower precision than the trainer"
            )


def probes_of(prompts: Sequence[Prompt]) -> list[Sample]:
    """Returns sequences of the prompts' own tokens, taken from prompts across the list. The second
    half of each sequence is treated as a response."""
    found: list[Sample] = []
    for prompt in prompts[:: max(1, len(prompts) // PROBES)][:PROBES]:
        ids = prompt.token_ids[: 2 * PROBE_TOKENS]
        ids = ids * 2 if len(ids) == 1 else ids  # one token has no second half
        half = len(ids) // 2
        found.append(Sample.of(ids[:half], ids[half:]))
    return found


class WeightSync:
    """Hands the trainer's weights to an engine after each update, and checks that they arrive."""

    def __init__(
        self,
        engine: RolloutEngine,
        model: nn.Module,
        probes: Sequence[Sample],
        trainer: Callable[[Sequence[Sample]], list[Tensor]],
        limit: GapLimit,
        exact: Callable[[Sequence[Sample]], list[Tensor]] | None = None,
        half: bool = False,
    ) -> None:
        """engine: holds the model's weights. trainer(samples): returns the trainer's log-probs at
        temperature 1. exact(samples): returns these in float32; None if the trainer does so too, or
        if it cannot, which leaves the limit as it is at the beginning. half: whether the engine
        holds weights in bfloat16."""
        self._engine, self._model, self._probes, self._trainer = engine, model, probes, trainer
        self._limit, self._exact, self._half = limit, exact, half
        self._before: tuple[Tensor, Tensor] | None = None
        scores = engine.score(probes)
        if scores is not None:  # the engine holds a copy of the weights
            expected = trainer(probes)
            self._before = self._together(scores, expected)
            self._check(self._before, self._rounding(expected))

    def __call__(self, changed: Collection[str]) -> float | None:
        """Loads what changed, then compares the log-probs of the probes. Returns the gap, or None
        if the engine shares the trainer's weights. Raises SyncError if weights did not arrive."""
        if self._before is None:
            load(self._engine, self._model, changed, self._half)
            return None
        trainer = self._trainer(self._probes)  # before the engine takes up memory
        rounding = self._rounding(trainer)
        load(self._engine, self._model, changed, self._half)
        scores = self._engine.score(self._probes)
        assert scores is not None, "an engine with weights of its own"
        now = self._together(scores, trainer)
        found = self._check(now, rounding)
        slope, allowed = direction(*self._before, *now)
        if not abs(slope - 1) <= allowed:  # also true for nan
            raise SyncError(
                f"sync/logprob_gap: {_WHOSE} have moved {slope:.3f} times as far as the trainer's "
                f"since the run began, but rounding explains only 1 ± {allowed:.3f}: some of "
                "the weights never reach the rollout engine"
            )
        return found

    def _rounding(self, trainer: Sequence[Tensor]) -> float:
        """Returns the mean distance of the trainer's log-probs to those in float32, or 1 without
        these."""
        if self._exact is None:
            return 1.0
        here, exact = self._together(trainer, self._exact(self._probes))
        return max(float((here - exact).abs().mean()), 1e-9)

    def _check(self, pair: tuple[Tensor, Tensor], rounding: float) -> float:
        """Returns the gap. Raises SyncError if it exceeds the limit."""
        found = float((pair[0] - pair[1]).abs().mean())
        self._limit.check(found, _WHOSE, rounding)
        return found

    @staticmethod
    def _together(engine: Sequence[Tensor], trainer: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns both as float64 tensors [tokens]; an engine may leave out a last token."""
        pairs = [(a, b[: len(a)]) for a, b in zip(engine, trainer)]
        together = [torch.cat(list(x)).double().cpu() for x in zip(*pairs)]
        return together[0], together[1]


_WHOSE = "the engine's log-probs of the probes"


def direction(
    engine_0: Tensor, trainer_0: Tensor, engine_1: Tensor, trainer_1: Tensor
) -> tuple[float, float]:
    """Returns the slope of the engine's movement over the trainer's, and how far from 1 rounding
    can bring it; the latter is infinite if the movement hardly exceeds the rounding.

    Let s be the rms difference between the two before any movement, and m the rms movement over n
    tokens. The slope then has a standard error of sqrt(2) s / (m sqrt(n)), and rounding within the
    trainer's own movement lowers it by (s / m)^2.
    """
    moved_engine, moved = engine_1 - engine_0, trainer_1 - trainer_0
    s = float((engine_0 - trainer_0).square().mean().sqrt())
    m = float(moved.square().mean().sqrt())
    if not m > 5 * s:
        return 1.0, math.inf
    slope = float((moved_engine * moved).sum() / moved.square().sum())
    noise = s / m  # below: slack of 2 %, five standard errors, and twice the lowering
    return slope, 0.02 + 5 * math.sqrt(2) * noise / math.sqrt(len(moved)) + 2 * noise**2
