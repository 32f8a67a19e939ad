"""Names a stage that hangs, and shows where every thread is."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bupo import ranks
from bupo.terminal import say

FILE = "stalls.txt"


class Watchdog:
    """Watches the stages of a run. Each may take `seconds` without progress; 0 switches this off.

    A stage that takes longer is named on the terminal and in stalls.txt of the run directory, which
    also gets the stacks of all threads. Nothing is ended unless `kill` is set, so a stage that was
    only slow goes on. The stacks are written by faulthandler's own thread, which does not need
    Python's locks and thus also catches a reward that computes 9**9**9. It needs a file that is
    open before anything goes wrong: a hidden one or, with `kill`, stalls.txt itself, because then
    no Python code can run afterwards.
    """

    def __init__(self, run: Path, seconds: float, kill: bool = False) -> None:
        name = FILE if ranks.is_first() else f"rank_{ranks.rank()}_{FILE}"
        self._path, self._seconds, self._kill = run / name, seconds, kill
        self._armed = self._path if kill else run / f".{name}"
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
                    self._collect()  # stacks of a process that was killed while it hung
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Watches one stage. name: its full name (`step 3, stage rollout`)."""
        outer, self._stage = self._stage, name
        self._restart()
        try:
            yield
        finally:
            self._stage = outer
            self._restart()

    def alive(self) -> None:
        """Records that the stage has made progress, which restarts its time limit. Cheap enough to
        be called for every token: calls within a second of the last restart do nothing."""
        if self._told or time.monotonic() - self._alive > min(1.0, self._seconds / 10):
            self._restart()

    def _restart(self) -> None:
        """Restarts the time limit of the stage, or ends it if there is none."""
        if not self._seconds:
            return
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # others report a full disk
            self._collect(begin=True)
        self._told = True
        if self._stage:
            self._alive, self._told = time.monotonic(), False
            # With `kill`, leave a second to print the line on the terminal before the end.
            delay = self._seconds + (1.0 if self._kill else 0.0)
            faulthandler.dump_traceback_later(delay, exit=self._kill, file=self._file)

    def _collect(self, begin: bool = False) -> None:
        """Moves the stacks written since the last call to stalls.txt. begin: then names the stage
        anew, as the header of the next stacks."""
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
                text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {self._stage} began or advanced"
                text += f"; it has made no further progress for {self._seconds:g} s:\n"
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
            say(
                f"{self._stage} has made no progress for {self._seconds:g} s; the stacks of "
                f"all threads are in {self._path}"
            )

    def close(self) -> None:
        """Stops watching, and removes the file if it is empty."""
        if self._seconds and not self._closed.is_set():
            self._stage = ""
            self._restart()
            self._closed.set()
            self._file.close()
            if self._start == 0:
                self._armed.unlink(missing_ok=True)
