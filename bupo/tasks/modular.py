"""Arithmetic modulo 11 with several operands and written steps, with prompts of more operands in
the evaluation than in training.

The prompt `3*9+5-8=` is worked out from left to right: `3*9=5;5+5=10;10-8=2#2`. The warm start
imitates demonstrations in which each step is wrong with probability NOISE. The reward reads the
number after the last `#`. Held-out problems with as many operands as those for training are the
data source `modular`, longer ones `modular_longer`.
"""

from __future__ import annotations

import random
from typing import Any

from bupo.config import ConfigError
from bupo.tasks import arithmetic
from bupo.tasks.small_models import DEFAULTS, Characters, Problem

MODULUS = 11
OPERATIONS = {
    "+": lambda a, b: (a + b) % MODULUS,
    "-": lambda a, b: (a - b) % MODULUS,
    "*": lambda a, b: a * b % MODULUS,
}
NOISE = 0.25
OPERANDS, LONGER = (3, 4), (5, 6)
"""Numbers of operands of the problems for training, and of the longer ones"""
PROBLEMS = 8000
reward, extract = arithmetic.reward, arithmetic.extract


def _problem(rng: random.Random, operands: tuple[int, int], source: str) -> Problem:
    value = rng.randrange(MODULUS)
    prompt = str(value)
    for _ in range(rng.randint(*operands) - 1):
        sign, operand = rng.choice(list(OPERATIONS)), rng.randrange(MODULUS)
        value = OPERATIONS[sign](value, operand)
        prompt += f"{sign}{operand}"
    return Problem(f"{prompt}=", str(value), source)


def _distinct(
    rng: random.Random, operands: tuple[int, int], source: str, number: int
) -> list[Problem]:
    found: dict[str, Problem] = {}
    while len(found) < number:
        one = _problem(rng, operands, source)
        found[one.prompt] = one
    return list(found.values())


def _problems(settings: dict[str, Any]) -> tuple[list[Problem], list[Problem]]:
    rng, held_out = random.Random(settings["seed"]), settings["eval_problems"]
    if held_out > PROBLEMS:
        raise ConfigError(
            f"task_options.eval_problems must be at most {PROBLEMS} of each kind, got {held_out}"
        )
    known = _distinct(rng, OPERANDS, "modular", PROBLEMS + held_out)
    longer = _distinct(rng, LONGER, "modular_longer", held_out)
    return known[held_out:], [*known[:held_out], *longer]


def _demonstration(problem: Problem, rng: random.Random) -> str:
    value: int | None = None
    steps, sign, number = [], "", ""
    for symbol in problem.prompt:
        if symbol.isdigit():
            number += symbol
            continue
        operand, number = int(number), ""
        if value is None:
            value = operand
        else:
            wrong = rng.random() < NOISE
            right = OPERATIONS[sign](value, operand)
            result = (right + rng.randrange(1, MODULUS)) % MODULUS if wrong else right
            steps.append(f"{value}{sign}{operand}={result}")
            value = result
        sign = symbol
    return f"{';'.join(steps)}#{value}"


TASK = Characters(
    "modular", "0123456789+-*=;#", DEFAULTS | {"warm_steps": 1200}, _problems, _demonstration
)
prepare, build = TASK.prepare, TASK.build
