"""Countdown: reach a target with three numbers. A search, in which most attempts fail.

For the prompt `3,5,8>64=` the response writes attempts, each of which combines all three numbers
from left to right, until one reaches the target: `5+8=13-3=10;3+5=8*8=64#`. It gets the reward 1 if
its last attempt uses each number once, is worked out right, reaches the target, and is followed by
`#` and nothing else. The warm start imitates demonstrations of up to ATTEMPTS attempts, of which
the last is one that reaches the target with probability KNOWN and otherwise as random as the
others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations, product
from typing import Any

from bupo.tasks.small_models import DEFAULTS, Characters, Problem, hold_out

SIGNS, NUMBERS, LARGEST = "+-*", range(1, 10), 99
ATTEMPTS, KNOWN = 3, 0.3


def _attempts(numbers: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yields every way to combine the numbers from left to right, and its value."""
    for (a, b, c), (first, second) in product(permutations(numbers), product(SIGNS, repeat=2)):
        between = _apply(first, a, b)
        value = _apply(second, between, c)
        yield f"{a}{first}{b}={between}{second}{c}={value}", value


def _apply(sign: str, a: int, b: int) -> int:
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def extract(response: str) -> str | None:
    """Returns the last attempt, if the response ends after it."""
    if response.count("#") != 1 or not response.endswith("#"):
        return None
    return response[:-1].rpartition(";")[2]


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Returns 1 for each response whose last attempt reaches the target. answers: the prompts."""
    return [float(_is_right(extract(r), a)) for r, a in zip(responses, answers)]


def _is_right(attempt: str | None, prompt: str) -> bool:
    numbers, target = prompt.rstrip("=").split(">")
    right = [way for way, value in _attempts(_numbers(numbers)) if value == int(target)]
    return attempt in right


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _problems(settings: dict[str, Any]) -> Any:
    problems = []
    for numbers in combinations(NUMBERS, 3):
        for target in sorted({value for _, value in _attempts(numbers) if 0 < value <= LARGEST}):
            prompt = f"{','.join(map(str, numbers))}>{target}="
            problems.append(Problem(prompt, prompt, "countdown"))
    return hold_out(problems, settings)


def _demonstration(problem: Problem, rng: random.Random) -> str:
    numbers, target = problem.prompt[:-1].split(">")
    ways = list(_attempts(_numbers(numbers)))
    written = []
    for _ in range(rng.randint(1, ATTEMPTS)):
        way, value = rng.choice(ways)
        written.append(way)
        if value == int(target):
            return ";".join(written) + "#"
    if rng.random() < KNOWN:
        written[-1] = rng.choice([way for way, value in ways if value == int(target)])
    return ";".join(written) + "#"


TASK = Characters(
    "countdown", "0123456789+-*=,>;#", DEFAULTS | {"warm_steps": 1200}, _problems, _demonstration
)
prepare, build = TASK.prepare, TASK.build
