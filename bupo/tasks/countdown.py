"""Countdown: reach a target by adding and subtracting four numbers. A search by trial and error.

For the prompt `2,3,5,8>4=` the response writes attempts, each of which takes all four numbers in
any order, until one reaches the target: `5+8=13-2=11+3=14;8+3=11-5=6-2=4#`. It gets the reward 1 if
its last attempt uses each number once, is worked out right, reaches the target, and is followed by
`#` and nothing else. The warm start imitates demonstrations of up to ATTEMPTS attempts, of which
the last is one that reaches the target with probability KNOWN and otherwise as random as the
others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

from bupo.tasks import hold_out
from bupo.tasks.small_models import DEFAULTS, Characters, Problem

NUMBERS, COUNT = range(1, 13), 4
ATTEMPTS, KNOWN = 3, 0.2


def written(numbers: Sequence[int], signs: Sequence[int]) -> str:
    """Returns an attempt: the numbers, added (1) or subtracted (-1) from left to right."""
    total, text = numbers[0], str(numbers[0])
    for number, sign in zip(numbers[1:], signs[1:]):
        total += sign * number
        text += f"{'+' if sign > 0 else '-'}{number}={total}"
    return text


def extract(response: str) -> str | None:
    """Returns the last attempt, if the response ends after it."""
    if response.count("#") != 1 or not response.endswith("#"):
        return None
    return response[:-1].rpartition(";")[2]


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Returns 1 for each response whose last attempt reaches the target. answers: the prompts."""
    return [float(_is_right(extract(r), a)) for r, a in zip(responses, answers)]


def _is_right(attempt: str | None, prompt: str) -> bool:
    numbers, target = _parts(prompt)
    parts = re.findall(r"([+-]?)(\d+)(?:=-?\d+)?", attempt or "")
    used, signs = [int(number) for _, number in parts], [-1 if s == "-" else 1 for s, _ in parts]
    if sorted(used) != numbers or signs[0] < 0:
        return False
    return attempt == written(used, signs) and attempt.endswith(f"={target}")


def _parts(prompt: str) -> tuple[list[int], int]:
    numbers, target = prompt[:-1].split(">")
    return [int(number) for number in numbers.split(",")], int(target)


def _problems(settings: dict[str, Any]) -> tuple[list[Problem], list[Problem]]:
    problems = []
    for numbers in combinations(NUMBERS, COUNT):
        sums = {sum(x * s for x, s in zip(numbers, signs)) for signs in _signs()}
        for target in sorted(x for x in sums if x > 0):
            prompt = f"{','.join(map(str, numbers))}>{target}="
            problems.append(Problem(prompt, prompt, "countdown"))
    return hold_out(problems, settings)


def _signs() -> list[tuple[int, ...]]:
    """Returns all signs but those that only subtract."""
    return [signs for signs in product((1, -1), repeat=COUNT) if max(signs) > 0]


def _demonstration(problem: Problem, rng: random.Random) -> str:
    numbers, target = _parts(problem.prompt)
    known = [s for s in _signs() if sum(x * one for x, one in zip(numbers, s)) == target]
    attempts: list[str] = []
    for left in reversed(range(rng.randint(1, ATTEMPTS))):
        knows = not left and rng.random() < KNOWN
        signed = list(zip(numbers, rng.choice(known if knows else _signs())))
        while True:
            rng.shuffle(signed)
            if signed[0][1] > 0:
                break
        attempts.append(written(*zip(*signed)))
        if attempts[-1].endswith(f"={target}"):
            break
    return ";".join(attempts) + "#"


TASK = Characters(
    "countdown", "0123456789+-=,>;#", DEFAULTS | {"warm_steps": 1200}, _problems, _demonstration
)
prepare, build = TASK.prepare, TASK.build
