"""Computes per-token advantages from rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bupo.samples import with_streams
from bupo.types import REWARD_TOLERANCE, Rollout


def by_group(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """For each prompt with a graded response, returns the indices of its graded responses."""
    groups: dict[int, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        if not rollout.ungraded:
            groups.setdefault(rollout.group, []).append(place)
    return list(groups.values())


def _flat(rewards: Tensor) -> bool:
    """Whether the values differ by no more than rounding noise."""
    return bool(rewards.max() - rewards.min() <= REWARD_TOLERANCE)


def _grpo(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def _centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean()


def _rloo(rewards: Tensor) -> Tensor:
    n = len(rewards)
    return (rewards - rewards.mean()) * n / (n - 1)  # equals r_i - mean of the others


ESTIMATORS: dict[str, tuple[Callable[[Tensor], Tensor] | None, bool]] = {
    "grpo": (_grpo, False),
    "dr_grpo": (_centred, False),
    "rloo": (_rloo, False),
    "reinforce_pp": (None, True),
    "reinforce_pp_baseline": (_centred, True),
    "ppo": (None, True),
}
"""For each name: the function that turns a group's rewards into advantages (None if they are
computed per token, without comparing responses), and whether these are whitened over all tokens."""


def penalise_length(rollouts: Sequence[Rollout], longest: int, buffer: int) -> list[Rollout]:
    """Returns the rollouts with the length penalty of DAPO (arXiv 2503.14476, eq. 13): 0 up to
    longest - buffer tokens, then rising linearly to 1 at longest. A buffer of 0 turns it off."""
    over = [rollout.count - (longest - buffer) for rollout in rollouts]
    penalties = [max(0.0, tokens / buffer) if buffer else 0.0 for tokens in over]
    return [replace(r, penalty=penalty) for r, penalty in zip(rollouts, penalties)]


def with_kl_costs(rollouts: Sequence[Rollout], kl_coef: float) -> list[Rollout]:
    """Adds the stream `cost`, beta (log pi - log pi_ref), computed from `old` and `reference`."""
    costs = (kl_coef * (r.stream("old") - r.stream("reference")) for r in rollouts)
    return with_streams(rollouts, "cost", costs)


def flat_groups(rollouts: Sequence[Rollout]) -> float:
    """Returns the fraction of prompts whose graded responses all have the same reward, with the
    penalty subtracted: the rewards differ by at most REWARD_TOLERANCE."""
    groups = by_group(rollouts)
    return sum(_flat(_rewards(rollouts, group)) for group in groups) / max(len(groups), 1)


def estimate(
    rollouts: Sequence[Rollout], name: str, gamma: float = 1.0, gae_lambda: float = 1.0
) -> list[Rollout]:
    """Adds the stream `advantage`, which has one value for each counted token::

        grpo                   (r_i - mean_G) / (std_G + 1e-6), std unbiased        2402.03300
        dr_grpo                r_i - mean_G                                         2503.20783
        rloo                   r_i - mean of the other G - 1                        2402.14740
        reinforce_pp           sum over s >= t of (1[s last] r_i - cost_s),         2501.03262
                               whitened over all tokens of the step
        reinforce_pp_baseline  r_i - mean_G, whitened over all tokens of the step   2501.03262
        ppo                    gae(), whitened over all tokens of the step          1707.06347

    r_i is reward - penalty. cost_s is the stream `cost`, or 0 without it. ppo reads the stream
    `value` and also adds `return`, which is not whitened. Whitening subtracts the mean over tokens
    and divides by their standard deviation. The estimators that compare within a group return
    exactly 0 if its rewards differ by no more than REWARD_TOLERANCE, because the std of equal
    floats is rounding noise. Responses without a reward enter none of these statistics;
    bupo.rl.losses.drop keeps them out of the loss.
    """
    of_group, whiten = ESTIMATORS[name]
    rollouts = list(rollouts)
    if of_group is not None:
        advantages = [torch.zeros(r.count) for r in rollouts]
        for group in by_group(rollouts):
            rewards = _rewards(rollouts, group)
            if not _flat(rewards):
                for place, value in zip(group, of_group(rewards)):
                    advantages[place] = torch.full((rollouts[place].count,), float(value))
    else:
        rewards_of = [_token_rewards(r) for r in rollouts]
        if name == "ppo":
            values_of = [r.stream("value").double() for r in rollouts]
        else:  # the reward to go is GAE without a critic
            values_of, gamma, gae_lambda = [torch.zeros_like(r) for r in rewards_of], 1.0, 1.0
        advantages = gae(rewards_of, values_of, gamma, gae_lambda)
        if name == "ppo":
            returns = ((a + v).float() for a, v in zip(advantages, values_of))
            rollouts = with_streams(rollouts, "return", returns)
    if whiten:
        advantages = _whitened(advantages, [not r.dropped for r in rollouts])
    return with_streams(rollouts, "advantage", advantages)


def _rewards(rollouts: Sequence[Rollout], places: Sequence[int]) -> Tensor:
    shaped = [rollouts[place].reward - rollouts[place].penalty for place in places]
    return torch.tensor(shaped, dtype=torch.float64)


def gae(
    rewards: Sequence[Tensor], values: Sequence[Tensor], gamma: float, gae_lambda: float
) -> list[Tensor]:
    """Returns the generalised advantage estimates (1506.02438) of each response [T_i]::

        d_t = r_t + gamma V_{t+1} - V_t        A_t = d_t + gamma lambda A_{t+1}

    V_t is the value of the state before token t. After the last token, V and A are 0, even in a
    truncated response, because it receives no further reward.
    """
    lengths = [len(r) for r in rewards]
    # The empty sequence lets pad_sequence accept a step without responses.
    padded, known = (
        torch.nn.utils.rnn.pad_sequence([*x, torch.zeros(0, dtype=torch.float64)]).flip(0)
        for x in (rewards, values)
    )  # [longest, responses + 1], last token first; the padding has reward 0 and value 0
    ahead, next_value = torch.zeros_like(padded[:1].sum(0)), torch.zeros_like(padded[:1].sum(0))
    found = []
    for reward, value in zip(padded, known):
        ahead = reward + gamma * next_value - value + gamma * gae_lambda * ahead
        next_value = value
        found.append(ahead)
    result = torch.stack(found[::-1]) if found else padded
    return [result[:n, i] for i, n in enumerate(lengths)]


def _token_rewards(rollout: Rollout) -> Tensor:
    """Returns 1[t last] r - cost_t for each token."""
    rewards = torch.zeros(rollout.count, dtype=torch.float64)
    rewards[-1:] = 0.0 if rollout.ungraded else rollout.reward - rollout.penalty
    return rewards - rollout.stream("cost").double() if "cost" in rollout.streams else rewards


def _whitened(advantages: Sequence[Tensor], kept: Sequence[bool]) -> list[Tensor]:
    """Whitens with the mean and the standard deviation over the tokens of the kept responses."""
    values = [x.double() for x in advantages]
    in_loss = [x for x, is_kept in zip(values, kept) if is_kept]
    tokens = torch.cat(in_loss) if in_loss else torch.empty(0)
    if not len(tokens):
        return list(advantages)
    if _flat(tokens):
        return [torch.zeros_like(x).float() for x in values]
    mean, std = tokens.mean(), tokens.std(correction=0)
    return [((x - mean) / (std + 1e-8)).float() for x in values]
