"""Makes the configured reward, which may differ between data sources."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from bupo import progress
from bupo.config import ConfigError, RewardConfig
from bupo.rewards.function_reward import FunctionReward, find
from bupo.rewards.killable import KillableReward
from bupo.types import Grades, Prompt, Reward, Rollout


class SourceReward:
    """Grades each rollout with the reward of its data source."""

    def __init__(self, rewards: dict[str, Reward]) -> None:
        self._rewards = rewards

    def __call__(self, rollouts: Sequence[Rollout]) -> Grades:
        rewards = [math.nan] * len(rollouts)
        grades, each = Grades([]), self._each()
        for reward, shown in zip(each, progress.parts(len(each))):
            mine = [i for i, r in enumerate(rollouts) if self._rewards[r.prompt.source] is reward]
            if not mine:
                continue
            with shown:
                grades = reward([rollouts[i] for i in mine]).with_failures(grades)
            for i, value in zip(mine, grades.rewards):
                rewards[i] = value
        return replace(grades, rewards=rewards)

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        """Returns the extracted answers, or None if the reward of any source extracts none."""
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
        find(name)


def check_sources(config: RewardConfig, prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError if a prompt's data source is missing in reward.by_source."""
    counts = Counter(p.source for p in prompts if p.source not in config.by_source)
    if config.by_source and counts:
        unknown = ", ".join(f"{source} ({n} prompts)" for source, n in counts.items())
        raise ConfigError(
            f"no reward for data source {unknown}: reward.by_source has "
            f"{', '.join(config.by_source)}"
        )


def make_reward(config: RewardConfig) -> Reward:
    """Makes the configured reward and checks that it works. Raises ConfigError."""
    made: dict[str, Reward] = {}
    try:
        for name in config.functions:
            function = find(name)
            apart = function.killable
            made[name] = KillableReward(function, config) if apart else FunctionReward(function)
    except BaseException:  # also Ctrl-C
        for reward in made.values():
            reward.close()
        raise
    if not config.by_source:
        (reward,) = made.values()
        return reward
    return SourceReward({source: made[name] for source, name in config.by_source.items()})
