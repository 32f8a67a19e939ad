"""The optimiser updates of a step, for the policy and for the critic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor, nn

from bupo import progress
from bupo.finite import first_bad
from bupo.rl.optimizer import AdamW, clip_gradients
from bupo.samples import Batch
from bupo.types import Rollout


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a micro-batch, and what is to be known of it."""

    loss: Tensor
    """Scalar. The sum over the micro-batches of an update is the loss of that update"""
    metrics: Mapping[str, Tensor]
    """Scalars: means over the counted tokens; one whose name ends in _max is a maximum"""
    made_of: Mapping[str, Tensor]
    """What goes into the loss, in this order: where a loss that is not finite can come from"""


class LossOfBatch(Protocol):
    """The loss of a micro-batch of an update that has this number of counted tokens in all."""

    def __call__(self, batch: Batch, tokens: int) -> BatchLoss: ...


@dataclass(frozen=True)
class Updates:
    """What the updates of a step have done."""

    metrics: dict[str, float]
    """Those of the micro-batches over all tokens of the step; loss and grad_norm, means over the
    updates that were made; skipped_updates"""
    changed: frozenset[str]
    """Names of the parameters that have moved"""
    skipped: list[str]
    """Why, for each update that was skipped because its loss or its gradient is not finite"""


def mini_batches(rollouts: Sequence[Rollout], number: int) -> list[list[Rollout]]:
    """Whole prompt groups, dealt out to `number` optimiser updates (at most one a group), without
    the dropped responses."""
    groups = sorted({r.group for r in rollouts})
    number = min(number, len(groups))
    dealt = [set(groups[part::number]) for part in range(number)]
    return [[r for r in rollouts if r.group in chosen and not r.dropped] for chosen in dealt]


def optimise(
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    parts: Sequence[Sequence[Rollout]],
    batches: Callable[[Sequence[Rollout]], Iterator[Batch]],
    loss: LossOfBatch,
    grad_clip: float,
) -> Updates:
    """One update for each part: gradients are summed over its micro-batches, clipped, applied.

    An update whose loss or gradient norm is not finite is skipped, and the first tensor that is not
    finite is named.
    Nothing in a micro-batch waits for a GPU: losses and metrics are read once, after the part.
    """
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    losses: list[float] = []
    norms: list[float] = []
    changed: set[str] = set()
    skipped: list[str] = []
    all_tokens = 0
    for number, part in enumerate(parts, start=1):
        tokens = sum(rollout.count for rollout in part)
        part_losses: list[Tensor] = []
        with progress.part((number - 1) / len(parts), number / len(parts)):
            for batch in batches(part):
                out = loss(batch, tokens)
                out.loss.backward()
                part_losses.append(out.loss.detach().double())
                for name, value in out.metrics.items():
                    value = value.detach().double()
                    if name.endswith("_max"):
                        before = largest.get(name, torch.zeros_like(value))
                        largest[name] = torch.fmax(before, value)  # nan aside
                    else:
                        sums[name] = sums.get(name, 0.0) + value * len(batch.targets)
                del out  # its hidden states make room for those of the next micro-batch
        all_tokens += tokens
        total = sum(torch.stack(part_losses).tolist()) if part_losses else 0.0
        norm = clip_gradients(parameters.values(), grad_clip)
        if math.isfinite(total) and math.isfinite(norm):
            optimizer.step()
            changed |= {name for name, p in parameters.items() if p.grad is not None}
            losses.append(total)
            norms.append(norm)
        else:
            bad = _first_bad(parameters, batches(part), partial(loss, tokens=tokens), total)
            bad = bad or f"loss {total:g}, gradient norm {norm:g}"
            skipped.append(f"update {number} of {len(parts)}: {bad}")
        optimizer.zero_grad(set_to_none=True)  # None, so that weight decay leaves it alone
    metrics = {name: float(x) / max(all_tokens, 1) for name, x in sums.items()}
    metrics |= {name: float(x) for name, x in largest.items()}
    metrics |= {
        "loss": fmean(losses) if losses else math.nan,
        "grad_norm": fmean(norms) if norms else math.nan,
        "skipped_updates": len(skipped),
    }
    return Updates(metrics, frozenset(changed), skipped)


def _first_bad(
    parameters: Mapping[str, nn.Parameter],
    batches: Iterator[Batch],
    loss: Callable[[Batch], BatchLoss],
    total: float,
) -> str | None:
    """Where a loss or a gradient that is not finite comes from. The update has changed nothing, so
    its micro-batches give the same losses once more."""
    if bad := first_bad((f"parameter {name}", p) for name, p in parameters.items()):
        return bad
    if not math.isfinite(total):
        with torch.no_grad():
            for batch in batches:
                out = loss(batch)
                if not bool(out.loss.isfinite()):
                    return first_bad(out.made_of.items()) or "loss"
    return first_bad((f"gradient of {name}", p.grad) for name, p in parameters.items())
