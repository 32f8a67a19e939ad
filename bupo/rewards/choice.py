"""Responses to rewards, in processes that can be killed or by a function of the user's."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, Protocol

from bupo.config import ConfigError, RewardConfig
from bupo.rewards import boxed
from bupo.types import Prompt, RewardReport, Rollout

GOLDEN = [
    ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1.0),
    ("\\boxed{3} no, \\boxed{4}", "4", 1.0),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
    ("\\boxed{5}", "6", 0.0),
    ("the answer is 5", "5", 0.0),
]
"""Pairs whose reward is known; wrong here means a broken installation, not a bad model."""


STRICT = "bupo.rewards.boxed:strict"


class Reward(Protocol):
    """What the loop needs of a reward."""

    share: Callable[[float], object]
    """Called with the share of the responses that is graded"""

    def __call__(self, rollouts: Sequence[Rollout]) -> RewardReport:
        """Sets rollout.reward of each; nan where it cannot be graded."""
        ...

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        """The final answers that a majority vote counts, None for a response without one; None
        instead of the list if this reward knows no final answers."""
        ...

    def close(self) -> None: ...


class _Worker:
    """One math_worker process and the item it is at."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bupo.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the trainer's to handle
        )
        self.item: int | None = None
        self.deadline = math.inf

    @property
    def stdout(self) -> Any:
        return self._process.stdout

    def send(self, item: int, response: str, answer: str, timeout: float) -> bool:
        self.item, self.deadline = item, time.monotonic() + timeout
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"response": response, "answer": answer}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The reply, or None from a process that died."""
        line = self.stdout.readline()
        return json.loads(line) if line else None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class MathReward:
    """The last \\boxed{} against the ground truth, by Math-Verify in killed-at-deadline workers."""

    def __init__(self, config: RewardConfig) -> None:
        self.share: Callable[[float], object] = lambda share: None
        self._timeout = config.timeout
        self._workers: list[_Worker] = []
        try:
            for _ in range(config.workers):
                self._workers.append(self._start())
        except ConfigError:
            self.close()
            raise
        rewards, report = self.grade([g[:2] for g in GOLDEN])
        wrong = [g for g, r in zip(GOLDEN, rewards) if r != g[2]]
        if wrong:
            self.close()
            raise ConfigError(f"the math reward fails its self-check on {report.first or wrong}")

    @staticmethod
    def _start() -> _Worker:
        worker = _Worker()
        if worker.receive() != {"ready": True}:
            worker.kill()
            raise ConfigError("the math reward's worker does not start: is math-verify installed?")
        return worker

    def __call__(self, rollouts: Sequence[Rollout]) -> RewardReport:
        rewards, report = self.grade([(r.text, r.prompt.answer) for r in rollouts])
        for rollout, reward in zip(rollouts, rewards):
            rollout.reward = reward
        return report

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        return [boxed.extract(r.text) for r in rollouts]

    def grade(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[float], RewardReport]:
        """Rewards of (response, answer) pairs; a timeout or an error is counted and gives nan."""
        rewards = [math.nan] * len(pairs)
        report = RewardReport()
        waiting = list(range(len(pairs)))[::-1]
        done = 0
        while waiting or any(w.item is not None for w in self._workers):
            for n, worker in enumerate(self._workers):
                if worker.item is None and waiting:
                    item = waiting.pop()
                    if not worker.send(item, *pairs[item], self._timeout):
                        self._replace(n)
                        waiting.append(item)
            busy = [w for w in self._workers if w.item is not None]
            if not busy:  # every worker had to be replaced
                continue
            soonest = min((w.deadline for w in busy), default=math.inf)
            ready = wait([w.stdout for w in busy], max(0.0, soonest - time.monotonic()))
            left = len(waiting) + len(busy)
            if len(pairs) - left > done:
                done = len(pairs) - left
                self.share(done / len(pairs))
            for n, worker in enumerate(self._workers):
                if worker.item is None:
                    continue
                if worker.stdout in ready:
                    reply = worker.receive()
                    answer = pairs[worker.item][1]
                    if reply is None or "error" in reply:
                        why = reply["error"] if reply else "its worker died"
                        report.count("errors", f"answer {answer!r}: {why}")
                    else:
                        rewards[worker.item] = float(reply["reward"])
                    worker.item = None
                    if reply is None:
                        self._replace(n)
                elif time.monotonic() >= worker.deadline:
                    answer = pairs[worker.item][1]
                    report.count("timeouts", f"answer {answer!r}: timeout")
                    self._replace(n)
        return rewards, report

    def _replace(self, n: int) -> None:
        self._workers[n].kill()
        self._workers[n] = self._start()

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()


class FunctionReward:
    """A user's module:function over the whole batch."""

    def __init__(self, name: str) -> None:
        self.share: Callable[[float], object] = lambda share: None
        place = STRICT if name == "strict" else name
        module, _, attribute = place.partition(":")
        try:
            self._function: Callable[[list[str], list[str]], Sequence[float | None]] = getattr(
                importlib.import_module(module), attribute
            )
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"reward.function={name} cannot be loaded: {error}") from None
        self._name = name
        self._extract: Callable[[str], str | None] | None = getattr(
            importlib.import_module(module), "extract", None
        )
        try:
            inspect.signature(self._function).bind([], [])
        except TypeError as error:
            raise ConfigError(
                f"reward.function={name} must take (responses: list[str], answers: list[str]): "
                f"{error}"
            ) from None

    def __call__(self, rollouts: Sequence[Rollout]) -> RewardReport:
        rewards = self._rewards([r.text for r in rollouts], [r.prompt.answer for r in rollouts])
        report = RewardReport()
        for rollout, reward in zip(rollouts, rewards):
            try:
                rollout.reward = float(reward)
            except (TypeError, ValueError):  # None, or no number at all
                rollout.reward = math.nan
            if rollout.ungraded:
                report.count("errors", f"reward.function={self._name} returned {reward!r}")
        return report

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        return None if self._extract is None else [self._extract(r.text) for r in rollouts]

    def _rewards(self, responses: list[str], answers: list[str]) -> list[Any]:
        rewards = list(self._function(responses, answers))
        if len(rewards) != len(responses):
            raise ValueError(
                f"reward.function={self._name} returned {len(rewards)} rewards for "
                f"{len(responses)} responses"
            )
        return rewards

    def close(self) -> None:
        """Nothing to do."""


class SourceReward:
    """A reward for each data source."""

    def __init__(self, rewards: dict[str, Reward]) -> None:
        self._rewards = rewards

    @property
    def share(self) -> Callable[[float], object]:
        """Of one source after the other."""
        return self._each()[0].share

    @share.setter
    def share(self, share: Callable[[float], object]) -> None:
        for reward in self._each():
            reward.share = share

    def __call__(self, rollouts: Sequence[Rollout]) -> RewardReport:
        report = RewardReport()
        for reward in self._each():
            members = [r for r in rollouts if self._rewards[r.prompt.source] is reward]
            if members:
                report.add(reward(members))
        return report

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        answers: list[str | None] = []
        for rollout in rollouts:
            one = self._rewards[rollout.prompt.source].answers([rollout])
            if one is None:
                return None
            answers += one
        return answers

    def _each(self) -> list[Reward]:
        return list({id(reward): reward for reward in self._rewards.values()}.values())

    def close(self) -> None:
        for reward in self._each():
            reward.close()


def check_functions(config: RewardConfig) -> None:
    """Raises ConfigError for a function that cannot be called with responses and answers."""
    for name in config.functions:
        if name != "math":
            FunctionReward(name)


def check_sources(config: RewardConfig, prompts: Sequence[Prompt]) -> None:
    """Every prompt has a reward: raises ConfigError for a source that reward.by_source lacks."""
    counts = Counter(p.source for p in prompts if p.source not in config.by_source)
    if config.by_source and counts:
        unknown = ", ".join(f"{source} ({n} prompts)" for source, n in counts.items())
        raise ConfigError(
            f"no reward for data source {unknown}: reward.by_source has "
            f"{', '.join(config.by_source)}"
        )


def make_reward(config: RewardConfig) -> Reward:
    """The configured reward, checked to work."""
    made: dict[str, Reward] = {}
    try:
        for name in config.functions:
            made[name] = MathReward(config) if name == "math" else FunctionReward(name)
    except ConfigError:
        for reward in made.values():
            reward.close()
        raise
    if not config.by_source:
        return made[config.function]
    return SourceReward({source: made[name] for source, name in config.by_source.items()})
