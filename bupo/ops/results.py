"""The result types of the ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

METRICS = (
    "clip_fraction",
    "ratio_mean",
    "ratio_max",
    "approx_kl",
    "entropy_mean",
    "live_fraction",
    "clip_low_fraction",
    "clip_high_fraction",
    "clip_dual_fraction",
    "approx_kl_k1",
    "ref_kl",
)
"""Metrics of policy_loss: over the tokens with nonzero weight, the share that is clipped, in all
and below, above and by the dual clip; mean and maximum of the ratio in the loss; k3 and k1
estimates of KL(old || new); the means of the entropy and of the KL estimate against the reference;
and the share of all tokens that take part in the gradient products (live_fraction). A new one goes
last, here and in PolicySums::write of csrc/policy_math.h."""


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
    """Scalars, named in METRICS"""
    token_losses: Tensor
    """per token, before its weight and without the entropy term, 0 where token_weights is 0"""


class Divergence(NamedTuple):
    """The loss, ready for ``backward()``, and what it is a sum of."""

    loss: Tensor
    """sum of token_weights times divergence, a scalar"""
    divergence: Tensor
    """per token, in nats, detached, 0 where token_weights is 0"""
