"""What an update minimises: the weight of each token, the correction for the engine, and the loss
that needs whole responses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bupo.ops import LogProbs
from bupo.types import Rollout


def token_weights(
    lengths: Sequence[int], aggregation: str, longest: int | None = None
) -> list[float]:
    """The weight of each token of each response, from the counts of the whole optimiser step, so
    that no split into micro-batches changes the loss.

    token_mean 1 / sum of lengths; seq_mean 1 / (N length_i), the paper's; seq_sum 1 / N;
    seq_sum_longest 1 / (N longest), Dr.GRPO's.
    """
    n, total = len(lengths), max(sum(lengths), 1)
    if aggregation == "token_mean":
        return [1 / total] * n
    if aggregation == "seq_mean":
        return [1 / (n * max(length, 1)) for length in lengths]
    if aggregation == "seq_sum_longest":
        assert longest is not None
        return [1 / (n * longest)] * n
    return [1 / n] * n


def importance_weights(
    rollouts: Sequence[Rollout], final_logprobs: Sequence[Tensor], cap: float
) -> list[Tensor]:
    """min(pi / pi_engine, cap) of each token. pi is the final policy in both phases: the engine
    never samples from another, and with pi^l the weight would be the whole distance of pi^l."""
    pairs = zip(final_logprobs, rollouts)
    return [(x - torch.tensor(r.logprobs)).exp().clamp(max=cap) for x, r in pairs]


def drop(
    rollouts: Sequence[Rollout],
    final_logprobs: Sequence[Tensor],
    max_gap: float | None,
    truncated: bool,
) -> float:
    """Marks as dropped the responses without a reward, the truncated ones if asked for, and those
    whose mean |log pi - log pi_engine| over tokens is above max_gap, or nan. pi is the final policy
    in both phases, for the reason given in importance_weights; it is read with max_gap only.
    Returns the share of dropped ones."""
    for n, rollout in enumerate(rollouts):
        rollout.dropped = rollout.ungraded or (truncated and rollout.finish_reason == "length")
        if max_gap is not None and rollout.token_ids:
            gap = (final_logprobs[n] - torch.tensor(rollout.logprobs)).abs().mean()
            rollout.dropped |= not float(gap) <= max_gap
    return sum(r.dropped for r in rollouts) / max(len(rollouts), 1)


def mean_kl(logprobs: Sequence[Tensor], rollouts: Sequence[Rollout]) -> float:
    """k3, the estimate of KL(policy || reference) that is never negative, over all tokens."""
    pairs = [(x, r.ref_logprobs) for x, r in zip(logprobs, rollouts)]
    gaps = torch.cat([ref.double() - x.double() for x, ref in pairs if ref is not None])
    return float((torch.expm1(gaps) - gaps).mean())


def gspo_loss(
    out: LogProbs,
    lengths: Sequence[int],
    old_logprobs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    importance_weights: Tensor | None,
    max_log_ratio: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Group Sequence Policy Optimization (arXiv 2507.18071, eq. 5 to 7), of whole responses::

        s_i = exp(1/|o_i| sum_t (logp_t - old_t))
        loss_t = -min(s_i A_t, clip(s_i, 1 - clip_low, 1 + clip_high) A_t)

    The tokens of a response are coupled, so this is torch on the log-probs of the op, not a mode of
    it. out, old_logprobs, advantages, ... [T], the tokens of responses of these lengths, one after
    the other. Dual clip, KL, entropy, importance weights and metrics as in ops.policy_loss, with
    s_i for the ratio of each token. With weights 1 / (N |o_i|), seq_mean, it is the paper's.
    """
    logprobs = out.logprobs
    counts = torch.tensor(lengths, dtype=torch.long, device=logprobs.device)
    response = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    log_ratio = logprobs - old_logprobs.to(logprobs)
    sums = log_ratio.new_zeros(len(counts)).index_add(0, response, log_ratio)
    mean = (sums / counts.clamp(min=1))[response]
    if max_log_ratio is not None:
        mean = mean.clamp(-max_log_ratio, max_log_ratio)
    moving = (advantages != 0) | mean.isnan()  # an advantage of 0 beats an infinite ratio
    ratio = mean.where(moving, 0).exp()
    free = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss, clipped = torch.maximum(free, bounded), bounded > free
    if dual_clip is not None:
        limit = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        loss, clipped = torch.minimum(loss, limit), clipped | (loss >= limit)
    if importance_weights is not None:
        loss = loss * importance_weights
    if kl_coef:
        assert ref_logprobs is not None
        gap = ref_logprobs.to(logprobs) - logprobs
        loss = (
            loss
            + kl_coef * {"k1": -gap, "k2": gap**2 / 2, "k3": torch.expm1(gap) - gap}[kl_estimator]
        )
    total = (token_weights * (loss - entropy_coef * out.entropy)).sum()
    live = (~clipped & moving) | bool(kl_coef) | bool(entropy_coef)
    with torch.no_grad():
        values = {
            "clip_fraction": clipped.double(),
            "ratio_mean": mean.exp(),
            "approx_kl": torch.expm1(log_ratio) - log_ratio,
            "entropy_mean": out.entropy,
            "live_fraction": live.double(),
        }
        metrics = {name: x.sum() / max(len(x), 1) for name, x in values.items()}
        metrics["ratio_max"] = mean.exp().amax() if len(mean) else mean.sum()
    return total, metrics
