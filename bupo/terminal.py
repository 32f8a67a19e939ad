"""Keeps bupo's lines on the terminal apart from other libraries' output, which goes to a file.

vLLM, triton and their C++ parts print to standard output and error in many ways. Therefore, both
descriptors lead to a log file inside `library_output`, and `TERMINAL` still reaches the terminal.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO


class _Terminal(io.TextIOBase):
    """Standard error, as it was before any redirection."""

    muted = False
    """Whether nothing is printed, because another rank speaks for this one"""
    aside: TextIO | None = None
    """The stream that reaches it while libraries' output is redirected"""
    above: Callable[[str], object] | None = None
    """Prints a line above the live display, while there is one"""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while `aside` is used or changed, because a live display has a thread of its own"""

    def write(self, text: str) -> int:
        if self.muted:
            return len(text)
        with self.lock, self._if_someone_listens(stream := self.aside or sys.stderr):
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.lock, self._if_someone_listens(stream := self.aside or sys.stderr):
            stream.flush()

    @contextmanager
    def _if_someone_listens(self, stream: TextIO) -> Iterator[None]:
        """Keeps a closed terminal from ending a run: from then on, its output is dropped."""
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)

    def isatty(self) -> bool:
        return (self.aside or sys.stderr).isatty()


class _Log(io.TextIOBase):
    """Appends to the file of the active `library_output`, and drops text when none is active,
    because loggers that a library sets up inside keep this object forever."""

    descriptor: int | None = None

    def write(self, text: str) -> int:
        if self.descriptor is not None:
            os.write(self.descriptor, text.encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        if self.descriptor is None:
            raise io.UnsupportedOperation("no file is open")
        return self.descriptor


TERMINAL, _LOG = _Terminal(), _Log()


def printable(text: str) -> str:
    """Returns the text with line breaks and terminal control codes, which data and names may hold,
    as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Prints a line on TERMINAL that stays there, also while a live display is drawn."""
    if TERMINAL.above is not None:
        TERMINAL.above(text)
    else:
        print(text, file=TERMINAL, flush=True)


@contextmanager
def library_output(file: Path | None) -> Iterator[None]:
    """Inside the context, standard output and error of this process and of its children are
    appended to a file, or dropped without one; TERMINAL still leads to the previous standard error.
    Contexts may be nested: only the outermost has an effect. Only one thread may enter it."""
    if TERMINAL.aside is not None:
        yield
        return
    target = os.open(file or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    ours = _leads_to(sys.stderr, 2)  # false if a test or a notebook has replaced it
    aside = os.fdopen(os.dup(2), "w", buffering=1) if ours else sys.stderr
    with TERMINAL.lock:
        TERMINAL.aside = aside
    _LOG.descriptor = target
    try:
        for descriptor in (1, 2):
            os.dup2(target, descriptor)
        with redirect_stdout(_LOG), redirect_stderr(_LOG), warnings.catch_warnings():
            yield
    finally:
        for descriptor, saved in zip((1, 2), before):
            os.dup2(saved, descriptor)
            os.close(saved)
        _LOG.descriptor = None
        os.close(target)
        with TERMINAL.lock:
            TERMINAL.aside = None
        if ours:
            aside.close()


def _leads_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False
