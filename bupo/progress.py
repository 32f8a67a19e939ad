"""The progress of a piece of work: the work reports it, and whoever watches shows it.

This works like logging, so that no function needs a parameter for it: long work calls report(), and
a command that wants to show it wraps it in watched_by(). Without a watcher, nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Watcher = Callable[[float], object]
"""Called with the fraction of the work that is done, from 0 to 1"""


def _nobody(done: float) -> None:
    """Ignores the report, because nobody watches."""


_watcher: ContextVar[Watcher] = ContextVar("watcher", default=_nobody)


def report(done: float) -> None:
    """Reports that this fraction of the work, from 0 to 1, is done."""
    _watcher.get()(done)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Inside the context, report(done) calls watcher(done)."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def part(first: float, last: float) -> Iterator[None]:
    """Inside the context, reports from 0 to 1 stand for this part of the surrounding work."""
    outer = _watcher.get()
    with watched_by(lambda done: outer(first + (last - first) * done)):
        yield


def parts(number: int) -> Iterator[AbstractContextManager[None]]:
    """Yields a part() of equal length for each of `number` pieces of the surrounding work."""
    for done in range(number):
        yield part(done / number, (done + 1) / number)
