"""Computes Avg@n, Pass@K and majority votes with the engine and the reward of training."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from bupo import progress
from bupo.config import Config
from bupo.types import EvalResult, Prompt, Reward, Rollout, finite_or_none


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Returns 1 - C(n - c, k) / C(n, k), the paper's Pass@K: an unbiased estimate of the chance
    that one of k samples is right (2107.03374). Returns nan for k > n, where it is undefined."""
    if k > n:
        return math.nan
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean over problems and its standard error. The unit is the problem, because
    samples of the same problem are not independent."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Returns 1 if the most frequent answer is right, else 0: maj@n (2203.11171), averaged over
    ties. Responses without an answer do not vote; without any votes the result is 0."""
    votes = Counter(a for a in answers if a is not None)
    top = max(votes.values(), default=0)
    shares = [
        fmean(r for a, r in zip(answers, right) if a == answer)
        for answer, count in votes.items()
        if count == top
    ]
    return fmean(shares) if shares else 0.0


Row = dict[str, Any]
"""One problem, as JSON lines hold it: prompt, answer and, for each response, reward (null: not
finite), tokens, finish_reason, text, final answer (null: none; the list is null if the reward does
not extract answers) and whether it could not be graded."""


def problem_rows(
    rollouts: Sequence[Rollout], rewards: Sequence[float], answers: Sequence[str | None] | None
) -> list[Row]:
    """Groups graded responses by problem, in the order of the problems' first responses."""
    groups: dict[int, list[int]] = {}
    for n, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(n)
    return [
        {
            "prompt": rollouts[members[0]].prompt.text,
            "answer": rollouts[members[0]].prompt.answer,
            "rewards": [finite_or_none(rewards[n]) for n in members],
            "ungraded": [not math.isfinite(rewards[n]) for n in members],
            "answers": None if answers is None else [answers[n] for n in members],
            "tokens": [rollouts[n].count for n in members],
            "finish_reasons": [rollouts[n].finish_reason for n in members],
            "responses": [rollouts[n].text for n in members],
        }
        for members in groups.values()
    ]


def summarise(dataset: str, rows: Sequence[Row], ks: Sequence[int]) -> EvalResult:
    """Returns Avg@n, Pass@K and maj@n over problems that have the same number of samples each. A
    response is right if its reward is > 0.5."""
    rights = [[x is not None and x > 0.5 for x in row["rewards"]] for row in rows]
    samples = len(rights[0])
    assert all(len(right) == samples for right in rights)
    avg, avg_se = _mean_and_error([sum(right) / samples for right in rights])
    pass_k = {
        k: _mean_and_error([pass_at_k(samples, sum(right), k) for right in rights])
        if k <= samples
        else None
        for k in ks
    }
    voting = all(row["answers"] is not None for row in rows)
    maj = (
        _mean_and_error([majority(row["answers"], right) for row, right in zip(rows, rights)])
        if voting
        else None
    )
    responses = samples * len(rows)
    return EvalResult(
        dataset=dataset,
        problems=len(rows),
        samples=samples,
        avg=avg,
        avg_se=avg_se,
        pass_k=pass_k,
        maj=maj,
        length=sum(sum(row["tokens"]) for row in rows) / responses,
        truncated=sum(row["finish_reasons"].count("length") for row in rows) / responses,
        ungraded=sum(sum(row["ungraded"]) for row in rows) / responses,
    )


def by_dataset(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Groups problems by data source, in order."""
    sets: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        sets.setdefault(prompt.source, []).append(prompt)
    return sets


def file_name(dataset: str) -> str:
    """Returns the file name for a data set's rows: the name of the data set. If this is not a valid
    file name, a hash is added, so that no two data sets share a file."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in dataset)[:100]
    if name != dataset:
        name += "-" + hashlib.sha256(dataset.encode()).hexdigest()[:8]
    return name + ".jsonl"


def evaluate(
    dataset: str,
    problems: Sequence[Prompt],
    config: Config,
    generate: Callable[[Sequence[Prompt], int, str], list[Rollout]],
    reward: Reward,
    keep: Callable[[list[Row]], object],
    done: Sequence[Row] = (),
) -> EvalResult:
    """Samples and grades responses, and computes the estimates. Training and bupo.evaluate both
    call this, so a checkpoint has the same figures in both.

    generate(problems, samples, seed) calls the engine; keep(rows) stores new rows, batch by batch;
    `done` holds rows stored before. Batches are the same in every call, and so are the seeds and
    the responses. An interrupted evaluation is therefore continued exactly: rows beyond the last
    whole batch are made again.
    """
    samples, size = config.eval.samples_of(dataset), _batch(dataset, config)
    rows = list(done[: whole_batches(dataset, len(done), len(problems), config)])
    for start in range(len(rows), len(problems), size):
        seed = f"{config.seed}/eval/{dataset}/{start}"
        end = min(start + size, len(problems))
        with progress.part(start / len(problems), end / len(problems)):
            with progress.part(0, 0.9):
                rollouts = generate(problems[start:end], samples, seed)
            with progress.part(0.9, 1):
                rewards = reward(rollouts).rewards
        new = problem_rows(rollouts, rewards, reward.answers(rollouts))
        keep(new)
        rows += new
    return summarise(dataset, rows, config.eval.pass_k)


def _batch(dataset: str, config: Config) -> int:
    """Returns the number of problems of a data set that are sampled together."""
    return max(1, config.rollout.batch_size // config.eval.samples_of(dataset))


def whole_batches(dataset: str, done: int, problems: int, config: Config) -> int:
    """Returns how many of the rows that are done can be kept."""
    size = _batch(dataset, config)
    return done if done >= problems else done // size * size
