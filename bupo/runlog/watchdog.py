"""Names a stage that hangs and shows where every thread stands."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bupo.terminal import TERMINAL

FILE = "stalls.txt"


class Watchdog:
    """Watches the stages of a run, each for `seconds` without progress; 0 watches nothing.

    A stage that takes longer is named on the terminal and in stalls.txt of the run directory, there
    with the stacks of all threads. Nothing is ended unless `kill` is set, so one that was only slow
    goes on. The stacks are written by faulthandler's own thread, which waits for no lock of
    Python's: a reward that computes 9**9**9 is caught too. It needs an open file before anything
    is wrong, a hidden one; with `kill` stalls.txt itself, for then no Python may run afterwards.
    """

    def __init__(self, run: Path, seconds: float, kill: bool = False) -> None:
        self._path, self._seconds, self._kill = run / FILE, seconds, kill
        self._armed = self._path if kill else run / f".{FILE}"
        self._stage = ""
        self._alive = 0.0
        self._told = True
        self._closed = threading.Event()
        self._lock = threading.Lock()
        if seconds:
            self._file = self._armed.open("ab", buffering=0)
            self._start = self._header = os.fstat(self._file.fileno()).st_size
            if not kill:
                self._start = self._header = 0
                if b"most recent call" in self._armed.read_bytes():
                    self._collect()  # of a process that was killed while it hung
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
        with contextlib.suppress(OSError):  # a full disk is not for the watchdog to report
            self._collect(begin=True)
        self._told = True
        if self._stage:
            self._alive, self._told = time.monotonic(), False
            # A second for the line on the terminal, where there is an end to come
            delay = self._seconds + (1.0 if self._kill else 0.0)
            faulthandler.dump_traceback_later(delay, exit=self._kill, file=self._file)

    def _collect(self, begin: bool = False) -> None:
        """Stacks that were written since go to stalls.txt; begin: then names the stage anew, for
        the next ones."""
        with self._lock:
            file = self._file.fileno()
            size = os.fstat(file).st_size
            if size > self._header and self._kill:
                self._start = size
            elif size > self._header:
                with self._path.open("ab") as stalls, self._armed.open("rb") as armed:
                    stalls.write(armed.read())
                os.ftruncate(file, 0)
                self._header = 0
            if not begin:
                return
            os.ftruncate(file, self._start)
            self._header = self._start
            if self._stage:
                text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {self._stage} has begun or got ahead"
                text += f"; it has got no further for {self._seconds:g} s:\n"
                if self._kill:
                    text = text.replace("it has", "the process is ended if it has")
                self._header += os.write(file, text.encode())

    def _watch(self) -> None:
        while not self._closed.wait(min(self._seconds / 10, 1.0)):
            if self._told or time.monotonic() - self._alive < self._seconds + 0.1:
                continue
            self._told = True
            with contextlib.suppress(OSError):
                self._collect()
            print(
                f"\n{self._stage} has got no further for {self._seconds:g} s; the stacks of "
                f"all threads are in {self._path}",
                file=TERMINAL,
                flush=True,
            )

    def close(self) -> None:
        """Watches no longer; leaves no empty file."""
        if self._seconds and not self._closed.is_set():
            self._stage = ""
            self.alive()
            self._closed.set()
            self._file.close()
            if self._start == 0:
                self._armed.unlink(missing_ok=True)
