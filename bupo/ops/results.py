"""The result types of the ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogProbs(NamedTuple):
    """Per-token results in nats, each of the shape of ``targets``; ignored tokens hold 0.

    They are float32 (float64 for float64 input).
    """

    logprobs: Tensor
    """log p(target)"""
    entropy: Tensor
    """-sum_j p_j log p_j, in [0, ln V]"""
    logsumexp: Tensor
    """log sum_j exp z_j, where z_j are the logits after softcap and temperature"""


class PolicyLoss(NamedTuple):
    """The loss, ready for ``backward()``, and detached results of the same pass."""

    loss: Tensor
    """sum of token_weights times per-token loss, a scalar"""
    logprobs: Tensor
    """per token, 0 where token_weights is 0"""
    entropy: Tensor
    """per token, nats, 0 where token_weights is 0"""
    metrics: dict[str, Tensor]
    """Scalars over the tokens with nonzero weight: clip_fraction, ratio_mean, ratio_max, approx_kl
    (k3 estimate of KL(old || new)), entropy_mean; and live_fraction, the share of all tokens that
    are part of the gradient products."""
