"""The LM-head ops in eager torch, for tests and as the shortest documentation.

They have the signatures and results of bupo.ops, but store [tokens, vocab] several times. In
float64 they are the reference for the accuracy of the fused ops. loss_of_logprobs, the loss without
the head, also trains: losses of whole responses are computed with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bupo.ops import policy_losses
from bupo.ops.policy_losses import Settings
from bupo.ops.registration import transforms_active
from bupo.ops.results import Divergence, LogProbs, PolicyLoss


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
    z = _logits(hidden, weight, keep, bias, temperature, softcap)
    logsumexp = z.logsumexp(-1)
    logp = z - logsumexp[..., None]
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0)).sum(-1)
    index = torch.where(keep, targets, 0)[..., None]
    logprobs = logp.gather(-1, index.long()).squeeze(-1)
    zero = torch.zeros((), dtype=z.dtype)
    return LogProbs(*(torch.where(keep, x, zero) for x in (logprobs, entropy, logsumexp)))


def _logits(
    hidden: Tensor,
    weight: Tensor,
    keep: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> Tensor:
    z = F.linear(hidden.masked_fill(~keep[..., None], 0), weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    scale = torch.as_tensor(temperature, dtype=z.dtype, device=z.device).expand(keep.shape)
    return z / scale.where(keep, 1)[..., None]


def lm_head_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_temperature: float | Tensor = 1.0,
    teacher_softcap: float | None = None,
    teacher_grad: bool = False,
) -> Divergence:
    """Computes the same as `bupo.ops.lm_head_divergence`."""
    keep = token_weights != 0
    z = _logits(hidden, weight, keep, bias, temperature, softcap)
    y = _logits(
        teacher_hidden, teacher_weight, keep, teacher_bias, teacher_temperature, teacher_softcap
    )
    q, p = z.log_softmax(-1), (y if teacher_grad else y.detach()).log_softmax(-1)
    if kind == "jsd":
        parts = torch.stack([p + math.log(beta), q + math.log1p(-beta)])
        m = torch.logsumexp(parts.where((parts > -math.inf).any(0), 0), 0)
        divergence = beta * _kl_of(p, m) + (1 - beta) * _kl_of(q, m)
    else:
        divergence = _kl_of(p, q) if kind == "forward_kl" else _kl_of(q, p)
    divergence = divergence.where(keep, 0)
    return Divergence((token_weights.to(z.dtype) * divergence).sum(), divergence.detach())


def _kl_of(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of log-probs."""
    some = a > -math.inf
    return (a.exp() * (a.where(some, 0) - b.where(some, 0))).sum(-1)


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
    sequence_ids: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """Computes the same as `bupo.ops.policy_loss`, which lists the options."""
    found = policy_losses.settings(**options)
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
        found,
        sequence_ids=policy_losses.sequence_ids_of(found.ratio_level, sequence_ids, targets),
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        entropy_weights=entropy_weights,
    )


class _Token(NamedTuple):
    """What the loss of every token is made of."""

    r: Tensor
    """the ratio, 1 where the advantage is 0, since 0 * inf must give 0"""
    log_ratio: Tensor
    """the logarithm of the ratio, of all tokens"""
    own_log_ratio: Tensor
    """that of the token itself, without a bound"""
    a: Tensor
    """the advantage"""
    logp: Tensor
    """0 where the advantage is 0"""
    old: Tensor
    held: Tensor
    """whether max_log_ratio bounds the ratio"""
    options: dict[str, float]


_Clips = tuple[Tensor, Tensor, Tensor]
"""Whether a token is clipped below, above and by the dual clip"""


def _ppo(t: _Token) -> tuple[Tensor, _Clips]:
    low, high, dual = 1 - t.options["clip_low"], 1 + t.options["clip_high"], t.options["dual_clip"]
    loss = torch.maximum(-t.r * t.a, -_bounded(t.r, low, high) * t.a)
    bound = torch.where(t.a < 0, -dual * t.a, torch.inf)
    held, at_dual = t.held & (t.a != 0), (t.a < 0) & (t.r >= dual)
    below = ((t.a < 0) & (t.r < low)) | (held & (t.log_ratio < 0))
    above = ((t.a > 0) & (t.r > high)) | (held & (t.log_ratio > 0) & ~at_dual)
    return torch.minimum(loss, bound), (below, above, at_dual)


def _cispo(t: _Token) -> tuple[Tensor, _Clips]:
    low, high = t.options.get("ratio_min", 0.0), t.options.get("ratio_max", math.inf)
    ratio = t.log_ratio.exp()
    loss = -t.r.detach().clamp(low, high) * t.a * t.logp
    return loss, (ratio < low, ratio > high, t.held & False)


def _sapo(t: _Token) -> tuple[Tensor, _Clips]:
    positive, negative = t.options["temperature_positive"], t.options["temperature_negative"]
    heat = _either(t.a > 0, positive, negative, t.a)
    gate = torch.sigmoid(heat * (_bounded(t.r, 0, 1e6) - 1))
    never = t.held & False
    return -gate * 4 / heat * t.a, (never, never, never)


def _dppo(t: _Token, of_kl: bool) -> tuple[Tensor, _Clips]:
    low, high = t.options["divergence_low"], t.options["divergence_high"]
    p, q = t.logp.detach().exp(), t.old.exp()
    above, below = p - q > high, q - p > low
    if of_kl:
        rest = (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
        kl = q * (t.old - t.logp.detach()) + rest
        above, below = (kl > high) & (p > q), (kl > low) & (p < q)
    above, below = above & (t.a > 0), below & (t.a < 0)
    limit = t.options["ratio_max"]
    weight = t.r.detach().clamp(max=limit)
    loss = torch.where(above | below, 0, -weight * t.a * t.logp.where(~(above | below), 0))
    return loss, (below, above, (t.r > limit) & (t.a != 0) & ~(above | below))


def _dro(t: _Token) -> tuple[Tensor, _Clips]:
    never = t.held & False
    return -t.a * t.logp + t.options["beta"] / 2 * t.log_ratio**2, (never, never, never)


def _gmpo(t: _Token) -> tuple[Tensor, _Clips]:
    below = (t.a < 0) & (t.own_log_ratio < -t.options["log_clip_low"])
    above = (t.a > 0) & (t.own_log_ratio > t.options["log_clip_high"])
    return -t.r * t.a, (below, above, t.held & False)


def _vespo(t: _Token) -> tuple[Tensor, _Clips]:
    o, negative = t.options, t.a < 0
    k = _either(negative, o["k_negative"], o["k_positive"], t.a)
    rate = _either(negative, o["lambda_negative"], o["lambda_positive"], t.a)
    phi = (rate + k * t.log_ratio - rate * t.log_ratio.exp()).exp().detach()
    phi = phi.where(~phi.isnan() | t.log_ratio.isnan(), 0)
    never = t.held & False
    return -phi.where(t.a != 0, 0) * t.a * t.logp, (never, never, never)


_LOSSES: dict[str, Callable[[_Token], tuple[Tensor, _Clips]]] = {
    "ppo": _ppo,
    "cispo": _cispo,
    "reinforce": _cispo,
    "sapo": _sapo,
    "dppo_tv": partial(_dppo, of_kl=False),
    "dppo_kl": partial(_dppo, of_kl=True),
    "dro": _dro,
    "gmpo": _gmpo,
    "vespo": _vespo,
}


def _kl(settings: Settings, gap: Tensor) -> Tensor:
    """Returns the KL estimate of the log-probs' gap to the reference, ref - logp."""
    kl = {
        "k1": -gap,
        "k2": gap**2 / 2,
        "k3": torch.expm1(gap) - gap,
        "abs": gap.abs(),
    }[settings.kl_estimator]
    kl = _bounded(kl, -settings.max_kl, settings.max_kl)
    if settings.kl_straight_through:
        k2 = gap**2 / 2
        kl = k2 - k2.detach() + kl.detach()
    return kl


def _log_ratio(
    settings: Settings, own: Tensor, a: Tensor, keep: Tensor, sequence_ids: Tensor | None
) -> Tensor:
    """Returns the log-ratio in the loss of each token, from those of single tokens."""
    if sequence_ids is None:
        return own
    part = own
    if settings.loss_type == "gmpo":
        bound = settings.options
        part = torch.where(a > 0, _bounded(own, -math.inf, bound["log_clip_high"]), own)
        part = torch.where(a < 0, _bounded(part, -bound["log_clip_low"], math.inf), part)
        part = part.where(a != 0, 0)
    ids = sequence_ids.reshape(-1)
    index = torch.cat([ids.new_zeros(min(1, len(ids))), (ids.diff() != 0).cumsum(0)])
    none = part.new_zeros(len(ids))
    sums = none.index_add(0, index, part.where(keep, 0).reshape(-1))
    if settings.ratio_level != "sequence_sum":
        counts = none.index_add(0, index, keep.to(part.dtype).reshape(-1))
        sums = sums / counts.clamp(min=1)
    found = sums[index].reshape(own.shape)
    return (
        found.detach() + own - own.detach() if settings.ratio_level == "sequence_token" else found
    )


def loss_of_logprobs(
    logp: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    token_weights: Tensor,
    settings: Settings,
    *,
    sequence_ids: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
) -> PolicyLoss:
    """Computes the same loss from log-probs and entropies, differentiable in both."""
    keep = token_weights != 0
    old = logp.detach() if old_logprobs is None else old_logprobs.to(logp.dtype)
    old = old.where(keep, logp.detach())

    def kept(x: Tensor) -> Tensor:
        return x.to(logp.dtype).where(keep, 0)

    limit, a = settings.max_log_ratio, kept(advantages)

    def of(logp: Tensor) -> tuple[Tensor, _Clips, Tensor, Tensor, Tensor]:
        """Returns for each token its loss, clips, own log-ratio, ratio and KL estimate."""
        own = logp - old
        level = _log_ratio(settings, own, a, keep, sequence_ids)
        log_ratio = _bounded(level, -limit, limit)
        moving = (a != 0) | log_ratio.isnan()
        r, moving_logp = log_ratio.where(moving, 0).exp(), logp.where(moving, 0)
        held = level.abs() > limit
        token = _Token(r, log_ratio, own, a, moving_logp, old, held, settings.options)
        loss, clips = _LOSSES[settings.loss_type](token)
        if importance_weights is not None:
            loss = loss * kept(importance_weights)
        kl = torch.zeros_like(loss)
        if ref_logprobs is not None:
            kl = _kl(settings, kept(ref_logprobs) - logp)
        if settings.kl_coef:
            factor = log_ratio.exp() if settings.kl_times_ratio else 1
            loss = loss + settings.kl_coef * kl * factor
        return loss, clips, _bounded(own, -limit, limit), log_ratio.exp(), kl

    loss, clips, log_ratio, ratio, kl = of(logp)
    weights = token_weights.to(logp.dtype)
    bonus = weights if entropy_weights is None else entropy_weights.to(logp.dtype)
    total = (weights * kept(loss)).sum()
    if settings.entropy_coef:
        total = total - (kept(bonus) * settings.entropy_coef * kept(entropy)).sum()

    live = _has_slope(lambda logp: (weights * kept(of(logp)[0])).sum(), logp)
    if settings.entropy_coef:
        live = live | (kept(bonus) != 0)

    def mean(x: Tensor) -> Tensor:
        return kept(x.detach()).sum() / keep.sum().clamp(min=1)

    metrics = {
        "clip_fraction": mean(clips[0] | clips[1] | clips[2]),
        "ratio_mean": mean(ratio),
        "ratio_max": kept(ratio.detach()).amax() if keep.numel() else kept(ratio.detach()).sum(),
        "approx_kl": mean(torch.expm1(log_ratio) - log_ratio),
        "entropy_mean": mean(entropy),
        "live_fraction": live.to(logp.dtype).sum() / max(keep.numel(), 1),
        "clip_low_fraction": mean(clips[0]),
        "clip_high_fraction": mean(clips[1]),
        "clip_dual_fraction": mean(clips[2]),
        "approx_kl_k1": mean(-log_ratio),
        "ref_kl": mean(kl),
    }
    return PolicyLoss(total, logp.detach(), entropy.detach(), metrics, kept(loss.detach()))


def _either(condition: Tensor, x: float, y: float, like: Tensor) -> Tensor:
    """torch.where for two numbers, in the dtype of `like`."""
    return torch.where(condition, torch.full_like(like, x), torch.full_like(like, y))


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
