"""Divides the generation and the grading of responses among the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bupo import ranks
from bupo.config import RolloutConfig
from bupo.types import Grades, Prompt, Reward, Rollout, RolloutEngine


def generate(
    engine: RolloutEngine,
    config: RolloutConfig,
    prompts: Sequence[Prompt],
    samples: int,
    seed: str,
    stop: Callable[[], bool] = lambda: False,
    temperature: float | None = None,
) -> tuple[list[Rollout], list[float]]:
    """Returns the responses to all prompts, to its share of which each rank generates them, and the
    seconds that each rank took. The arguments are those of RolloutEngine.generate."""
    together, begin = config.ranks_together(ranks.world()), time.monotonic()
    numbers = ranks.share(range(len(prompts)), together)
    mine = [prompts[number] for number in numbers]
    rollouts = engine.generate(mine, samples, seed, stop, temperature, numbers)
    if ranks.rank() % together:  # the first rank that the engine runs on has the same
        rollouts = []
    parts = ranks.gathered((rollouts, time.monotonic() - begin))
    found = [rollout for part, _ in parts for rollout in part]
    return sorted(found, key=lambda rollout: rollout.group), [seconds for _, seconds in parts]


class SpreadReward:
    """A reward of which each rank computes its share, and all ranks get the whole."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def __call__(self, rollouts: Sequence[Rollout]) -> Grades:
        if ranks.world() == 1:
            return self._reward(rollouts)
        found: list[Grades] = []

        def grade(mine: list[Rollout]) -> list[float]:
            found.append(self._reward(mine))
            return found[0].rewards

        rewards = ranks.spread(rollouts, grade)
        grades = ranks.gathered(found[0])
        failures = [each.first_failure for each in grades if each.first_failure]
        return Grades(
            rewards,
            sum(each.timeouts for each in grades),
            sum(each.errors for each in grades),
            failures[0] if failures else "",
        )

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        return self._reward.answers(rollouts)

    def close(self) -> None:
        self._reward.close()
