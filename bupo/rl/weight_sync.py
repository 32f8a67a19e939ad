"""New weights to the rollout engine: only what changed, then a probe that they arrived.

The probe is two tests on tokens that stay the same for the whole run. Engine and trainer compute
the same policy by other kernels, so their log-probs differ by rounding, b on average before the
first update. A tensor that never arrived leaves a difference that grows with every update:

1. gap: mean |engine - trainer| is at most FACTOR * b, or FLOOR where b is tiny. Rounding grows as
   a policy gets sharper: in bfloat16 b grows with the trainer's own distance to float32.
2. direction: since the beginning, the engine's log-probs have moved as the trainer's have. The
   slope of the one movement over the other is 1, to within its standard error and what rounding
   takes from it; it averages over all tokens, so it sees in bfloat16 what the gap cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from bupo.config import RunError
from bupo.samples import Sample
from bupo.types import Prompt, RolloutEngine

PROBES, PROBE_TOKENS = 16, 32
"""So many sequences, so many tokens of each are compared"""
FACTOR = {"float32": 10.0, "bfloat16": 2.0}
"""Largest gap, over that before the first update"""
FLOOR = {"float32": 1e-4, "bfloat16": 1e-3}
"""Gaps up to this are never an alarm; nats"""
SAMPLED_FACTOR, SAMPLED_FLOOR = 3.0, 0.02
"""The same of sampled tokens in bfloat16, which are others in every step"""
CEILING = {"float32": 1e-2, "bfloat16": 0.1}
"""Gaps beyond this are an alarm even before the first update"""


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


class GapLimit:
    """How far engine and trainer may be apart: relative to how far they are at the beginning, when
    they hold the same weights."""

    def __init__(self, dtype: str, fixed: float | None, sampled: bool = False) -> None:
        """dtype: model.compute_dtype; fixed: a limit of the user's instead, in nats; sampled: the
        tokens are others in every step."""
        self._dtype, self._fixed = dtype, fixed
        self._factor, self._floor = FACTOR[dtype], FLOOR[dtype]
        if sampled and dtype == "bfloat16":
            self._factor, self._floor = SAMPLED_FACTOR, SAMPLED_FLOOR
        self._first: tuple[float, float] | None = None

    def check(self, found: float, what: str, rounding: float = 1.0) -> None:
        """The first call sets the limit. Raises SyncError for a gap beyond it, or nan. rounding:
        how far the trainer is from exact, in any unit; the limit grows with it."""
        if self._first is None and math.isfinite(found):
            self._first = found, rounding
        first, as_it_was = self._first or (math.nan, 1.0)
        limit = max(first * self._factor * max(1.0, rounding / as_it_was), self._floor)
        limit = min(limit, CEILING[self._dtype]) if self._fixed is None else self._fixed
        if not found <= limit:
            whose = "rollout.max_logprob_gap" if self._fixed else "what rounding explains"
            raise SyncError(
                f"sync/logprob_gap: {what} differ from the trainer's by {found:.3g} nats on "
                f"average, more than {whose} ({limit:.3g}): the rollout engine holds stale or "
                "wrong weights, or computes at a much lower precision than the trainer"
            )


def probes_of(prompts: Sequence[Prompt]) -> list[Sample]:
    """Sequences of prompts' own tokens, of prompts from all over the list, as if the second half of
    each were a response."""
    found: list[Sample] = []
    for prompt in prompts[:: max(1, len(prompts) // PROBES)][:PROBES]:
        ids = prompt.token_ids[: 2 * PROBE_TOKENS]
        ids = ids * 2 if len(ids) == 1 else ids  # one token has no second half
        half = len(ids) // 2
        found.append(Sample.of(ids[:half], ids[half:]))
    return found


class WeightSync:
    """Hands the trainer's weights to an engine after each update, and sees that they arrive."""

    def __init__(
        self,
        engine: RolloutEngine,
        model: nn.Module,
        probes: Sequence[Sample],
        trainer: Callable[[Sequence[Sample]], list[Tensor]],
        limit: GapLimit,
        exact: Callable[[Sequence[Sample]], list[Tensor]] | None = None,
    ) -> None:
        """engine: holds the model's weights; trainer(samples): log-probs by the trainer at
        temperature 1; exact(samples): the same in float32, None where that is the
        trainer's type."""
        self._engine, self._model, self._probes, self._trainer = engine, model, probes, trainer
        self._limit, self._exact = limit, exact
        self._before: tuple[Tensor, Tensor] | None = None
        scores = engine.score(probes)
        if scores is not None:  # an engine with weights of its own
            expected = trainer(probes)
            self._before = self._together(scores, expected)
            self._check(self._before, self._rounding(expected))

    def __call__(self, changed: Collection[str]) -> float | None:
        """Loads what changed, then compares the log-probs of the probes. Returns the gap, None for
        an engine without weights of its own. Raises SyncError."""
        if self._before is None:
            self._engine.load(changed_tensors(self._model, changed))
            return None
        trainer = self._trainer(self._probes)  # before the engine takes its memory
        rounding = self._rounding(trainer)
        self._engine.load(changed_tensors(self._model, changed))
        scores = self._engine.score(self._probes)
        assert scores is not None, "an engine with weights of its own"
        now = self._together(scores, trainer)
        found = self._check(now, rounding)
        slope, allowed = direction(*self._before, *now)
        if not abs(slope - 1) <= allowed:
            raise SyncError(
                f"sync/logprob_gap: {_WHOSE} have moved {slope:.3f} times as far as the trainer's "
                f"since the run began, where rounding explains 1 ± {allowed:.3f}: some of the "
                "weights never arrive at the rollout engine"
            )
        return found

    def _rounding(self, trainer: Sequence[Tensor]) -> float:
        """Mean distance of the trainer's log-probs to those in float32; 1 where it has these."""
        if self._exact is None:
            return 1.0
        here, exact = self._together(trainer, self._exact(self._probes))
        return max(float((here - exact).abs().mean()), 1e-9)

    def _check(self, pair: tuple[Tensor, Tensor], rounding: float) -> float:
        """The gap. Raises SyncError."""
        found = float((pair[0] - pair[1]).abs().mean())
        self._limit.check(found, _WHOSE, rounding)
        return found

    @staticmethod
    def _together(engine: Sequence[Tensor], trainer: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """[tokens] of each, in float64; an engine may leave out a last token."""
        pairs = [(a, b[: len(a)]) for a, b in zip(engine, trainer)]
        together = [torch.cat(list(x)).double().cpu() for x in zip(*pairs)]
        return together[0], together[1]


_WHOSE = "the engine's log-probs of the probes"


def direction(
    engine_0: Tensor, trainer_0: Tensor, engine_1: Tensor, trainer_1: Tensor
) -> tuple[float, float]:
    """The slope of the engine's movement over the trainer's, and how far from 1 rounding can bring
    it; infinitely far where the movement hardly shows.

    With s the rms difference of the two before any movement, and m the rms movement over n tokens,
    the slope has a standard error of sqrt(2) s / (m sqrt(n)), and the rounding within the trainer's
    own movement lowers it by (s / m)^2.
    """
    moved_engine, moved = engine_1 - engine_0, trainer_1 - trainer_0
    s = float((engine_0 - trainer_0).square().mean().sqrt())
    m = float(moved.square().mean().sqrt())
    if not m > 5 * s:
        return 1.0, math.inf
    slope = float((moved_engine * moved).sum() / moved.square().sum())
    noise = s / m
    return slope, 0.02 + 5 * math.sqrt(2) * noise / math.sqrt(len(moved)) + 2 * noise**2
