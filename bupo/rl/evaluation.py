"""Avg@n and Pass@K on data sets, by the same engine and reward as training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from bupo.rl.types import EvalResult, Prompt, Rollout


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), unbiased for the chance that one of k samples is right
    (2107.03374); the paper's Pass@K. nan for k > n, where it is undefined."""
    if k > n:
        return math.nan
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over problems and its standard error: samples of a problem are not independent, so the
    problem is the unit."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


@dataclass
class Graded:
    """One problem's responses, counted: what the figures need of them."""

    correct: int
    samples: int
    tokens: int
    truncated: int

    @staticmethod
    def of(rollouts: Sequence[Rollout]) -> Graded:
        """A response is right if its reward is > 0.5."""
        return Graded(
            sum(r.reward > 0.5 for r in rollouts),
            len(rollouts),
            sum(len(r.token_ids) for r in rollouts),
            sum(r.finish_reason == "length" for r in rollouts),
        )


def by_problem(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The responses to each problem, in order of the problems' first responses."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return list(groups.values())


def summarise(dataset: str, graded: Sequence[Graded], ks: Sequence[int]) -> EvalResult:
    """Avg@n and Pass@K over problems with the same number of samples each."""
    samples = graded[0].samples
    assert all(g.samples == samples for g in graded)
    avg, avg_se = _mean_and_error([g.correct / samples for g in graded])
    pass_k = {
        k: _mean_and_error([pass_at_k(samples, g.correct, k) for g in graded])
        if k <= samples
        else None
        for k in ks
    }
    responses = samples * len(graded)
    length = sum(g.tokens for g in graded) / responses
    truncated = sum(g.truncated for g in graded) / responses
    return EvalResult(dataset, len(graded), samples, avg, avg_se, pass_k, length, truncated)


def by_dataset(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Problems of each data source, in order."""
    sets: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        sets.setdefault(prompt.source, []).append(prompt)
    return sets


def evaluate(
    generate: Callable[[Sequence[Prompt]], list[Rollout]],
    grade: Callable[[Sequence[Rollout]], object],
    prompts: Sequence[Prompt],
    ks: Sequence[int],
) -> list[EvalResult]:
    """One result a data set. generate and grade are the engine and the reward."""
    results = []
    for dataset, problems in by_dataset(prompts).items():
        rollouts = generate(problems)
        grade(rollouts)
        results.append(summarise(dataset, [Graded.of(g) for g in by_problem(rollouts)], ks))
    return results
