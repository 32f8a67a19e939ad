"""The LM head divided by vocabulary among the ranks of a process group, which hold equal hidden
states. Nothing of the size of the head or of the logits is sent.

From its rows, rank r has L_r, the logsumexp, H_r, the entropy, and, if the target is among them,
logp_r. Let a = log sum_r exp(L_r) and p_r = exp(L_r - a), the probability of rank r's tokens. Then,
with s for the rank of the target,

    logsumexp = a      logp = logp_s + L_s - a      H = sum_r p_r (H_r + a - L_r)

All gradients follow from these, as every rank computes the same result from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bupo.ops.operands import Operands, describe
from bupo.ops.registration import accumulator
from bupo.ops.results import LogProbs


def check_group(op: str, group: object) -> None:
    """Raises TypeError unless it is a process group of which this process is a member."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: group must be a torch.distributed.ProcessGroup that this rank is a member of, "
            f"got {describe(group)}"
        )


class _Gathered(torch.autograd.Function):
    """x [3, N] of each rank -> [R, 3, N]. Every rank computes the same loss of all of them, so the
    gradient of its own is what arrives here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank = dist.get_rank(group)
        found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, x.contiguous(), group=group)
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.rank], None


class _Shared(torch.autograd.Function):
    """x, whose gradient is the sum of those of all ranks, added in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].to(accumulator(gradients[0].dtype), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(gradients[0].dtype), None


def lm_head_logprobs(
    op: Callable[..., LogProbs], args: Operands, ignore_index: int, group: dist.ProcessGroup
) -> LogProbs:
    """Does what bupo.ops.lm_head_logprobs, which is passed as op, does with a group, for tokens
    flattened to N."""
    hidden, weight, targets, bias, temperature, softcap = args
    size = torch.tensor([weight.shape[0]], device=hidden.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    ends, rank = torch.cat(sizes).cumsum(0), dist.get_rank(group)
    keep = targets != ignore_index
    owner = torch.searchsorted(ends, targets, right=True)
    known = (targets >= 0) & (owner < len(ends))
    if hidden.device.type == "cpu" and not bool((known | ~keep).all()):
        wrong = int(targets[~known & keep][0])
        raise ValueError(
            f"bupo.ops.lm_head_logprobs: targets must be in [0, {int(ends[-1])}) or ignore_index "
            f"({ignore_index}), got {wrong}"
        )
    owner = owner.clamp(max=len(ends) - 1)
    rows = (targets - (ends[rank] - weight.shape[0])).where(owner == rank, 0).where(keep, -100)

    hidden = _Shared.apply(hidden, group)  # type: ignore[no-untyped-call]
    if not len(weight):  # the graph has to reach hidden, whose gradient is a sum over all ranks
        zero = 0 * hidden[:, 0].to(accumulator(hidden.dtype)).nan_to_num(0, 0, 0)
        mine = LogProbs(zero, zero, zero - torch.inf)
    else:
        removed = None  # whether the bias removes all rows of this rank
        if bias is not None and not softcap:
            removed = bias.isneginf().all()
            bias = bias.where(~removed, 0)
        heat = 1.0 if temperature is None else temperature
        options = {"bias": bias, "temperature": heat, "softcap": softcap or None}
        mine = op(hidden, weight, rows, ignore_index=-100, **options)
        if removed is not None:
            mine = mine._replace(logsumexp=mine.logsumexp.where(~removed, -torch.inf))
    together = _Gathered.apply(torch.stack(mine), group)  # type: ignore[no-untyped-call]
    logp, entropy, of_rank = together.unbind(1)
    return _whole(logp, entropy, of_rank, owner, known, keep)


def _whole(
    logp: Tensor, entropy: Tensor, of_rank: Tensor, owner: Tensor, known: Tensor, keep: Tensor
) -> LogProbs:
    """logp, entropy, of_rank (logsumexp): [R, N], those of each rank. owner, known, keep: [N], the
    rank of the target, whether there is one, and whether the token is not ignored."""
    absent = of_rank.isneginf()  # all of the rank's tokens are removed
    # The largest one is left out of the sum, and its difference from itself has no gradient. So
    # what little the others add is not rounded off.
    place = of_rank.detach().argmax(0, keepdim=True)
    largest = of_rank.gather(0, place)
    rest = (of_rank - largest).scatter(0, place, 0.0)
    whole = rest.exp().scatter(0, place, 0.0).sum(0).log1p()
    whole = whole + 0 * largest[0].detach()  # nan, if all tokens of all ranks are removed
    behind = (whole - rest).masked_fill(absent, 0)
    mixed = ((rest - whole).exp() * (entropy + behind)).sum(0)
    target = (logp - behind).masked_fill(absent, -torch.inf).gather(0, owner[None])[0]
    target = target.where(known, torch.nan)
    zero = torch.zeros((), dtype=whole.dtype, device=whole.device)
    return LogProbs(*(torch.where(keep, x, zero) for x in (target, mixed, largest[0] + whole)))
