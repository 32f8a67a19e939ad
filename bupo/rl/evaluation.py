"""Avg@n and Pass@K on data sets, by the same engine and reward as training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def summarise(
    dataset: str, rollouts: Sequence[Rollout], samples: int, ks: Sequence[int]
) -> EvalResult:
    """Of `samples` graded responses to each problem; a response is right if its reward is > 0.5."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    correct = [sum(r.reward > 0.5 for r in group) for group in groups.values()]
    avg, avg_se = _mean_and_error([c / samples for c in correct])
    pass_k = {
        k: _mean_and_error([pass_at_k(samples, c, k) for c in correct]) if k <= samples else None
        for k in ks
    }
    length = fmean(len(r.token_ids) for r in rollouts)
    truncated = fmean(r.finish_reason == "length" for r in rollouts)
    return EvalResult(dataset, len(groups), samples, avg, avg_se, pass_k, length, truncated)


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
    samples: int,
    ks: Sequence[int],
) -> list[EvalResult]:
    """One result a data set. generate and grade are the engine and the reward."""
    results = []
    for dataset, problems in by_dataset(prompts).items():
        rollouts = generate(problems)
        grade(rollouts)
        results.append(summarise(dataset, rollouts, samples, ks))
    return results
