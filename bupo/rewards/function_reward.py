"""A reward that calls a function of the user."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bupo.config import ConfigError
from bupo.types import Grades, Rollout

SHORT = {"math": "bupo.rewards.mathematics:reward", "strict": "bupo.rewards.boxed:strict"}
"""The functions that have a short name"""


@dataclass(frozen=True)
class GradingFunction:
    """A function that reward.function names. Its module may also have `extract(response)`, for
    majority votes; `KILLABLE = True`, to be called in processes that are killed at a deadline; and,
    for these, `load()`, which is called first and has no deadline, and `GOLDEN`, which lists
    (response, answer, reward) and is checked before anything else."""

    name: str
    place: str
    """module:function"""
    module: ModuleType
    call: Callable[[list[str], list[str]], Sequence[float | None]]

    @property
    def killable(self) -> bool:
        return bool(getattr(self.module, "KILLABLE", False))

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        """Returns the extracted answers, or None if the module extracts none."""
        extract: Callable[[str], str | None] | None = getattr(self.module, "extract", None)
        return None if extract is None else [extract(r.text) for r in rollouts]


def find(name: str) -> GradingFunction:
    """Raises ConfigError if there is no such function, or if it takes other arguments."""
    place = SHORT.get(name, name)
    module_name, _, attribute = place.partition(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward.function={name} cannot be loaded: {error}") from None
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise ConfigError(
            f"reward.function={name} must take (responses: list[str], answers: list[str]): {error}"
        ) from None
    return GradingFunction(name, place, module, function)


class FunctionReward:
    """Calls module:function on the whole batch, in this process."""

    def __init__(self, function: GradingFunction) -> None:
        self._function, self._name = function, function.name

    def __call__(self, rollouts: Sequence[Rollout]) -> Grades:
        rewards: list[float] = []
        failures: list[str] = []
        for given in self._rewards([r.text for r in rollouts], [r.prompt.answer for r in rollouts]):
            try:
                rewards.append(float(given))
            except (TypeError, ValueError):  # None, or not a number
                rewards.append(math.nan)
            if not math.isfinite(rewards[-1]):
                failures.append(f"reward.function={self._name} returned {given!r}")
        return Grades(rewards, errors=len(failures), first_failure=failures[0] if failures else "")

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        return self._function.answers(rollouts)

    def _rewards(self, responses: list[str], answers: list[str]) -> list[Any]:
        rewards = list(self._function.call(responses, answers))
        if len(rewards) != len(responses):
            raise ValueError(
                f"reward.function={self._name} returned {len(rewards)} rewards for "
                f"{len(responses)} responses"
            )
        return rewards

    def close(self) -> None:
        """Does nothing, since there is nothing to close."""
