"""How far a piece of work is: told by whoever does it, shown by whoever watches.

Works like logging, so that no function needs a parameter for it: long work calls report(), and a
command that wants to show it puts watched_by() around. Without a watcher nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watcher = Callable[[float], object]
"""Called with the fraction of the work that is done, 0 to 1"""


def _nobody(done: float) -> None:
    """Nobody watches."""


_watcher: ContextVar[Watcher] = ContextVar("watcher", default=_nobody)


def report(done: float) -> None:
    """This fraction of the work, 0 to 1, is done."""
    _watcher.get()(done)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Inside, report(done) calls watcher(done)."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def part(first: float, last: float) -> Iterator[None]:
    """Inside, work from report(0) to report(1) is this part of the work around it."""
    outer = _watcher.get()
    with watched_by(lambda done: outer(first + (last - first) * done)):
        yield
