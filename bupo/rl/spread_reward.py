"""Divides the grading of responses among the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from bupo import ranks
from bupo.types import Grades, Reward, Rollout


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
