"""Handles Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
from types import FrameType

from bupo.terminal import say


class StopRequest:
    """Ctrl-C and SIGTERM request a stop between stages. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        say("stopping: saving a checkpoint first")

    def __call__(self) -> bool:
        return self.signal is not None

    def release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
