"""The live line: what runs, how far it is, and when it will be done."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Progress:
    """step | phase | reward | tokens/s | ETA: rewritten in place on a terminal, otherwise a line
    every few seconds."""

    def __init__(self, steps: int, first: int, stream: TextIO | None = None) -> None:
        self._steps, self._first = steps, first
        self._stream = stream or sys.stderr
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
    def waiting(self, what: str) -> Iterator[Callable[[float], None]]:
        """Announces something that takes more than a moment; call the yielded function with the
        share done. On a terminal its line is kept up to date, otherwise lines come twice as late
        each time."""
        begin = shown = time.monotonic()
        pause, written = (0.2 if self._live else 5.0), False

        def done(share: float) -> None:
            nonlocal shown, pause, written
            now = time.monotonic()
            if now - shown < pause or share <= 0 or now - begin < 5:
                return  # what is over at once is not worth a line
            shown, written = now, True
            pause *= 1 if self._live else 2
            left = int((now - begin) * (1 - share) / share)
            line = f"{what}: {share:.0%} | ETA {left // 60}:{left % 60:02d}"
            self._stream.write(("\r" + line.ljust(self._width)) if self._live else line + "\n")
            self._width = max(self._width, len(line))
            self._stream.flush()

        yield done
        if written:
            self._clear()

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Announces something of which no share is known; after 5 seconds says how long it has
        taken, on a terminal every second, otherwise twice as late each time."""
        begin, done = time.monotonic(), threading.Event()

        def tell() -> None:
            pause = 5.0
            while not done.wait(pause):
                seconds = int(time.monotonic() - begin)
                line = f"{what} | {seconds // 60}:{seconds % 60:02d}"
                self._stream.write(("\r" + line.ljust(self._width)) if self._live else line + "\n")
                self._width = max(self._width, len(line))
                self._stream.flush()
                pause = 1.0 if self._live else 2 * pause

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._clear()

    def _clear(self) -> None:
        """Makes room where the live line stands."""
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
