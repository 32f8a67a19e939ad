"""Resident memory of this process, by /proc: Linux only."""

from __future__ import annotations

from pathlib import Path


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


class PeakMemory:
    """MiB of the highest moment since reset() above those at start()."""

    def start(self) -> None:
        self._before = _status("VmRSS")
        self.reset()

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS

    def peak(self) -> float:
        return _status("VmHWM") - self._before
