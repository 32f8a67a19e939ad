"""What the ops return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogProbs(NamedTuple):
    """Per-token results, each of the shape of ``targets``; ignored tokens hold 0.

    float32 (float64 for float64 input), in nats.
    """

    logprobs: Tensor
    """log p(target)"""
    entropy: Tensor
    """-sum_j p_j log p_j, in [0, ln V]"""
    logsumexp: Tensor
    """log sum_j exp z_j of the logits after softcap and temperature"""


class PolicyLoss(NamedTuple):
    """The loss, ready for ``backward()``, and what it was made from (detached)."""

    loss: Tensor
    """sum of token_weights times per-token loss, a scalar"""
    logprobs: Tensor
    """per token, 0 where token_weights is 0"""
    entropy: Tensor
    """per token, nats, 0 where token_weights is 0"""
    metrics: dict[str, Tensor]
    """Scalars over the tokens with weight: clip_fraction, ratio_mean, ratio_max, approx_kl (k3
    estimate of KL(old || new)), entropy_mean; and live_fraction, the share of all tokens that took
    part in the gradient products."""
