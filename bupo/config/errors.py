"""What is wrong with a setting, in one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for the user."""


class RunError(RuntimeError):
    """Ends a run with one line; what could be saved is saved."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} must be one of {', '.join(choices)}, got {value!r}")
