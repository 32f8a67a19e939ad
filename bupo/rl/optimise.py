"""The optimiser updates of a step, for the policy and for the critic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor, nn

from bupo import progress, ranks
from bupo.finite import first_bad
from bupo.rl import sharding
from bupo.rl.forward import Forward
from bupo.rl.optimizer import AdamW, clip_gradients
from bupo.samples import Batch
from bupo.types import Rollout


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a micro-batch, with its metrics and its inputs."""

    loss: Tensor
    """Scalar. The losses of an update's micro-batches add up to the loss of the update"""
    metrics: Mapping[str, Tensor]
    """Scalars: means over the counted tokens; a maximum if the name ends in _max"""
    made_of: Mapping[str, Tensor]
    """The inputs of the loss, in the order in which they are searched if the loss is not finite"""


class LossOfBatch(Protocol):
    """Computes the loss of a micro-batch. tokens: number of counted tokens in the whole update."""

    def __call__(self, batch: Batch, tokens: int) -> BatchLoss: ...


@dataclass(frozen=True)
class Updates:
    """The results of a step's updates."""

    metrics: dict[str, float]
    """The metrics of the micro-batches over all tokens of the step; loss and grad_norm, averaged
    over the updates that were made; skipped_updates"""
    changed: frozenset[str]
    """Names of the parameters that were updated"""
    skipped: list[str]
    """The reason for each update that was skipped because its loss or gradient was not finite"""


def mini_batches(rollouts: Sequence[Rollout], number: int) -> list[list[Rollout]]:
    """Divides the rollouts, in whole prompt groups, among `number` optimiser updates (at most one
    update per group). Dropped responses are left out."""
    groups = sorted({r.group for r in rollouts})
    number = min(number, len(groups))
    dealt = [set(groups[part::number]) for part in range(number)]
    return [[r for r in rollouts if r.group in chosen and not r.dropped] for chosen in dealt]


def optimise(
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    parts: Sequence[Sequence[Rollout]],
    forward: Forward,
    loss: LossOfBatch,
    grad_clip: float,
) -> Updates:
    """Makes one update per part: sums the gradients of its micro-batches, clips and applies them.

    An update whose loss or gradient norm is not finite is skipped, and the first tensor that is not
    finite is named. No micro-batch waits for a GPU: losses and metrics are read only after a part.
    Each rank takes its share of the micro-batches, and all ranks return the same.
    """
    found: list[_Sums] = []
    losses: list[float] = []
    norms: list[float] = []
    changed: set[str] = set()
    skipped: list[str] = []
    for number, (part, shown) in enumerate(zip(parts, progress.parts(len(parts))), start=1):
        of_batch = partial(loss, tokens=sum(rollout.count for rollout in part))
        with shown:
            sums = forward.in_memory(partial(_accumulated, optimizer, forward, part, of_batch))
            sharding.add_gradients(forward.model, parameters.values())
        shares = ranks.gathered(sums.on_host() if ranks.world() > 1 else sums)
        found += shares
        total = sum(sum(torch.stack(s.losses).tolist()) for s in shares if s.losses)
        norm = clip_gradients(parameters.values(), grad_clip)
        if math.isfinite(total) and math.isfinite(norm):
            optimizer.step()
            changed |= {name for name, p in parameters.items() if p.grad is not None}
            losses.append(total)
            norms.append(norm)
        else:
            with progress.part(number / len(parts), number / len(parts)):  # a second pass
                bad = _first_bad(parameters, forward.batches(part), of_batch, total)
            sharding.reshard(forward.model)
            bad = bad or f"loss {total:g}, gradient norm {norm:g}"
            skipped.append(f"update {number} of {len(parts)}: {bad}")
        optimizer.zero_grad()  # AdamW skips a parameter whose gradient is None
    metrics = _Sums.metrics(found) | {
        "loss": fmean(losses) if losses else math.nan,
        "grad_norm": fmean(norms) if norms else math.nan,
        "skipped_updates": len(skipped),
    }
    return Updates(metrics, frozenset(changed), skipped)


@dataclass
class _Sums:
    """The losses and metrics of an update's micro-batches, on the device."""

    losses: list[Tensor] = field(default_factory=list)
    totals: dict[str, Tensor] = field(default_factory=dict)
    """Sums over tokens"""
    largest: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def add(self, out: BatchLoss, tokens: int) -> None:
        self.losses.append(out.loss.detach().double())
        self.tokens += tokens
        for name, value in out.metrics.items():
            value = value.detach().double()
            if name.endswith("_max"):
                before = self.largest.get(name, torch.zeros_like(value))
                self.largest[name] = torch.fmax(before, value)  # ignores nan
            else:
                before = self.totals.get(name, torch.zeros_like(value))
                self.totals[name] = before + value * tokens

    def on_host(self) -> _Sums:
        """Returns the same values in memory of the host, so that they can be sent."""
        losses = torch.stack(self.losses).cpu().unbind() if self.losses else ()
        totals, largest = (
            dict(zip(some, torch.stack(list(some.values())).cpu().unbind())) if some else {}
            for some in (self.totals, self.largest)
        )
        return _Sums(list(losses), totals, largest, self.tokens)

    @staticmethod
    def metrics(updates: Sequence[_Sums]) -> dict[str, float]:
        """Returns the means over all tokens of several updates, and the maxima."""
        tokens = max(sum(each.tokens for each in updates), 1)
        names = dict.fromkeys(name for each in updates for name in each.totals)
        found = {
            name: sum(float(each.totals[name]) for each in updates if name in each.totals) / tokens
            for name in names
        }
        maxima = dict.fromkeys(name for each in updates for name in each.largest)
        return found | {
            name: max(float(each.largest[name]) for each in updates if name in each.largest)
            for name in maxima
        }


def _accumulated(
    optimizer: AdamW,
    forward: Forward,
    part: Sequence[Rollout],
    loss: Callable[[Batch], BatchLoss],
) -> _Sums:
    """Adds up the gradients of the micro-batches, and returns their losses and metrics."""
    optimizer.zero_grad()  # the gradients of a pass that has run out of memory
    sums, model = _Sums(), forward.model
    # FSDP averages the gradients over the ranks.
    factor = ranks.world() if sharding.is_sharded(model) else 1
    for batch in forward.batches(part):
        out = loss(batch)
        sharding.prepare_backward(model, batch.is_last)
        (out.loss * factor).backward()
        if batch.members:
            sums.add(out, len(batch.targets))
        del out  # frees its hidden states before the next micro-batch
    return sums


def _first_bad(
    parameters: Mapping[str, nn.Parameter],
    batches: Iterator[Batch],
    loss: Callable[[Batch], BatchLoss],
    total: float,
) -> str | None:
    """Returns where a loss or a gradient that is not finite comes from. The skipped update has
    changed nothing, so its micro-batches give the same losses again."""
    broken = first_bad((f"parameter {name}", p) for name, p in parameters.items())
    if bad := ranks.first_of(broken):
        return bad
    if not math.isfinite(total):
        with torch.no_grad():
            for batch in batches:
                out = loss(batch)
                bad = None
                if not bool(out.loss.isfinite()):
                    bad = first_bad(out.made_of.items()) or "loss"
                if bad := ranks.first_of(bad):
                    return bad
    broken = first_bad((f"gradient of {name}", p.grad) for name, p in parameters.items())
    return ranks.first_of(broken)
