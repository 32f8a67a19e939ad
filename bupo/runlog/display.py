"""Shows what is running, how far it is and when it will end: live on a terminal, else in lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from bupo import progress
from bupo.terminal import TERMINAL


class Display:
    """Shows the steps of a run, and pieces of work that take more than a moment.

    On a terminal, rich.progress draws one line for the steps and one for the work in progress.
    Elsewhere (a log file, a pipe), a line is written every few seconds.
    """

    def __init__(self, steps: int = 1, first: int = 0, stream: TextIO | None = None) -> None:
        """steps: the number of steps of the run. first: the number of steps done before."""
        self._steps, self._first = steps, first
        self._stream = cast(TextIO, TERMINAL) if stream is None else stream
        self._wait, self._shown = Wait("steps"), time.monotonic()
        self._bar = _bar(self._stream) if self._stream.isatty() else None
        self._task: TaskID | None = None
        self._line = ""

    def step(self, row: dict[str, Any]) -> None:
        """Shows that a step is done. row: its row of metrics.jsonl."""
        now, step = time.monotonic(), row["step"]
        policy = f"pi^{row['layer']}" if row["layer"] is not None else "final"
        self._line = (
            f"step {step}/{self._steps} | {policy} policy | reward {row['reward/mean']:.3f} | "
            f"entropy {row['policy/entropy']:.2f} | {row['tokens_per_second']:,.0f} tokens/s"
        )
        # Earlier steps are not counted: they would distort the remaining time.
        done = (step - self._first) / max(self._steps - self._first, 1)
        self._wait.done(done)
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=1.0, wait=self._wait)
                self._draw()
            self._bar.update(self._task, description=self._line, completed=done)
        elif now - self._shown >= 5 or step in (self._first + 1, self._steps):
            self._write(f"{self._line} | {self._wait.time()}")
            self._shown = now

    def say(self, text: str) -> None:
        """Prints a line that stays on the terminal."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(text)

    def end(self) -> None:
        """Ends the live display; the line of the last step stays."""
        if self._bar is not None and self._task is not None:
            self._undraw()
            self._task = None
            self._write(self._line)

    @contextmanager
    def waiting(self, what: str, alive: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Wraps work that takes more than a moment and may call progress.report; alive() is called
        at each report. In a log, the first line about it comes after 5 seconds; each pause is twice
        as long as the one before."""
        show = self._on_terminal if self._bar is not None else self._in_lines
        with show(what) as done:

            def watcher(fraction: float) -> None:
                alive()
                done(fraction)

            with progress.watched_by(watcher):
                yield

    @contextmanager
    def _on_terminal(self, what: str) -> Iterator[Callable[[float], object]]:
        assert self._bar is not None
        bar, wait = self._bar, Wait(what)
        task = bar.add_task(what, total=None, wait=wait)

        def done(fraction: float) -> None:
            wait.done(fraction)
            bar.update(task, completed=fraction, total=1.0)

        self._draw()
        try:
            yield done
        finally:
            bar.remove_task(task)
            if not bar.tasks:
                self._undraw()

    def _draw(self) -> None:
        assert self._bar is not None
        TERMINAL.above = self.say
        self._bar.start()

    def _undraw(self) -> None:
        assert self._bar is not None
        TERMINAL.above = None
        self._bar.stop()

    @contextmanager
    def _in_lines(self, what: str) -> Iterator[Callable[[float], object]]:
        wait, over = Wait(what), threading.Event()

        def tell() -> None:
            pause = 5.0
            while not over.wait(pause):
                self._write(wait.line())
                pause *= 2

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield wait.done
        finally:
            over.set()
            thread.join()

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def _bar(stream: TextIO) -> Progress:
    text = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=text),
        BarColumn(16),
        _TimeColumn(),
        console=Console(file=stream, force_terminal=True),
        expand=True,
        transient=True,
        redirect_stdout=False,  # TERMINAL writes to standard error, which would come back here
        redirect_stderr=False,
    )


class _TimeColumn(ProgressColumn):
    """The same time as in a log. rich's own estimate forgets what is older than 30 seconds."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["wait"].time())


class Wait:
    """Estimates how long some work still takes."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._begin = self._last = time.monotonic()
        self._fraction = 0.0

    def done(self, fraction: float) -> None:
        """Records that this fraction of the work is done."""
        self._fraction, self._last = fraction, time.monotonic()

    def line(self) -> str:
        """Returns what is done, how much of it if that is known, and its time."""
        share = f": {self._fraction:.0%}" if self._fraction > 0 else ""
        return f"{self._what}{share} | {self.time()}"

    def time(self) -> str:
        """Returns the time left or, before any report, the time elapsed."""
        now = time.monotonic()
        if self._fraction <= 0:
            return _minutes(now - self._begin)
        expected = (self._last - self._begin) / self._fraction
        return f"ETA {_minutes(max(0.0, expected - (now - self._begin)))}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
