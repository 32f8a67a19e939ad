"""The live line: what runs, how far it is, and when it will be done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from bupo import progress
from bupo.terminal import TERMINAL


class Wait:
    """How far something is that takes more than a moment."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._begin = self._last = time.monotonic()
        self._share = 0.0
        self.told = False
        """Whether a line has been asked for"""

    def done(self, share: float) -> None:
        """This share of it is done."""
        self._share, self._last = share, time.monotonic()

    def line(self) -> str:
        self.told = True
        now = time.monotonic()
        if self._share <= 0:
            taken = int(now - self._begin)
            return f"{self._what} | {taken // 60}:{taken % 60:02d}"
        left = (self._last - self._begin) * (1 - self._share) / self._share
        left = max(0, int(left - (now - self._last)))  # it goes on between two shares
        return f"{self._what}: {self._share:.0%} | ETA {left // 60}:{left % 60:02d}"


class Progress:
    """step | phase | reward | tokens/s | ETA: rewritten in place on a terminal, otherwise a line
    every few seconds."""

    def __init__(self, steps: int, first: int, stream: TextIO | None = None) -> None:
        self._steps, self._first = steps, first
        self._stream: Any = stream or TERMINAL
        self._start = self._shown = time.monotonic()
        self._live = self._stream.isatty()
        self._width = 0

    def step(self, row: dict[str, Any]) -> None:
        now, step = time.monotonic(), row["step"]
        rate = (now - self._start) / max(step - self._first, 1)
        left = int(rate * (self._steps - step))
        phase = f"pi^{row['layer']}" if row["layer"] is not None else "final"
        line = (
            f"step {step}/{self._steps} | {phase} policy | reward {row['reward/mean']:.3f} | "
            f"entropy {row['policy/entropy']:.2f} | {row['tokens_per_second']:,.0f} tokens/s | "
            f"ETA {left // 60}:{left % 60:02d}"
        )
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        elif now - self._shown >= 5 or step in (self._first + 1, self._steps):
            self._stream.write(line + "\n")
            self._shown = now
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Leaves the live line as it stands."""
        if self._live and self._width:
            self._stream.write("\n")
            self._width = 0

    @contextmanager
    def waiting(self, what: str, alive: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Around something that takes more than a moment and that may say by progress.report how
        far it is; alive() is called whenever it does. After 5 seconds a line says how far it is and
        when it will be done or, while that is not known, how long it has taken: on a terminal every
        second, otherwise twice as late each time."""
        wait, over = Wait(what), threading.Event()

        def tell() -> None:
            pause = 5.0
            while not over.wait(pause):
                line = wait.line()
                self._stream.write(("\r" + line.ljust(self._width)) if self._live else line + "\n")
                self._width = max(self._width, len(line))
                self._stream.flush()
                pause = 1.0 if self._live else 2 * pause

        def watcher(done: float) -> None:
            alive()
            wait.done(done)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            with progress.watched_by(watcher):
                yield
        finally:
            over.set()
            thread.join()
            if wait.told:
                self._clear()

    def _clear(self) -> None:
        """Makes room where the live line stands."""
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
