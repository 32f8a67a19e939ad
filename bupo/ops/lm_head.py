"""Per-token log-probs, entropy and logsumexp of the LM head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bupo.ops import operands, vocabulary_parallel
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
    group: ProcessGroup | None = None,
) -> LogProbs:
    """Computes log p(target), entropy and logsumexp of
    softmax(f(hidden @ weight.T + bias) / temperature):

        z_ij = f(x_i . w_j + b_j) / T_i        f = identity, or softcap * tanh(. / softcap)
        L_i = log sum_j exp z_ij     logp_i = z_it - L_i     H_i = L_i - sum_j p_ij z_ij

    [tokens, vocab] is never stored. On the CPU, the memory beyond the outputs is one tile of logits
    per thread, and in the backward (which recomputes the logits) one block of about 64 MiB, or of
    the logits of 128 tokens. A GPU uses the workspace budget
    (`set_workspace_bytes`). If the logits of all tokens fit into it, the forward
    keeps them and the backward recomputes nothing: three passes over the vocabulary, not four.

    Args:
        hidden: [..., D] float32, float64 or bfloat16. Products accumulate in at least float32, and
            all results come from the unrounded sums.
        weight: [V, D], the unembedding matrix, of the dtype of hidden. bfloat16 hidden with float32
            weight is computed in float32. Under autocast both are cast as in F.linear.
        targets: int64 (or int32) [...], token ids in [0, V) or ignore_index.
        bias: [V]; -inf removes an entry of the vocabulary (not with a softcap: f(-inf) = -softcap).
        temperature: a positive number, or a tensor that broadcasts to [...]; not differentiable.
        softcap: applied before the temperature (Gemma); None for no softcap.
        ignore_index: tokens with this target give 0, 0, 0 and no gradient, whatever their values.
        group: a process group whose ranks divide the vocabulary: weight and bias are the rows of
            this rank, perhaps none, which follow those of the rank before it. All else is equal on
            all ranks, and so are the results and the gradient of hidden; those of weight and bias
            are of this rank's rows. One exchange of 3 numbers per token in the forward, one of the
            gradient of hidden in the backward, which all ranks have to run.

    Returns:
        LogProbs(logprobs, entropy, logsumexp), each [...], float32 (float64 for float64 input), in
        nats, each differentiable in hidden, weight and bias. A row whose logits are all -inf, or
        that holds nan, gives nan and does not affect the other rows.

    Raises:
        TypeError, ValueError: for a wrong argument or, on the CPU, a target out of range; the
            message names the argument, what was expected and what came.
        RuntimeError: for a double backward.

    The derivation is in docs/ops.md. Tests compare with reference.lm_head_logprobs.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(
            "bupo.ops.lm_head_logprobs: ignore_index must be an int, got "
            f"{operands.describe(ignore_index)}"
        )
    op, divided = "bupo.ops.lm_head_logprobs", group is not None
    args = operands.prepare(op, hidden, weight, targets, bias, temperature, softcap, divided)
    if group is not None:
        vocabulary_parallel.check_group(op, group)
        given = (lm_head_logprobs, args, ignore_index, group)
        found = vocabulary_parallel.lm_head_logprobs(*given)
        return LogProbs(*(x.reshape(targets.shape) for x in found))
    trained = (args.hidden, args.weight, args.bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in trained)
    # The kept logits' size depends on the budget, but a compiled graph needs fixed sizes.
    keep = keep and not torch.compiler.is_compiling()
    *outputs, _ = call(torch.ops.bupo.lm_head_logprobs, *args, ignore_index, keep)
    return LogProbs(*(x.reshape(targets.shape) for x in outputs))
