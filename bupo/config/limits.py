"""Limits of a setting, declared beside its default and checked when its group is built."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from bupo.config.errors import one_of, require

_COMPARISONS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def setting(default: Any, **limits: Any) -> Any:
    """A field with this default and its limits: at_least, above, at_most, below, or choices.

    They hold for every element of a list or a mapping, and not for null. Only a field with at_most
    may be infinite.
    """
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=limits)
    return field(default=default, metadata=limits)


@dataclass
class Group:
    """Base of a group of settings, which checks the limits of its fields."""

    prefix: ClassVar[str] = ""
    """What stands before the names of its fields, such as `rollout.`"""

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls.prefix = prefix

    def __post_init__(self) -> None:
        """Raises ConfigError, which names the key, what was expected, and what came."""
        for f in fields(self):
            limits = dict(f.metadata)
            choices = limits.pop("choices", ())
            expected = " and ".join(f"{name.replace('_', ' ')} {x}" for name, x in limits.items())
            expected += " or null" * ("None" in str(f.type))
            for key, value in _elements(self.prefix + f.name, getattr(self, f.name)):
                if choices:
                    one_of(key, value, choices)
                elif limits and value is not None:
                    infinite = isinstance(value, float) and not math.isfinite(value)
                    allowed = not infinite or "at_most" in limits
                    require(allowed, f"{key} must be finite, got {value}")
                    right = all(_COMPARISONS[name](value, x) for name, x in limits.items())
                    require(right, f"{key} must be {expected}, got {value}")


def _elements(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    """A value, or each element of a list or a mapping, with its key."""
    if isinstance(value, dict):
        return ((f"{key}.{name}", each) for name, each in value.items())
    return ((key, each) for each in (value if isinstance(value, (list, tuple)) else [value]))
