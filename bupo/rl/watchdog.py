"""Names a stage that hangs and shows where every thread stands."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "stalls.txt"


class Watchdog:
    """Watches the stages of a run, each for `seconds` without progress; 0 watches nothing.

    A stage that takes longer is named on the terminal and in stalls.txt of the run directory, there
    with the stacks of all threads. Nothing is ended unless `kill` is set, so one that was only slow
    goes on. The stacks are written by faulthandler's own thread, which waits for no lock of
    Python's: a reward that computes 9**9**9 is caught too.
    """

    def __init__(self, run: Path, seconds: float, kill: bool = False) -> None:
        self._path, self._seconds, self._kill = run / FILE, seconds, kill
        self._stage = ""
        self._alive = 0.0
        self._told = True
        self._closed = threading.Event()
        if seconds:
            self._file = self._path.open("ab", buffering=0)
            self._kept = os.fstat(self._file.fileno()).st_size
            self._header = self._kept
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage, named in full (`step 3, rollout`)."""
        outer, self._stage = self._stage, name
        self.alive()
        try:
            yield
        finally:
            self._stage = outer
            self.alive()

    def alive(self) -> None:
        """The stage has got ahead; its time begins again."""
        if not self._seconds:
            return
        faulthandler.cancel_dump_traceback_later()
        self._told = True
        with contextlib.suppress(OSError):  # a full disk is not for the watchdog to report
            file = self._file.fileno()
            size = os.fstat(file).st_size
            if size > self._header:  # stacks were written
                self._kept = size
            os.ftruncate(file, self._kept)
            self._header = self._kept
            if self._stage:
                # Written now: when it is needed, no Python may run.
                text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {self._stage} has begun or got ahead"
                end = ", so the process is ended" if self._kill else ""
                text += f"; {self._seconds:g} s later it has got no further{end}\n"
                self._header += os.write(file, text.encode())
        if self._stage:
            self._alive, self._told = time.monotonic(), False
            # A second for the line on the terminal, where there is an end to come
            delay = self._seconds + (1.0 if self._kill else 0.0)
            faulthandler.dump_traceback_later(delay, exit=self._kill, file=self._file)

    def _watch(self) -> None:
        while not self._closed.wait(min(self._seconds / 10, 1.0)):
            if not self._told and time.monotonic() - self._alive >= self._seconds:
                self._told = True
                print(
                    f"\n{self._stage} has got no further for {self._seconds:g} s; the stacks of "
                    f"all threads are in {self._path}",
                    file=sys.stderr,
                    flush=True,
                )

    def close(self) -> None:
        """Watches no longer; leaves no empty file."""
        if self._seconds and not self._closed.is_set():
            self._stage = ""
            self.alive()
            self._closed.set()
            self._file.close()
            if self._kept == 0:
                self._path.unlink(missing_ok=True)
