"""Grades mathematical answers with Math-Verify, in processes that are killed at a deadline."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from queue import SimpleQueue
from typing import Any

from bupo import progress
from bupo.config import ConfigError, RewardConfig
from bupo.rewards import boxed
from bupo.types import Grades, Rollout

GOLDEN = [
    ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1.0),
    ("\\boxed{3} no, \\boxed{4}", "4", 1.0),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
    ("\\boxed{5}", "6", 0.0),
    ("the answer is 5", "5", 0.0),
]
"""Response, answer and known reward; if one is graded wrong, the installation is broken."""


class _Worker:
    """A process of bupo.rewards.math_worker, which is restarted after each kill."""

    grading: str | None = None
    """The answer that is being graded"""

    def __init__(self) -> None:
        self._ended, self._lock = False, threading.Lock()
        self._start()

    def _start(self) -> None:
        with self._lock:  # so that none starts once end() has killed the last one
            if self._ended:
                return
            self.process: Any = subprocess.Popen(
                [sys.executable, "-m", "bupo.rewards.math_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # only the trainer handles Ctrl-C
            )
        try:
            if self._reply() != {"ready": True}:
                raise ConfigError(
                    "the math reward's worker does not start: is math-verify installed?"
                )
        except BaseException:  # also Ctrl-C
            self._kill()
            raise

    def grade(self, response: str, answer: str, timeout: float) -> tuple[float, str]:
        """Returns the reward and an empty text, or nan and the error, which is "timeout" if grading
        took more than `timeout` seconds."""
        self.grading = answer
        try:
            return self._grade(json.dumps({"response": response, "answer": answer}), timeout)
        finally:
            self.grading = None

    def _grade(self, request: str, timeout: float) -> tuple[float, str]:
        try:
            self._send(request)
        except BrokenPipeError:  # the process died after its last answer
            self._restart()
            self._send(request)
        if not wait([self.process.stdout], timeout):
            self._restart()
            return math.nan, "timeout"
        reply = self._reply()
        if reply is None:
            self._restart()
            return math.nan, "its worker died"
        return reply.get("reward", math.nan), reply.get("error", "")

    def _send(self, request: str) -> None:
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()

    def _reply(self) -> dict[str, Any] | None:
        """Reads one reply. Returns None if the process died."""
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def _restart(self) -> None:
        self._kill()
        self._start()

    def end(self) -> None:
        """Ends the process for good, even while it is grading."""
        with self._lock:
            self._ended = True
        self._kill()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class MathReward:
    """Gives 1 if the last \\boxed{} equals the ground truth, else 0. There are reward.workers
    processes, each watched by a thread that kills it after reward.timeout seconds."""

    def __init__(self, config: RewardConfig) -> None:
        self._timeout = config.timeout
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(config.workers)
        try:
            for _ in range(config.workers):
                self._workers.append(_Worker())
                self._idle.put(self._workers[-1])
            grades = self.grade([(response, answer) for response, answer, _ in GOLDEN])
            wrong = [g for g, reward in zip(GOLDEN, grades.rewards) if reward != g[2]]
            if wrong:
                why = grades.first_failure or wrong
                raise ConfigError(f"the math reward fails its self-check on {why}")
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def __call__(self, rollouts: Sequence[Rollout]) -> Grades:
        return self.grade([(r.text, r.prompt.answer) for r in rollouts])

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        return [boxed.extract(r.text) for r in rollouts]

    def grade(self, pairs: Sequence[tuple[str, str]]) -> Grades:
        """Grades (response, answer) pairs; a timeout or an error is counted and gives nan."""
        rewards: list[float] = []
        failures: list[tuple[str, str]] = []
        for (_, answer), (reward, failure) in zip(pairs, self._threads.map(self._one, pairs)):
            rewards.append(reward)
            if failure:
                failures.append((failure, f"answer {answer!r}: {failure}"))
            progress.report(len(rewards) / len(pairs))
        timeouts = sum(kind == "timeout" for kind, _ in failures)
        first = failures[0][1] if failures else ""
        return Grades(rewards, timeouts, len(failures) - timeouts, first)

    def _one(self, pair: tuple[str, str]) -> tuple[float, str]:
        worker = self._idle.get()
        try:
            return worker.grade(*pair, self._timeout)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the workers, even while they are grading."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.end()
        self._threads.shutdown()
