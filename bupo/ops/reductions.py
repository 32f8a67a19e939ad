"""The weights that make a sum over tokens the mean that a loss is meant to be."""

from __future__ import annotations

import torch
from torch import Tensor

from bupo.ops.operands import describe

REDUCTIONS = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
    "token_sum",
)


def token_weights(
    mask: Tensor,
    reduction: str,
    *,
    tokens: float | Tensor | None = None,
    sequences: float | Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """Returns the token_weights of `policy_loss` for a mask and the name of a reduction.

    With n_s tokens of mask 1 in sequence s, each token of mask 1 gets the weight::

        token_mean               1 / tokens                TRL: dapo, bnpo, cispo
        seq_mean_token_mean      1 / (sequences n_s)       TRL: grpo, sapo; GSPO
        seq_mean_token_sum       1 / sequences             TRL: luspo
        seq_mean_token_sum_norm  1 / (sequences longest)   TRL: dr_grpo
        token_sum                1

    The names are those of verl's loss_agg_mode.

    Args:
        mask: [B, T] bool or 0 and 1, a row for each sequence.
        reduction: one of the names above.
        tokens: the number of tokens in the whole optimiser step, over all micro-batches and ranks.
            None: those of this mask.
        sequences: the same for sequences. None: the rows of this mask that have a token.
        longest: the constant length of seq_mean_token_sum_norm. None: T.

    Returns:
        float32 [B, T].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    op = "bupo.ops.token_weights"
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise TypeError(f"{op}: mask must be a [B, T] tensor, got {describe(mask)}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    weights = mask.float()
    counts = weights.sum(-1, keepdim=True)
    if tokens is None:
        tokens = counts.sum().clamp(min=1)
    if sequences is None:
        sequences = (counts > 0).sum().clamp(min=1)
    divisors: dict[str, float | Tensor] = {
        "token_mean": tokens,
        "seq_mean_token_mean": sequences * counts.clamp(min=1),
        "seq_mean_token_sum": sequences,
        "seq_mean_token_sum_norm": sequences * (longest or mask.shape[1]),
        "token_sum": torch.ones(()),
    }
    return weights / divisors[reduction]
