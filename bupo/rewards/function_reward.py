"""A reward that calls a function of the user."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from bupo.config import ConfigError
from bupo.types import Grades, Rollout

STRICT = "bupo.rewards.boxed:strict"
"""The function that reward.function=strict stands for"""


class FunctionReward:
    """Calls the user's module:function on the whole batch."""

    def __init__(self, name: str) -> None:
        place = STRICT if name == "strict" else name
        module, _, attribute = place.partition(":")
        try:
            self._function: Callable[[list[str], list[str]], Sequence[float | None]] = getattr(
                importlib.import_module(module), attribute
            )
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"reward.function={name} cannot be loaded: {error}") from None
        self._name = name
        self._extract: Callable[[str], str | None] | None = getattr(
            importlib.import_module(module), "extract", None
        )
        try:
            inspect.signature(self._function).bind([], [])
        except TypeError as error:
            raise ConfigError(
                f"reward.function={name} must take (responses: list[str], answers: list[str]): "
                f"{error}"
            ) from None

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
        return None if self._extract is None else [self._extract(r.text) for r in rollouts]

    def _rewards(self, responses: list[str], answers: list[str]) -> list[Any]:
        rewards = list(self._function(responses, answers))
        if len(rewards) != len(responses):
            raise ValueError(
                f"reward.function={self._name} returned {len(rewards)} rewards for "
                f"{len(responses)} responses"
            )
        return rewards

    def close(self) -> None:
        """Does nothing, since there is nothing to close."""
