"""Rewards to per-token advantages. Each function states its formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bupo.rl.types import Rollout

TOLERANCE = 1e-6


def by_group(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The responses of each prompt."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return list(groups.values())


def grpo(rollouts: Sequence[Rollout]) -> float:
    """A_i = (r_i - mean) / (std + 1e-6) over the G responses of a prompt, std unbiased
    (2402.03300); the same for every token of the response.

    A group whose rewards differ by no more than TOLERANCE gets exactly 0: the std of equal floats
    is rounding noise. Sets rollout.advantages; returns the share of such groups.
    """
    groups = by_group(rollouts)
    flat = 0
    for group in groups:
        rewards = torch.tensor([r.reward for r in group], dtype=torch.float64)
        if rewards.max() - rewards.min() <= TOLERANCE:
            flat += 1
            values = torch.zeros_like(rewards)
        else:
            values = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for rollout, value in zip(group, values):
            rollout.advantages = torch.full((len(rollout.token_ids),), float(value))
    return flat / max(len(groups), 1)
