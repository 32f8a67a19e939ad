"""Whole rows of a policy's log-probs, for a few tokens at a time, and divergences between them.

Ranks, top tokens and divergences need these rows. For entropies and log-probs of targets, the fused
ops do without them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bupo.policy import Unembedding

BLOCK = 8192
"""Number of vocabulary entries whose weights are converted to float32 at once"""


def log_probs(head: Unembedding, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the log-softmax [n, V] of hidden [n, D] through a head, in float32. Products of a
    head in 16 bits are summed and kept in float32, as in the fused ops."""
    exact = torch.promote_types(head.weight.dtype, torch.float32)
    block = len(head.weight) if head.weight.dtype == exact else BLOCK
    weights = torch.split(head.weight, block)
    biases = [None] * len(weights) if head.bias is None else torch.split(head.bias, block)
    logits = [
        head._replace(weight=w.to(exact), bias=None if b is None else b.to(exact)).logits(
            hidden.to(exact)
        )
        for w, b in zip(weights, biases)
    ]
    rows = (logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1)).float()
    return (rows if temperature == 1 else rows / temperature).log_softmax(-1)


def kl_rows(logp: Tensor, logq: Tensor) -> Tensor:
    """Returns KL(p || q) of each row, [n, V], [n, V] -> [n]. An entry of p = 0 adds nothing, even
    if the head's bias has masked it in both policies."""
    p = logp.exp()
    gap = torch.where(p > 0, logp - logq, torch.zeros((), device=p.device))
    return (p * gap).sum(-1).clamp(min=0)
