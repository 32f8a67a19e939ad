"""Shows a running step to people and supervisors, and lets them stop it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from bupo import ranks
from bupo.config import Config
from bupo.runlog.display import Display
from bupo.runlog.stop import StopRequest
from bupo.runlog.watchdog import Watchdog


class Stopwatch:
    """Measures the seconds that each stage of a step takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.of_ranks = [0.0] * ranks.world()
        """Seconds that each rank took to generate its responses"""
        self._start = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin

    def total(self) -> float:
        return time.monotonic() - self._start

    def rank_metrics(self, tokens: int) -> dict[str, float]:
        """Returns the metrics of several ranks, or none in a single process. Updates keep all ranks
        together, so only generation shows which one is slow. tokens: number of generated tokens."""
        if len(self.of_ranks) == 1:
            return {}
        slowest = max(self.of_ranks)
        return {
            "ranks/tokens_per_second": tokens / self.total() / len(self.of_ranks),
            "ranks/slowest": self.of_ranks.index(slowest),
            "ranks/rollout_max": slowest,
            "ranks/rollout_min": min(self.of_ranks),
        }


class Stopped(Exception):
    """Raised to abandon a step before it has changed the state of the run."""


class Monitor:
    """Combines the progress on the terminal, the watchdog and the request to stop."""

    def __init__(self, config: Config, out: Path, start: int) -> None:
        self._steps = config.steps
        self._watchdog = Watchdog(out, config.watchdog.seconds, config.watchdog.kill)
        self.display = Display(config.steps, start)
        self.stop = StopRequest()
        self._between = ExitStack()
        if ranks.world() > 1:  # another rank may hang while this one waits between its stages
            self._between.enter_context(self._watchdog.stage("waiting between stages"))

    @contextmanager
    def stage(self, name: str, step: int, watch: Stopwatch | None = None) -> Iterator[None]:
        """Wraps a stage: times it, watches it, and shows its progress if it takes long."""
        shown = f"step {step}/{self._steps}, {name}"
        timed = watch.stage(name) if watch else nullcontext()
        with timed, self.watched(f"step {step}, stage {name}", shown):
            yield

    @contextmanager
    def watched(self, name: str, shown: str) -> Iterator[None]:
        """name: the name for the watchdog. shown: the text for the terminal."""
        with self._watchdog.stage(name), self.display.waiting(shown, self._watchdog.alive):
            try:
                yield
            except Exception as error:
                error.add_note(name)
                raise

    def stopping(self) -> bool:
        """Returns whether a stop was requested, on any rank."""
        return ranks.any_of(self.stop())

    def check_stop(self) -> None:
        """Raises Stopped if a stop was requested, on any rank."""
        if self.stopping():
            raise Stopped

    def release(self) -> None:
        self._between.close()
        self.stop.release()
        if ranks.world() > 1:
            # If a rank has ended, torchrun sends this to the others, which still have to say why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.display.end()
        self._watchdog.close()
