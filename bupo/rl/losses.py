"""The losses that an update minimises, the weights of tokens, and which responses are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bupo import ops
from bupo.config import LossConfig
from bupo.ops.results import PolicyLoss
from bupo.samples import Batch, with_streams
from bupo.types import Rollout


def policy_loss(
    hidden: Tensor, head: Mapping[str, Any], batch: Batch, settings: LossConfig
) -> PolicyLoss:
    """Computes loss.type of a micro-batch with the fused op; see bupo.ops.policy_loss.

    hidden: [T, D]. head: the arguments of the LM-head ops that describe the head
    (bupo.rl.forward). The batch has the streams old, advantage and weight, and also reference and
    importance if the settings need them.
    """
    in_loss = settings.kl_coef if settings.kl_estimator != "k1_reward" else 0.0
    return ops.policy_loss(
        hidden,
        targets=batch.targets,
        old_logprobs=batch.streams["old"],
        advantages=batch.streams["advantage"],
        token_weights=batch.streams["weight"],
        ref_logprobs=batch.streams["reference"] if in_loss else None,
        importance_weights=batch.streams.get("importance"),
        max_log_ratio=settings.max_log_ratio,
        kl_coef=in_loss,
        kl_estimator=settings.kl_estimator if in_loss else "k3",
        entropy_coef=settings.entropy_coef,
        **LOSSES[settings.type](batch, settings),
        **head,
    )


def _clips(settings: LossConfig) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("clip_low", "clip_high", "dual_clip")}


LOSSES: dict[str, Callable[[Batch, LossConfig], dict[str, Any]]] = {
    "ppo": lambda _, settings: _clips(settings),
    "cispo": lambda _, settings: {
        "loss_type": "cispo",
        "loss_options": {"ratio_max": 1 + settings.clip_high},
    },
    "gspo": lambda batch, settings: (
        _clips(settings) | {"ratio_level": "sequence", "sequence_ids": batch.rows}
    ),
    "gmpo": lambda batch, settings: {
        "loss_type": "gmpo",
        "loss_options": {"log_clip_low": settings.clip_low, "log_clip_high": settings.clip_high},
        "sequence_ids": batch.rows,
    },
    "sapo": lambda _, settings: {"loss_type": "sapo"},
}
"""Maps loss.type to the arguments of bupo.ops.policy_loss that make it"""


def with_weights(
    rollouts: Sequence[Rollout], aggregation: str, longest: int | None = None
) -> list[Rollout]:
    """Adds the stream `weight` to the responses of one optimiser update. The weights depend on the
    counts of all these responses, so no split into micro-batches changes the loss.

    With |o_i| counted tokens in response i of N::

        token_mean        1 / sum_i |o_i|
        seq_mean          1 / (N |o_i|)       as in the paper
        seq_sum           1 / N
        seq_sum_longest   1 / (N longest)     as in Dr.GRPO
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
    """Adds the stream `importance`: min(pi / pi_engine, cap) of each token. pi is the final policy
    in both phases, because the engine always samples from it; with pi^l, the weight would contain
    the whole distance between pi^l and pi."""
    factors = ((r.stream("final") - r.stream("engine")).exp().clamp(max=cap) for r in rollouts)
    return with_streams(rollouts, "importance", factors)


def drop(rollouts: Sequence[Rollout], max_gap: float | None, truncated: bool) -> list[Rollout]:
    """Returns the rollouts and marks as dropped those that have no reward, that were truncated (if
    `truncated`), or whose mean |log pi - log pi_engine| over tokens is above max_gap or nan. pi is
    the final policy, as in with_importance_weights; its stream is read only with max_gap."""

    def is_dropped(rollout: Rollout) -> bool:
        if rollout.ungraded or (truncated and rollout.finish_reason == "length"):
            return True
        if max_gap is None or not rollout.count:
            return False
        gap = (rollout.stream("final") - rollout.stream("engine")).abs().mean()
        return not float(gap) <= max_gap  # also true for nan

    return [replace(rollout, dropped=is_dropped(rollout)) for rollout in rollouts]


def mean_kl(rollouts: Sequence[Rollout]) -> float:
    """Returns the mean of k3 over all tokens, computed from the streams old and reference. k3 is
    the estimate of KL(policy || reference) that is never negative."""
    gaps = torch.cat([r.stream("reference").double() - r.stream("old").double() for r in rollouts])
    return float((torch.expm1(gaps) - gaps).mean())
