"""Collects the responses of a step. Prompts are taken in order; with dynamic sampling, those whose
responses all have the same reward are replaced (DAPO, arXiv 2503.14476, eq. 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bupo.types import REWARD_TOLERANCE, Grades, Prompt, Rollout


@dataclass
class Collected:
    """The rollouts that a step trains on, and figures on how they were found."""

    rollouts: list[Rollout]
    grades: Grades
    """Includes the failures of all rounds"""
    tokens: int
    """Number of tokens generated in all rounds"""
    groups: int
    """Number of prompts answered in all rounds"""
    discarded: int
    """Number of groups replaced because their rewards had no spread"""
    graded_rewards: list[float]
    """Rewards of all graded responses of all rounds"""

    def metrics(self) -> dict[str, float]:
        """reward/mean_drawn averages all graded responses, reward/mean only the selected ones."""
        return {
            "groups/discarded": self.discarded / max(self.groups, 1),
            "groups/drawn": self.groups,
            "reward/mean_drawn": sum(self.graded_rewards) / max(len(self.graded_rewards), 1),
        }


def collect(
    take: Callable[[int, int], list[Prompt]],
    prompts: int,
    generate: Callable[[Sequence[Prompt], int], list[Rollout]],
    reward: Callable[[list[Rollout]], Grades],
    refills: int,
) -> Collected:
    """Returns the graded rollouts of `prompts` groups. Groups without spread are replaced by groups
    of the next prompts, in up to `refills` rounds. Groups that are still flat after that are kept,
    so that every step has the same number of responses.

    take(first, count): returns prompts, beginning `first` prompts after the first one of this step.
    generate(prompts, round): returns responses. The round, 0 for the first, determines its seed.
    """
    wanted = list(range(prompts))
    groups: dict[int, list[Rollout]] = {}
    grades: Grades | None = None
    tokens = answered = discarded = 0
    graded: list[float] = []
    for round_ in range(refills + 1):
        rollouts = generate(take(answered, len(wanted)), round_)
        new = reward(rollouts)
        grades = new.with_failures(grades)
        answered += len(wanted)
        tokens += sum(rollout.count for rollout in rollouts)
        groups |= {place: [] for place in wanted}
        for rollout, value in zip(rollouts, new.rewards, strict=True):
            place = wanted[rollout.group]
            groups[place].append(replace(rollout, group=place, reward=value))
        graded += [r.reward for place in wanted for r in groups[place] if not r.ungraded]
        flat = [place for place in wanted if _flat(groups[place])]
        if not flat or round_ == refills:
            break
        discarded += len(flat)
        wanted = flat
    assert grades is not None
    chosen = [rollout for place in range(prompts) for rollout in groups[place]]
    return Collected(chosen, grades, tokens, answered, discarded, graded)


def _flat(group: Sequence[Rollout]) -> bool:
    """Whether the rewards, without penalties, show no difference to learn from."""
    rewards = [r.reward for r in group if not r.ungraded]
    return not rewards or max(rewards) - min(rewards) <= REWARD_TOLERANCE
