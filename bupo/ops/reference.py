"""The LM-head ops in eager torch, for tests and as the shortest documentation.

They have the signatures and results of bupo.ops, but store [tokens, vocab] several times. In
float64 they are the reference for the accuracy of the fused ops. loss_of_logprobs, the loss without
the head, also trains: losses of whole responses are computed with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bupo.ops.registration import transforms_active
from bupo.ops.results import LogProbs, PolicyLoss


def lm_head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LogProbs:
    """Computes the same as `bupo.ops.lm_head_logprobs`."""
    keep = targets != ignore_index
    z = F.linear(hidden.masked_fill(~keep[..., None], 0), weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    scale = torch.as_tensor(temperature, dtype=z.dtype, device=z.device).expand(targets.shape)
    z = z / scale.where(keep, 1)[..., None]
    logsumexp = z.logsumexp(-1)
    logp = z - logsumexp[..., None]
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0)).sum(-1)
    index = torch.where(keep, targets, 0)[..., None]
    logprobs = logp.gather(-1, index.long()).squeeze(-1)
    zero = torch.zeros((), dtype=z.dtype)
    return LogProbs(*(torch.where(keep, x, zero) for x in (logprobs, entropy, logsumexp)))


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    loss_type: str = "ppo",
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    max_log_ratio: float | None = None,
) -> PolicyLoss:
    """Computes the same as `bupo.ops.policy_loss`."""
    keep = token_weights != 0
    logp, entropy, _ = lm_head_logprobs(
        hidden,
        weight,
        targets.where(keep, -1),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=-1,
    )
    return loss_of_logprobs(
        logp,
        entropy,
        old_logprobs,
        advantages,
        token_weights,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        loss_type=loss_type,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        importance_weights=importance_weights,
        max_log_ratio=max_log_ratio,
    )


def loss_of_logprobs(
    logp: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    loss_type: str = "ppo",
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    max_log_ratio: float | None = None,
    log_ratio_of: Callable[[Tensor], Tensor] = lambda log_ratio: log_ratio,
) -> PolicyLoss:
    """Computes the same loss from log-probs and entropies, differentiable in both.

    log_ratio_of: maps logp - old of all tokens to the log-ratios that the loss uses; GSPO gives
    every token of a response the mean over it. approx_kl always uses those of single tokens.
    """
    keep = token_weights != 0
    old = logp.detach() if old_logprobs is None else old_logprobs.to(logp.dtype)

    def kept(x: Tensor) -> Tensor:
        return x.to(logp.dtype).where(keep, 0)

    limit = math.inf if max_log_ratio is None else max_log_ratio
    advantages = kept(advantages)

    def of(logp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns for each token its loss without the entropy term, whether it is clipped, its own
        log-ratio and its ratio."""
        token_log_ratio = logp - old.where(keep, logp.detach())
        log_ratio = log_ratio_of(token_log_ratio)
        limited = log_ratio.abs() > limit
        log_ratio = _bounded(log_ratio, -limit, limit)
        moving = (advantages != 0) | log_ratio.isnan()  # 0 * inf must give 0
        ratio, r = log_ratio.exp(), log_ratio.where(moving, 0).exp()
        if loss_type in ("cispo", "reinforce"):  # the latter with ratio 1
            loss = -r.detach().clamp(max=1 + clip_high) * advantages * logp.where(moving, 0)
            clipped = ratio > 1 + clip_high
        else:
            free = -r * advantages
            bounded = -_bounded(r, 1 - clip_low, 1 + clip_high) * advantages
            loss, clipped = torch.maximum(free, bounded), bounded > free
            if dual_clip is not None:
                bound = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
                loss, clipped = torch.minimum(loss, bound), clipped | (loss >= bound)
            clipped = clipped | (limited & (advantages != 0))
        if importance_weights is not None:
            loss = loss * kept(importance_weights)
        if kl_coef:
            assert ref_logprobs is not None
            gap = kept(ref_logprobs) - logp
            kl = {"k1": -gap, "k2": gap**2 / 2, "k3": torch.expm1(gap) - gap}[kl_estimator]
            loss = loss + kl_coef * kl
        return loss, clipped, _bounded(token_log_ratio, -limit, limit), ratio

    loss, clipped, log_ratio, ratio = of(logp)
    weights = token_weights.to(logp.dtype)
    total = (weights * kept(loss - entropy_coef * entropy)).sum()

    live = keep
    if not entropy_coef:
        live = _has_slope(lambda logp: (weights * kept(of(logp)[0])).sum(), logp)

    def mean(x: Tensor) -> Tensor:
        return kept(x.detach()).sum() / keep.sum().clamp(min=1)

    metrics = {
        "clip_fraction": mean(clipped),
        "ratio_mean": mean(ratio),
        "ratio_max": kept(ratio.detach()).amax() if keep.numel() else kept(ratio.detach()).sum(),
        "approx_kl": mean(torch.expm1(log_ratio) - log_ratio),
        "entropy_mean": mean(entropy),
        "live_fraction": live.to(logp.dtype).sum() / max(keep.numel(), 1),
    }
    return PolicyLoss(total, logp.detach(), entropy.detach(), metrics)


def _bounded(x: Tensor, low: float, high: float) -> Tensor:
    """clamp with gradient 1 at the bounds, as torch's had before 2.15; there it is 0."""
    return torch.where(x > high, high, torch.where(x < low, low, x))


def _has_slope(loss: Callable[[Tensor], Tensor], logp: Tensor) -> Tensor:
    """Whether the loss depends on each log-prob, to first order."""
    if transforms_active():  # where no tensor can be made a leaf
        slope: Tensor = torch.func.grad(loss)(logp.detach())
        return slope != 0
    with torch.enable_grad():
        leaf = logp.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf)
    return slope != 0
