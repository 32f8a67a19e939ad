"""The clipped importance-ratio loss of RL post-training, computed from hidden states."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bupo.ops import operands, policy_losses, vocabulary_parallel
from bupo.ops.lm_head import lm_head_logprobs
from bupo.ops.policy_losses import OP, Settings
from bupo.ops.reference import loss_of_logprobs
from bupo.ops.registration import accumulator, call
from bupo.ops.results import METRICS, PolicyLoss

__all__ = ["PolicyLoss", "policy_loss"]


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
    loss_type: str = "ppo",
    loss_options: Mapping[str, float] | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    ratio_level: str | None = None,
    sequence_ids: Tensor | None = None,
    max_log_ratio: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_times_ratio: bool = False,
    max_kl: float | None = None,
    entropy_coef: float = 0.0,
    entropy_weights: Tensor | None = None,
    importance_weights: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> PolicyLoss:
    """Computes sum_i token_weights_i * loss_i, and its gradient in the same pass.

    With logp_i and H_i from `lm_head_logprobs`, the log-ratio l_i = logp_i - old_i or that of its
    sequence (see ratio_level), r = exp(l) and A_i = advantages_i, the loss of a token is one of

        "ppo"        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with dual_clip c and A < 0,
                     at most -c A
        "cispo"      -sg(clip(r, ratio_min, ratio_max)) A logp
        "reinforce"  -A logp; takes no old_logprobs
        "sapo", "dppo_tv", "dppo_kl", "dro", "gmpo", "vespo": see docs/ops.md

    times importance_weights_i

        + kl_coef * KL, with g = ref - logp     k1: -g   k2: g^2 / 2   k3: e^g - g - 1   abs: |g|
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
        loss_type: the name of the loss.
        loss_options: numbers of the loss by name, where they differ from its defaults: "cispo" has
            ratio_min (0) and ratio_max (5), the bounds themselves.
        clip_low: of "ppo", whose ratio is clipped to [1 - clip_low, 1 + clip_high]. None: 0.2;
            inf: no bound.
        clip_high: see clip_low.
        dual_clip: of "ppo", c > 1, or None.
        ratio_level: "token"; "sequence", the mean of the log-ratios of a sequence's tokens with
            weight (GSPO); "sequence_sum", their sum (RLOO); "sequence_token", the value of
            "sequence" with the gradient of "token" (GSPO-token). None: the default of the loss,
            "token" for most.
        sequence_ids: int64 [...], the sequence of each token, ascending in the order of the
            flattened tokens. None: each row of targets [..., T] is a sequence.
        max_log_ratio: bounds l to [-max_log_ratio, max_log_ratio], so that no ratio is infinite;
            beyond it, the ratio has no gradient. None: no bound. verl uses 20.
        ref_logprobs: float [...], log-probs of the reference policy of the KL term, and of the
            metric ref_kl even where kl_coef is 0.
        kl_coef: 0 for no KL term.
        kl_estimator: k1, k2, k3 or abs; with a + behind it, the value has the gradient of k2.
        kl_times_ratio: multiplies the KL term by r, which makes its gradient unbiased off-policy.
        max_kl: bounds the KL estimate to [-max_kl, max_kl], beyond which it has no gradient. verl
            uses 10 for k3.
        entropy_coef: positive to raise the entropy.
        entropy_weights: float [...], in place of token_weights in the entropy term, which still has
            no token whose token_weights is 0.
        importance_weights: float [...], e.g. truncated pi_old / pi_rollout. They do not multiply
            the KL and entropy terms.
        group: as in `lm_head_logprobs`, with which the loss is then computed: the gradient
            costs up to three products, over all tokens whose weight is not 0, in backward().

    Returns:
        PolicyLoss(loss, logprobs, entropy, metrics): loss is a float32 scalar (float64 for float64
        input) differentiable in hidden, weight and bias; the rest is detached.

    Raises:
        TypeError, ValueError: for a wrong argument; the message names it, what was expected and
            what came.
        RuntimeError: for a double backward.

    Sources, formulas and the names that other projects use are in docs/ops.md. Tests compare with
    reference.policy_loss.
    """
    divided = group is not None
    args = operands.prepare(OP, hidden, weight, targets, bias, temperature, softcap, divided)
    acc = accumulator(args.hidden.dtype)

    def token(name: str, x: Tensor | None) -> Tensor | None:
        return None if x is None else operands.per_token(OP, name, x, targets, acc)

    settings = policy_losses.settings(
        loss_type=loss_type, loss_options=loss_options, clip_low=clip_low, clip_high=clip_high,
        dual_clip=dual_clip, ratio_level=ratio_level, max_log_ratio=max_log_ratio, kl_coef=kl_coef,
        kl_estimator=kl_estimator, kl_times_ratio=kl_times_ratio, max_kl=max_kl,
        entropy_coef=entropy_coef,
    )  # fmt: skip
    if loss_type == "reinforce" and old_logprobs is not None:
        raise ValueError(
            f"{OP}: old_logprobs must be None for loss_type 'reinforce', in which they play no "
            f"part, got {operands.describe(old_logprobs)}"
        )
    if settings.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"{OP}: ref_logprobs is needed when kl_coef is not 0, got None")
    sequences = policy_losses.sequence_ids_of(settings.ratio_level, sequence_ids, targets)
    given = dict(advantages=advantages, token_weights=token_weights)
    per_token = [operands.per_token(OP, name, x, targets, acc) for name, x in given.items()]
    old_logprobs = token("old_logprobs", old_logprobs)
    optional = (
        sequences,
        token("ref_logprobs", ref_logprobs),
        token("importance_weights", importance_weights),
        token("entropy_weights", entropy_weights),
    )
    if group is not None:
        found = _of_group(args, old_logprobs, per_token, settings, optional, group)
    else:
        grad = torch.is_grad_enabled()
        loss, logprobs, entropy, metrics, losses, *_ = call(
            torch.ops.bupo.policy_loss,
            *args[:3],
            old_logprobs,
            *per_token,
            *args[3:],
            settings.numbers(),
            *optional,
            grad and args.hidden.requires_grad,
            grad and args.weight.requires_grad,
            grad and args.bias is not None and args.bias.requires_grad,
        )
        named = dict(zip(METRICS, metrics.detach().unbind()))
        found = PolicyLoss(loss, logprobs.detach(), entropy.detach(), named, losses.detach())
    shape = targets.shape
    return found._replace(
        logprobs=found.logprobs.reshape(shape),
        entropy=found.entropy.reshape(shape),
        token_losses=found.token_losses.reshape(shape),
    )


def _of_group(
    args: operands.Operands,
    old_logprobs: Tensor | None,
    per_token: list[Tensor],
    settings: Settings,
    optional: tuple[Tensor | None, ...],
    group: ProcessGroup,
) -> PolicyLoss:
    """Computes the loss of a vocabulary that ranks divide, from its log-probs."""
    vocabulary_parallel.check_group(OP, group)
    args = args._replace(targets=args.targets.where(per_token[1] != 0, -1))
    given = (lm_head_logprobs, args, -1, group)
    logp, entropy, _ = vocabulary_parallel.lm_head_logprobs(*given)
    names = ("sequence_ids", "ref_logprobs", "importance_weights", "entropy_weights")
    options = dict(zip(names, optional))
    advantages, token_weights = per_token
    return loss_of_logprobs(
        logp, entropy, old_logprobs, advantages, token_weights, settings, **options
    )
