"""Rewards to per-token advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bupo.types import REWARD_TOLERANCE, Rollout


def by_group(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The responses of each prompt."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return list(groups.values())


def _flat(rewards: Tensor) -> bool:
    """No spread beyond rounding noise."""
    return bool(rewards.max() - rewards.min() <= REWARD_TOLERANCE)


def _grpo(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def _centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean()


def _rloo(rewards: Tensor) -> Tensor:
    n = len(rewards)
    return (rewards - rewards.mean()) * n / (n - 1)  # r_i - mean of the others


ESTIMATORS: dict[str, tuple[Callable[[Tensor], Tensor] | None, bool]] = {
    "grpo": (_grpo, False),
    "dr_grpo": (_centred, False),
    "rloo": (_rloo, False),
    "reinforce_pp": (None, True),
    "reinforce_pp_baseline": (_centred, True),
    "ppo": (None, True),
}
"""Name to what it makes of a group's rewards (None: token by token, without a group), and whether
that is whitened over all tokens."""


def penalise_length(rollouts: Sequence[Rollout], longest: int, buffer: int) -> None:
    """Sets rollout.penalty to that of DAPO (arXiv 2503.14476, eq. 13): 0 up to longest - buffer
    tokens, then linearly to 1 at longest."""
    for rollout in rollouts:
        over = len(rollout.token_ids) - (longest - buffer)
        rollout.penalty = max(0.0, over / buffer) if buffer else 0.0


def estimate(
    rollouts: Sequence[Rollout],
    name: str,
    costs: Sequence[Tensor] | None = None,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> float:
    """Sets rollout.advantages, a value for every token of a response::

        grpo                   (r_i - mean_G) / (std_G + 1e-6), std unbiased        2402.03300
        dr_grpo                r_i - mean_G                                         2503.20783
        rloo                   r_i - mean of the other G - 1                        2402.14740
        reinforce_pp           sum over s >= t of (1[s last] r_i - cost_s),         2501.03262
                               whitened over all tokens of the step
        reinforce_pp_baseline  r_i - mean_G, whitened over all tokens of the step   2501.03262
        ppo                    gae(), whitened over all tokens of the step          1707.06347

    r_i is reward - penalty; costs, of each token, are beta (log pi - log pi_ref) in REINFORCE++.
    ppo takes rollout.values and sets rollout.returns, which are not whitened.
    Whitening subtracts the mean over tokens and divides by their standard deviation. A group whose
    rewards differ by no more than REWARD_TOLERANCE gets exactly 0 from those that compare within
    it: the std of equal floats is rounding noise. Responses without a reward have no part in any
    of these statistics, and advantage 0. Returns the share of groups without spread.
    """
    of_group, whiten = ESTIMATORS[name]
    groups = by_group([r for r in rollouts if not r.ungraded])
    flat = 0
    if of_group is not None:
        for rollout in rollouts:
            rollout.advantages = torch.zeros(len(rollout.token_ids))
    for group in groups:
        rewards = torch.tensor([r.reward - r.penalty for r in group], dtype=torch.float64)
        flat += _flat(rewards)
        if of_group is not None and not _flat(rewards):
            for rollout, value in zip(group, of_group(rewards)):
                rollout.advantages = torch.full((len(rollout.token_ids),), float(value))
    if of_group is None:
        rewards_of = _token_rewards(rollouts, costs)
        if name == "ppo":
            values_of = [r.values.double() for r in rollouts if r.values is not None]
        else:  # the reward to go is GAE without a critic
            values_of, gamma, gae_lambda = [torch.zeros_like(r) for r in rewards_of], 1.0, 1.0
        pairs = zip(gae(rewards_of, values_of, gamma, gae_lambda), values_of, strict=True)
        for rollout, (advantages, state_values) in zip(rollouts, pairs, strict=True):
            rollout.advantages = advantages
            rollout.returns = (advantages + state_values).float() if name == "ppo" else None
    if whiten:
        _whiten(rollouts)
    return flat / max(len(groups), 1)


def gae(
    rewards: Sequence[Tensor], values: Sequence[Tensor], gamma: float, gae_lambda: float
) -> list[Tensor]:
    """Generalised advantage estimation (1506.02438), of each response [T_i]::

        d_t = r_t + gamma V_{t+1} - V_t        A_t = d_t + gamma lambda A_{t+1}

    V_t is of the state before token t. After the last token V and A are 0, in a truncated response
    too: its reward is all that there will be.
    """
    lengths = [len(r) for r in rewards]
    padded, known = (
        torch.nn.utils.rnn.pad_sequence([*x, torch.zeros(0, dtype=torch.float64)]).flip(0)
        for x in (rewards, values)
    )  # [longest, responses + 1], the last token first; padding has no reward and no value
    ahead, next_value = torch.zeros_like(padded[:1].sum(0)), torch.zeros_like(padded[:1].sum(0))
    found = []
    for reward, value in zip(padded, known):
        ahead = reward + gamma * next_value - value + gamma * gae_lambda * ahead
        next_value = value
        found.append(ahead)
    result = torch.stack(found[::-1]) if found else padded
    return [result[:n, i] for i, n in enumerate(lengths)]


def _token_rewards(rollouts: Sequence[Rollout], costs: Sequence[Tensor] | None) -> list[Tensor]:
    """1[t last] r - cost_t of each token."""
    result = []
    for n, rollout in enumerate(rollouts):
        rewards = torch.zeros(len(rollout.token_ids), dtype=torch.float64)
        rewards[-1:] = 0.0 if rollout.ungraded else rollout.reward - rollout.penalty
        result.append(rewards if costs is None else rewards - costs[n].double())
    return result


def _whiten(rollouts: Sequence[Rollout]) -> None:
    """Over the tokens that have a part in the loss."""
    values = [r.advantages.double() for r in rollouts if r.advantages is not None]
    kept = [value for rollout, value in zip(rollouts, values) if not rollout.dropped]
    tokens = torch.cat(kept) if kept else torch.empty(0)
    if not len(tokens):
        return
    mean, std = tokens.mean(), tokens.std(correction=0)
    for rollout, value in zip(rollouts, values):
        white = torch.zeros_like(value) if _flat(tokens) else (value - mean) / (std + 1e-8)
        rollout.advantages = white.float()
