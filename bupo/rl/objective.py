"""What an update minimises: the weight of each token, and the correction for the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bupo.rl.types import Rollout


def token_weights(
    lengths: Sequence[int], aggregation: str, longest: int | None = None
) -> list[float]:
    """The weight of each token of each response, from the counts of the whole optimiser step, so
    that no split into micro-batches changes the loss.

    token_mean 1 / sum of lengths; seq_mean 1 / (N length_i), the paper's; seq_sum 1 / N;
    seq_sum_longest 1 / (N longest), Dr.GRPO's.
    """
    n, total = len(lengths), max(sum(lengths), 1)
    if aggregation == "token_mean":
        return [1 / total] * n
    if aggregation == "seq_mean":
        return [1 / (n * max(length, 1)) for length in lengths]
    if aggregation == "seq_sum_longest":
        assert longest is not None
        return [1 / (n * longest)] * n
    return [1 / n] * n


def importance_weights(
    rollouts: Sequence[Rollout], final_logprobs: Sequence[Tensor], cap: float
) -> list[Tensor]:
    """min(pi / pi_engine, cap) of each token. pi is the final policy in both phases: the engine
    never samples from another, and with pi^l the weight would be the whole distance of pi^l."""
    pairs = zip(final_logprobs, rollouts)
    return [(x - torch.tensor(r.logprobs)).exp().clamp(max=cap) for x, r in pairs]
