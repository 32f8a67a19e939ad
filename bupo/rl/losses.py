"""What an update minimises: a loss by its name, the weight of each token, and what is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bupo import ops
from bupo.config import LossConfig
from bupo.ops import reference
from bupo.ops.results import PolicyLoss
from bupo.samples import Batch, with_streams
from bupo.types import Rollout

Loss = Callable[[Tensor, Mapping[str, Any], Batch, LossConfig], PolicyLoss]
"""(hidden [T, D], head, batch, settings) -> loss and metrics of a micro-batch. `head` holds the
arguments of the LM-head ops that describe the head (bupo.rl.forward); the batch has the streams
old, advantage and weight, and reference and importance where the settings ask for them."""


def token_loss(
    hidden: Tensor, head: Mapping[str, Any], batch: Batch, settings: LossConfig
) -> PolicyLoss:
    """ppo and cispo: the fused op, with a ratio for each token; bupo.ops.policy_loss has the
    formulas."""
    options = _options(batch, settings)
    return ops.policy_loss(
        hidden, targets=batch.targets, loss_type=settings.type, **head, **options
    )


def sequence_loss(
    hidden: Tensor, head: Mapping[str, Any], batch: Batch, settings: LossConfig
) -> PolicyLoss:
    """gspo: Group Sequence Policy Optimization (arXiv 2507.18071, eq. 5 to 7)::

        s_i = exp(1/|o_i| sum_t (logp_t - old_t))
        loss_t = -min(s_i A_t, clip(s_i, 1 - clip_low, 1 + clip_high) A_t)

    It is the loss of ppo with s_i in place of each token's ratio. The tokens of a response are
    coupled, so this is torch on the log-probs of the op, not a mode of it. With weights
    1 / (N |o_i|), loss.aggregation=seq_mean, it is the paper's.
    """

    def mean_of_response(log_ratio: Tensor) -> Tensor:
        none, response = log_ratio.new_zeros(len(batch.counts)), batch.rows
        sums = none.index_add(0, response, log_ratio)
        counts = none.index_add(0, response, torch.ones_like(log_ratio))
        return (sums / counts.clamp(min=1))[response]

    out = ops.lm_head_logprobs(hidden, targets=batch.targets, **head)
    return reference.loss_of_logprobs(
        out.logprobs, out.entropy, log_ratio_of=mean_of_response, **_options(batch, settings)
    )


LOSSES: dict[str, Loss] = {"ppo": token_loss, "cispo": token_loss, "gspo": sequence_loss}
"""loss.type to the loss"""


def _options(batch: Batch, settings: LossConfig) -> dict[str, Any]:
    in_loss = settings.kl_coef if settings.kl_estimator != "k1_reward" else 0.0
    return {
        "old_logprobs": batch.streams["old"],
        "advantages": batch.streams["advantage"],
        "token_weights": batch.streams["weight"],
        "clip_low": settings.clip_low,
        "clip_high": settings.clip_high,
        "dual_clip": settings.dual_clip,
        "max_log_ratio": settings.max_log_ratio,
        "ref_logprobs": batch.streams["reference"] if in_loss else None,
        "kl_coef": in_loss,
        "kl_estimator": settings.kl_estimator if in_loss else "k3",
        "entropy_coef": settings.entropy_coef,
        "importance_weights": batch.streams.get("importance"),
    }


def with_weights(
    rollouts: Sequence[Rollout], aggregation: str, longest: int | None = None
) -> list[Rollout]:
    """The responses of one optimiser update with their stream `weight`, from the counts of all of
    them, so that no split into micro-batches changes the loss.

    With |o_i| counted tokens in response i of N::

        token_mean        1 / sum_i |o_i|
        seq_mean          1 / (N |o_i|)       the paper's
        seq_sum           1 / N
        seq_sum_longest   1 / (N longest)     Dr.GRPO's
    """
    n, total = len(rollouts), max(sum(r.count for r in rollouts), 1)
    weight_of: dict[str, Callable[[Rollout], float]] = {
        "token_mean": lambda r: 1 / total,
        "seq_mean": lambda r: 1 / (n * max(r.count, 1)),
        "seq_sum": lambda r: 1 / n,
        "seq_sum_longest": lambda r: 1 / (n * (longest or 1)),
    }
    weight = weight_of[aggregation]
    return with_streams(rollouts, "weight", (torch.full((r.count,), weight(r)) for r in rollouts))


def with_importance_weights(rollouts: Sequence[Rollout], cap: float) -> list[Rollout]:
    """The stream `importance`: min(pi / pi_engine, cap) of each token. pi is the final policy in
    both phases: the engine never samples from another, and with pi^l the weight would be the whole
    distance of pi^l."""
    factors = ((r.stream("final") - r.stream("engine")).exp().clamp(max=cap) for r in rollouts)
    return with_streams(rollouts, "importance", factors)


def drop(rollouts: Sequence[Rollout], max_gap: float | None, truncated: bool) -> list[Rollout]:
    """The same rollouts, with those marked as dropped that have no reward, were truncated (if asked
    for), or whose mean |log pi - log pi_engine| over tokens is above max_gap, or nan. pi is the
    final policy in both phases, as in with_importance_weights; its stream is read with max_gap
    only."""

    def is_dropped(rollout: Rollout) -> bool:
        if rollout.ungraded or (truncated and rollout.finish_reason == "length"):
            return True
        if max_gap is None or not rollout.count:
            return False
        gap = (rollout.stream("final") - rollout.stream("engine")).abs().mean()
        return not float(gap) <= max_gap

    return [replace(rollout, dropped=is_dropped(rollout)) for rollout in rollouts]


def mean_kl(rollouts: Sequence[Rollout]) -> float:
    """k3, the estimate of KL(policy || reference) that is never negative, over all tokens, from the
    streams old and reference."""
    gaps = torch.cat([r.stream("reference").double() - r.stream("old").double() for r in rollouts])
    return float((torch.expm1(gaps) - gaps).mean())
