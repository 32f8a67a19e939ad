"""Errors about settings and files, each with a message of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """Raised for a configuration that cannot be run. The message is one line for the user."""


class BrokenError(ConfigError):
    """Raised for files that exist, but are damaged or do not belong to what is read."""


class RunError(RuntimeError):
    """Ends a run with a message of one line, after everything that can be saved has been saved."""


class AgreedError(RunError):
    """Raised on all ranks at the same place, so that they can still save their state together."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} must be one of {', '.join(choices)}, got {value!r}")


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, with the next one if it ends in a colon, or
    the exception's type if there is no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Inside, an OSError or UnicodeDecodeError from reading a user's file becomes a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror or first_line(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text: {first_line(error)}") from None
