"""Two-digit addition with written steps: a task that a model of 1M parameters learns in a minute.

The prompt `37+85=` has the response `7+5=12;3+8+1=12#122`: the units, the tens with the carry, the
sum. The warm start imitates demonstrations in which each of the three written results is wrong with
probability NOISE, so the mean reward starts at about 0.4 and reinforcement learning can raise it.
The reward only reads the number after the last `#`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from bupo.tasks import hold_out
from bupo.tasks.small_models import DEFAULTS, Characters, Problem

NOISE = 0.2


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Returns 1 for each response whose text after the last # is the sum, else 0."""
    return [float(extract(r) == a) for r, a in zip(responses, answers)]


def extract(response: str) -> str | None:
    """Returns the text after the last #, the answer that a majority vote counts."""
    return response.rpartition("#")[2] if "#" in response else None


def off(value: int, rng: random.Random, noise: float) -> int:
    """Returns the value, or with probability `noise` one that is wrong by 1 to 9."""
    if rng.random() >= noise:
        return value
    return max(0, value + rng.choice([-1, 1]) * rng.randint(1, 9))


def solution(a: int, b: int, rng: random.Random, noise: float) -> str:
    """Returns the written steps. Each result is wrong with probability `noise`, and later steps use
    the results as written."""
    units = off(a % 10 + b % 10, rng, noise)
    carry = units // 10
    tens = off(a // 10 + b // 10 + carry, rng, noise)
    total = off(10 * tens + units % 10, rng, noise)
    carried = f"+{carry}" if carry else ""
    return f"{a % 10}+{b % 10}={units};{a // 10}+{b // 10}{carried}={tens}#{total}"


def _problems(settings: dict[str, Any]) -> tuple[list[Problem], list[Problem]]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return hold_out([Problem(f"{a}+{b}=", str(a + b), "addition") for a, b in pairs], settings)


def _demonstration(problem: Problem, rng: random.Random) -> str:
    a, b = map(int, problem.prompt[:-1].split("+"))
    return solution(a, b, rng, NOISE)


TASK = Characters("arithmetic", "0123456789+=;#", DEFAULTS, _problems, _demonstration)
prepare, build = TASK.prepare, TASK.build
