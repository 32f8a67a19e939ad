"""The divergence of two LM heads' distributions over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from bupo.ops import operands
from bupo.ops.registration import accumulator, call
from bupo.ops.results import Divergence

__all__ = ["Divergence", "lm_head_divergence"]

_OP = "bupo.ops.lm_head_divergence"
KINDS = ("forward_kl", "reverse_kl", "jsd")
"""In the order of DivergenceKind in csrc/divergence_math.h"""


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
    """Computes sum_i token_weights_i D_i, and its gradient in the same pass. With the student's
    distribution q = softmax(f(hidden @ weight.T + bias) / temperature) of a token, and the
    teacher's p of its own head:

        "forward_kl"  D = KL(p || q)
        "reverse_kl"  D = KL(q || p)
        "jsd"         D = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q

    Neither logits nor probabilities of all tokens are stored. Forward and backward take four
    products over the tokens with weight: one for the logits of each side, and two for the
    student's gradients. Terms are summed in a form in which nothing cancels, so that divergences
    near 0 keep their digits (see docs/ops.md).

    Args:
        hidden: the student's, as in `lm_head_logprobs`.
        weight: as in `lm_head_logprobs`.
        teacher_hidden: [..., D'] with the leading shape and the dtype of hidden; D' may differ.
        teacher_weight: [V, D'], of the same vocabulary. It may be `weight` itself.
        token_weights: float [...], mask and normaliser in one, as in `policy_loss`. A token with
            weight 0 is excluded, even if it holds nan.
        kind: "forward_kl", "reverse_kl" or "jsd".
        beta: of "jsd", between 0 and 1: the weight of the teacher in m.
        bias: as in `lm_head_logprobs`.
        temperature: as in `lm_head_logprobs`. The loss is not multiplied by its square.
        softcap: as in `lm_head_logprobs`.
        teacher_bias: of the teacher's head, whose options are its own.
        teacher_temperature: see teacher_bias.
        teacher_softcap: see teacher_bias.
        teacher_grad: whether the teacher's side is differentiable too, for two products more.
            By default it is not, even if its tensors require a gradient.

    Returns:
        Divergence(loss, divergence): a float32 scalar (float64 for float64 input), differentiable
        in hidden, weight and bias; and D [...], detached, in nats, 0 where token_weights is 0.

    Raises:
        TypeError, ValueError: for a wrong argument; the message names it, what was expected and
            what came.
        RuntimeError: for a double backward.

    Sources: generalised JSD and on-policy distillation (2306.13649), of a layer's own model
    (2605.29089). Tests compare with reference.lm_head_divergence.
    """
    if kind not in KINDS:
        raise ValueError(f"{_OP}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    beta = operands.number(_OP, "beta", beta)
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"{_OP}: beta must be between 0 and 1, got {beta}; the limits are the kinds forward_kl "
            "(towards 0) and reverse_kl (towards 1)"
        )
    if not isinstance(teacher_grad, bool):
        raise TypeError(
            f"{_OP}: teacher_grad must be a bool, got {operands.describe(teacher_grad)}"
        )
    tensors = {
        "hidden": hidden,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
    }
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dim() < 1:
            raise TypeError(f"{_OP}: {name} must be a [..., D] tensor, got {operands.describe(x)}")
    shape = hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"{_OP}: teacher_hidden must have the shape of hidden but for its last dimension, "
            f"{[*shape, 'D']}, got {operands.describe(teacher_hidden)}"
        )
    none = torch.zeros(shape, dtype=torch.int64, device=hidden.device)
    student = operands.prepare(_OP, hidden, weight, none, bias, temperature, softcap)
    if not teacher_grad:
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    teacher = operands.prepare(
        f"{_OP} (teacher's side)", teacher_hidden, teacher_weight, none, teacher_bias,
        teacher_temperature, teacher_softcap,
    )  # fmt: skip
    if teacher.weight.shape[0] != student.weight.shape[0]:
        raise ValueError(
            f"{_OP}: teacher_weight must have the vocabulary of weight, {student.weight.shape[0]} "
            f"rows, got {operands.describe(teacher_weight)}"
        )
    if teacher.hidden.dtype != student.hidden.dtype:
        raise TypeError(
            f"{_OP}: teacher_hidden must have the dtype of hidden, {student.hidden.dtype}, got "
            f"{operands.describe(teacher_hidden)}"
        )
    acc = accumulator(student.hidden.dtype)
    weights = operands.per_token(_OP, "token_weights", token_weights, none, acc, "hidden's tokens")
    sides = [(x.hidden, x.weight, x.bias, x.temperature, x.softcap) for x in (student, teacher)]
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for side in sides for x in side[:3]]
    loss, divergence, *_ = call(
        torch.ops.bupo.lm_head_divergence,
        *sides[0],
        *sides[1],
        weights,
        KINDS.index(kind),
        beta,
        needs,
    )
    return Divergence(loss, divergence.detach().reshape(shape))
