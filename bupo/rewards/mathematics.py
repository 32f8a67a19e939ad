r"""Grades mathematical answers with Math-Verify (reward.function=math): 1 if the last \boxed{}
equals the ground truth, else 0."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from bupo.rewards import boxed

KILLABLE = True
GOLDEN = [
    ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1.0),
    ("\\boxed{3} no, \\boxed{4}", "4", 1.0),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
    ("\\boxed{5}", "6", 0.0),
    ("the answer is 5", "5", 0.0),
]
extract = boxed.extract


def load() -> None:
    """Imports what takes long to import, before the first deadline."""
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns on every call


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Returns 1 for each response whose last boxed answer equals the ground truth, as a string or
    by Math-Verify, else 0."""
    return [grade(response, answer) for response, answer in zip(responses, answers)]


def grade(response: str, answer: str) -> float:
    """Returns 1.0 if the last boxed answer equals the ground truth as a string or by Math-Verify,
    else 0.0."""
    given = boxed.last_boxed(response)
    if given is None:
        return 0.0
    if "".join(given.split()) == "".join(answer.split()):
        return 1.0
    from math_verify import parse, verify

    # No timeouts here: the caller kills this process at its deadline.
    truth = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    guess = parse(f"\\boxed{{{given}}}", parsing_timeout=None)
    return float(verify(truth, guess, timeout_seconds=None))
