"""Limits of a setting, declared beside its default and checked when its group is built."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from bupo.config.errors import one_of, require


@dataclass(frozen=True)
class Limits:
    """What a value may be. null has no limits; in a list or a mapping, every element has them."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    finite: bool = True
    """Whether infinity, which switches a clip off, is refused"""

    def check(self, key: str, value: Any, or_null: str = "") -> None:
        """Raises ConfigError, which names the key, what was expected, and what came."""
        if isinstance(value, dict):
            for name, each in value.items():
                self.check(f"{key}.{name}", each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                self.check(key, each)
        elif self.choices:
            one_of(key, value, self.choices)
        elif value is not None:
            if self.finite and isinstance(value, float):
                require(math.isfinite(value), f"{key} must be finite, got {value}")
            expected = self._expectation() + or_null
            require(self._allows(value), f"{key} must be {expected}, got {value}")

    def _allows(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def _expectation(self) -> str:
        least = self.above if self.at_least is None else self.at_least
        most = self.below if self.at_most is None else self.at_most
        if most is None:
            return f"at least {least}" if self.above is None else f"greater than {least}"
        left, right = "[("[self.at_least is None], "])"[self.at_most is None]
        return f"in {left}{least}, {most}{right}"


def setting(default: Any, **limits: Any) -> Any:
    """A field with this default and these Limits."""
    metadata = {"limits": Limits(**limits)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Group:
    """Base of a group of settings: checks the limits of its fields."""

    prefix: ClassVar[str] = ""
    """What stands before the names of its fields, such as `rollout.`"""

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls.prefix = prefix

    def __post_init__(self) -> None:
        for f in fields(self):
            if "limits" in f.metadata:
                or_null = " or null" if "None" in str(f.type) else ""
                f.metadata["limits"].check(self.prefix + f.name, getattr(self, f.name), or_null)
