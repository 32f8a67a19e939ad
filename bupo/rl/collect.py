"""The responses of a step: prompts in their order and, with dynamic sampling, other prompts for
those whose responses all have one reward (DAPO, arXiv 2503.14476, eq. 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bupo.types import REWARD_TOLERANCE, Prompt, RewardReport, Rollout

Generate = Callable[[Sequence[Prompt], int], list[Rollout]]
"""Responses to prompts; the number is that of the round, 0 for the first, for its seed"""


class PromptStream:
    """The prompts of all steps, one after the other, some of them drawn ahead of their step.

    Step n begins where step n - 1 has ended, refills included: nothing is repeated within an epoch.
    The place is that of the order without refills and `drawn` more, so that number is all that an
    exact resume needs.
    """

    def __init__(self, take: Callable[[int], list[Prompt]], per_step: int, drawn: int = 0) -> None:
        """take: the prompts of step 1, 2, ... of the order, per_step of them."""
        self._take, self._per_step, self.drawn = take, per_step, drawn
        """drawn: refills until now"""

    def at(self, step: int, after: int, count: int) -> list[Prompt]:
        """`count` prompts, beginning `after` prompts after the first one of a step."""
        first = (step - 1) * self._per_step + self.drawn + after
        found: list[Prompt] = []
        while len(found) < count:
            chunk, place = divmod(first + len(found), self._per_step)
            found += self._take(chunk + 1)[place : place + count - len(found)]
        return found


@dataclass
class Sample:
    """What a step trains on, and what it took to find it."""

    rollouts: list[Rollout]
    report: RewardReport
    tokens: int = 0
    """Generated in all"""
    groups: int = 0
    """Generated in all"""
    discarded: int = 0
    """Groups replaced, for they had no spread of rewards"""
    reward_sum: float = 0.0
    graded: int = 0
    """Responses that have a reward"""
    drawn: int = 0
    """Prompts taken beyond those of the step"""

    def metrics(self) -> dict[str, float]:
        """reward/mean_drawn is over all graded responses; that of the step is of a selection."""
        return {
            "groups/discarded": self.discarded / max(self.groups, 1),
            "groups/drawn": self.groups,
            "reward/mean_drawn": self.reward_sum / max(self.graded, 1),
        }


def collect(
    stream: PromptStream,
    step: int,
    prompts: int,
    generate: Generate,
    reward: Callable[[list[Rollout]], RewardReport],
    refills: int,
) -> Sample:
    """Rollouts of `prompts` groups. Groups without spread are replaced by groups of the next
    prompts in up to `refills` rounds; those that are still flat then stay, so that every step has
    the same number of responses. stream.drawn is the caller's to advance."""
    sample = Sample([], RewardReport())
    wanted = list(range(prompts))
    groups: dict[int, list[Rollout]] = {}
    for round_ in range(refills + 1):
        drawn = stream.at(step, sample.groups, len(wanted))
        rollouts = generate(drawn, round_)
        sample.report.add(reward(rollouts))
        sample.groups += len(wanted)
        sample.tokens += sum(len(r.token_ids) for r in rollouts)
        graded = [r.reward for r in rollouts if not r.ungraded]
        sample.graded += len(graded)
        sample.reward_sum += sum(graded)
        for place in wanted:
            groups[place] = []
        for rollout in rollouts:
            groups[wanted[rollout.group]].append(replace(rollout, group=wanted[rollout.group]))
        flat = [place for place in wanted if _flat(groups[place])]
        if not flat or round_ == refills:
            break
        sample.discarded += len(flat)
        wanted = flat
    sample.drawn = sample.groups - prompts
    sample.rollouts = [r for place in range(prompts) for r in groups[place]]
    return sample


def _flat(group: Sequence[Rollout]) -> bool:
    rewards = [r.reward for r in group if not r.ungraded]
    return not rewards or max(rewards) - min(rewards) <= REWARD_TOLERANCE
