"""Per-token log-probs, entropy and logsumexp of the LM head."""

from __future__ import annotations

import torch
from torch import Tensor

from bupo.ops import operands
from bupo.ops.registration import call
from bupo.ops.results import LogProbs

__all__ = ["LogProbs", "lm_head_logprobs"]


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
    """log p(target), entropy and logsumexp of softmax(f(hidden @ weight.T + bias) / temperature).

    ::

        z_ij = f(x_i . w_j + b_j) / T_i        f = identity, or softcap * tanh(. / softcap)
        L_i = log sum_j exp z_ij     logp_i = z_it - L_i     H_i = L_i - sum_j p_ij z_ij

    [tokens, vocab] is never held: on the CPU memory beyond the outputs is one tile of logits a
    thread, and in backward (which recomputes the logits) one block of about 64 MiB, or 128 tokens'
    logits. A GPU takes the workspace budget (:func:`bupo.ops.set_workspace_bytes`); where the
    logits of all tokens fit that, the forward keeps them for the backward, which then recomputes
    nothing: three passes over the vocabulary rather than four.

    Args:
        hidden: [..., D] float32, float64 or bfloat16. Products accumulate in float32 at least, and
            all results come from the unrounded sums.
        weight: [V, D], the unembedding matrix, of the dtype of hidden. bfloat16 hidden with float32
            weight is computed in float32. Under autocast both are cast as F.linear would.
        targets: int64 (or int32) [...], token ids in [0, V) or ignore_index.
        bias: [V]; -inf removes an entry of the vocabulary (not with a softcap: f(-inf) = -softcap).
        temperature: a positive number, or a tensor that broadcasts to [...]; not differentiable.
        softcap: applied before the temperature (Gemma); None for none.
        ignore_index: tokens with this target give 0, 0, 0 and no gradient, whatever they hold.

    Returns:
        LogProbs(logprobs, entropy, logsumexp), each [...], float32 (float64 for float64 input), in
        nats, each differentiable in hidden, weight and bias. A row whose logits are all -inf, or
        that holds nan, gives nan and leaves the other rows alone.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also for a
            target out of range (on the CPU). RuntimeError: double backward.

    Derived in docs/ops.md; reference.lm_head_logprobs is the oracle.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(
            "bupo.ops.lm_head_logprobs: ignore_index must be an int, got "
            f"{operands.describe(ignore_index)}"
        )
    args = operands.prepare(
        "bupo.ops.lm_head_logprobs", hidden, weight, targets, bias, temperature, softcap
    )
    trained = (args.hidden, args.weight, args.bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in trained)
    # How much is kept depends on the budget, and a compiled graph has to know its sizes.
    keep = keep and not torch.compiler.is_compiling()
    *outputs, _ = call(torch.ops.bupo.lm_head_logprobs, *args, ignore_index, keep)
    return LogProbs(*(x.reshape(targets.shape) for x in outputs))
