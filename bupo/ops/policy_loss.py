"""The clipped importance-ratio loss of RL post-training, computed from hidden states."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bupo.ops import operands, vocabulary_parallel
from bupo.ops.lm_head import lm_head_logprobs
from bupo.ops.reference import loss_of_logprobs
from bupo.ops.registration import KL_ESTIMATORS, LOSS_TYPES, METRICS, accumulator, call
from bupo.ops.results import PolicyLoss

__all__ = ["PolicyLoss", "policy_loss"]

_OP = "bupo.ops.policy_loss"
_LARGEST = sys.float_info.max


def _number(name: str, x: float, low: float, why: str, high: float = math.inf) -> float:
    x = operands.number(_OP, name, x)
    if not (low <= x <= high):
        raise ValueError(f"{_OP}: {name} must be {why}, got {x}")
    return x


def _choice(name: str, x: str, choices: tuple[str, ...]) -> int:
    if x not in choices:
        raise ValueError(f"{_OP}: {name} must be one of {', '.join(choices)}, got {x!r}")
    return choices.index(x)


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
    group: ProcessGroup | None = None,
) -> PolicyLoss:
    """Computes sum_i token_weights_i * loss_i, and its gradient in the same pass.

    With logp_i and H_i from `lm_head_logprobs`, r_i = exp(logp_i - old_i) and
    A_i = advantages_i, the loss of a token is:

        "ppo":    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with dual_clip c and A < 0,
                  at most -c A
        "cispo":  -sg(min(r, 1 + clip_high)) A logp
        "reinforce":  -A logp; takes no old_logprobs
        times importance_weights_i
        + kl_coef * KL, with g = ref - logp      k1: -g    k2: g^2 / 2    k3: e^g - g - 1
        - entropy_coef * H

    The forward costs one product of hidden and weight, and the gradient two more over live tokens
    only: a token with weight 0, with a clipped ratio, or with advantage 0 (and no KL or entropy
    term) has gradient 0 and is left out of them; only a GPU keeps the clipped ones, as zeros.
    `backward()` only scales the stored gradients. Without grad mode, or with frozen hidden and
    weight, none are computed or stored.

    Args:
        hidden: as in `lm_head_logprobs`.
        weight: as in `lm_head_logprobs`.
        targets: as in `lm_head_logprobs`.
        old_logprobs: float [...], log-probs of the policy in the denominator of the ratio. None:
            those of this call, without a gradient, as in a step whose rollouts are of this very
            policy. Then every ratio is 1 and nothing is clipped; there is no further pass.
        advantages: float [...], A.
        token_weights: float [...], mask and normaliser in one (for example mask / total tokens of
            the optimiser step). A token with weight 0 is excluded and costs nothing, even if it
            holds nan or a target out of range.
        bias: as in `lm_head_logprobs`.
        temperature: as in `lm_head_logprobs`.
        softcap: as in `lm_head_logprobs`.
        clip_low: the ratio is clipped to [1 - clip_low, 1 + clip_high]; inf: no bound.
        clip_high: see clip_low.
        dual_clip: c > 1, or None.
        ref_logprobs: float [...], log-probs of the reference policy of the KL term.
        importance_weights: float [...], e.g. truncated pi_old / pi_rollout. They do not multiply
            the KL and entropy terms.
        max_log_ratio: bounds log r_i to [-max_log_ratio, max_log_ratio], so that no ratio is
            infinite; beyond it, "ppo" has no gradient. None: no bound. verl uses 20.
        group: as in `lm_head_logprobs`, with which the loss is then computed: the gradient
            costs up to three products, over all tokens whose weight is not 0, in backward().

    Returns:
        PolicyLoss(loss, logprobs, entropy, metrics): loss is a float32 scalar (float64 for float64
        input) differentiable in hidden, weight and bias; the rest is detached.

    Raises:
        TypeError, ValueError: for a wrong argument; the message names it, what was expected and
            what came.
        RuntimeError: for a double backward.

    Sources: PPO/GRPO (2402.03300), dual clip (1912.09729), CISPO (2506.13585), BuPO's J_IPA
    (2512.19673). The derivation is in docs/ops.md. Tests compare with reference.policy_loss.
    """
    divided = group is not None
    args = operands.prepare(_OP, hidden, weight, targets, bias, temperature, softcap, divided)
    acc = accumulator(args.hidden.dtype)

    def token(name: str, x: Tensor | None) -> Tensor | None:
        return None if x is None else operands.per_token(_OP, name, x, targets, acc)

    if loss_type == "reinforce" and old_logprobs is not None:
        raise ValueError(
            f"{_OP}: old_logprobs must be None for loss_type 'reinforce', in which they play no "
            f"part, got {operands.describe(old_logprobs)}"
        )
    settings = [  # in the order of PolicySettings in csrc/row_math.h
        _number("clip_low", clip_low, 0, "at least 0 (inf: no bound)"),
        _number("clip_high", clip_high, 0, "at least 0 (inf: no bound)"),
        math.inf if dual_clip is None else _number("dual_clip", dual_clip, 1, "at least 1 or None"),
        # REINFORCE is CISPO with ratio 1
        float(min(_choice("loss_type", loss_type, LOSS_TYPES), 1)),
        _number("kl_coef", kl_coef, -_LARGEST, "finite", _LARGEST),
        float(_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)),
        _number("entropy_coef", entropy_coef, -_LARGEST, "finite", _LARGEST),
        math.inf
        if max_log_ratio is None
        else _number("max_log_ratio", max_log_ratio, 0, "at least 0 or None"),
    ]
    if settings[4] != 0 and ref_logprobs is None:
        raise ValueError(f"{_OP}: ref_logprobs is needed when kl_coef is not 0, got None")
    given = dict(advantages=advantages, token_weights=token_weights)
    per_token = [operands.per_token(_OP, name, x, targets, acc) for name, x in given.items()]
    old_logprobs = token("old_logprobs", old_logprobs)
    optional = token("ref_logprobs", ref_logprobs), token("importance_weights", importance_weights)
    if group is not None:
        options = dict(
            clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, loss_type=loss_type,
            kl_coef=kl_coef, kl_estimator=kl_estimator, entropy_coef=entropy_coef,
            max_log_ratio=max_log_ratio,
        )  # fmt: skip
        found = _of_group(args, old_logprobs, per_token, *optional, options, group)
        shaped = {x: getattr(found, x).reshape(targets.shape) for x in ("logprobs", "entropy")}
        return found._replace(**shaped)
    grad = torch.is_grad_enabled()
    loss, logprobs, entropy, metrics, *_ = call(
        torch.ops.bupo.policy_loss,
        *args[:3],
        old_logprobs,
        *per_token,
        *args[3:],
        settings,
        *optional,
        grad and args.hidden.requires_grad,
        grad and args.weight.requires_grad,
        grad and args.bias is not None and args.bias.requires_grad,
    )
    return PolicyLoss(
        loss,
        logprobs.detach().reshape(targets.shape),
        entropy.detach().reshape(targets.shape),
        dict(zip(METRICS, metrics.detach().unbind())),
    )


def _of_group(
    args: operands.Operands,
    old_logprobs: Tensor | None,
    per_token: list[Tensor],
    reference: Tensor | None,
    importance: Tensor | None,
    options: dict[str, Any],
    group: ProcessGroup,
) -> PolicyLoss:
    """Computes the loss of a vocabulary that ranks divide, from its log-probs."""
    vocabulary_parallel.check_group(_OP, group)
    args = args._replace(targets=args.targets.where(per_token[1] != 0, -1))
    given = (lm_head_logprobs, args, -1, group)
    logp, entropy, _ = vocabulary_parallel.lm_head_logprobs(*given)
    options |= {"ref_logprobs": reference, "importance_weights": importance}
    return loss_of_logprobs(logp, entropy, old_logprobs, *per_token, **options)
