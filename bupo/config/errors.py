"""What is wrong with a setting, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for the user."""


class BrokenError(ConfigError):
    """Files that are there, but damaged or of something else."""


class RunError(RuntimeError):
    """Ends a run with one line; what could be saved is saved."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} must be one of {', '.join(choices)}, got {value!r}")


def first_line(error: BaseException) -> str:
    """What an exception says, or its kind where it says nothing; a line that ends in a colon goes
    on."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Around what reads a place of the user's: ConfigError where the system does not let us."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror or first_line(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text: {first_line(error)}") from None
