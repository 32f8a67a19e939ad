"""A reward whose function is called in processes that are killed at a deadline."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
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
from bupo.rewards.function_reward import GradingFunction
from bupo.types import Grades, Rollout


class _Worker:
    """A process of bupo.rewards.worker, which is restarted after each kill."""

    grading: str | None = None
    """The answer that is being graded"""

    def __init__(self, function: GradingFunction) -> None:
        self._function = function
        self._ended, self._lock = False, threading.Lock()
        self._start()

    def _start(self) -> None:
        with self._lock:  # so that none starts once end() has killed the last one
            if self._ended:
                return
            self.process: Any = subprocess.Popen(
                [sys.executable, "-m", "bupo.rewards.worker", self._function.place],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # only the trainer handles Ctrl-C
            )
        try:
            reply = self._reply() or {"error": "its worker process ended"}
            if "error" in reply:
                name = self._function.name
                raise ConfigError(f"reward.function={name} does not start: {reply['error']}")
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
        if "error" in reply:
            return math.nan, reply["error"]
        reward = math.nan if reply["reward"] is None else reply["reward"]
        return reward, "" if math.isfinite(reward) else f"it returned {reply['reward']}"

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
        with contextlib.suppress(ProcessLookupError):  # its own children, too
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class KillableReward:
    """Calls a function that module:function names, one response at a time. There are
    reward.workers processes, each watched by a thread that kills it after reward.timeout
    seconds."""

    def __init__(self, function: GradingFunction, config: RewardConfig) -> None:
        self._function, self._timeout = function, config.timeout
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(config.workers)
        try:
            for _ in range(config.workers):
                self._workers.append(_Worker(function))
                self._idle.put(self._workers[-1])
            self._check()
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def _check(self) -> None:
        """Raises ConfigError if a response whose reward is known is graded wrong."""
        golden = getattr(self._function.module, "GOLDEN", [])
        grades = self.grade([(response, answer) for response, answer, _ in golden])
        wrong = [g for g, reward in zip(golden, grades.rewards) if reward != g[2]]
        if wrong:
            why = grades.first_failure or wrong
            raise ConfigError(
                f"reward.function={self._function.name} fails its self-check on {why}"
            )

    def __call__(self, rollouts: Sequence[Rollout]) -> Grades:
        return self.grade([(r.text, r.prompt.answer) for r in rollouts])

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        return self._function.answers(rollouts)

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
