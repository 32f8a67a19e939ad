"""Token sequences with values for some of their tokens, and micro-batches of them.

Training and analysis share these: a rollout (bupo.types) carries a prompt and a reward as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """A sequence, with a mask that says which of its tokens count.

    A counted token is one that the policy has chosen, so it is trained or measured. All other
    tokens (a prompt, a tool's answer, a user's next message) are only read by the model.
    """

    token_ids: list[int]
    """The whole sequence"""
    loss_mask: list[bool]
    """Whether each token counts. The first one cannot, because nothing predicts it."""
    streams: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    """Values of the counted tokens by name: tensors with one entry per counted token, in order."""

    def __post_init__(self) -> None:
        if len(self.loss_mask) != len(self.token_ids):
            raise ValueError(
                f"Sample: loss_mask: expected {len(self.token_ids)} values, one per token, got "
                f"{len(self.loss_mask)}"
            )
        if self.loss_mask and self.loss_mask[0]:
            raise ValueError(
                "Sample: loss_mask: expected the first token to be masked, for no token predicts "
                "it, got True"
            )
        for name, values in self.streams.items():
            if values.shape != (self.count,):
                raise ValueError(
                    f"Sample: streams: {name}: expected shape [{self.count}], one value per "
                    f"counted token, got {list(values.shape)}"
                )

    @classmethod
    def of(cls, prompt: Sequence[int], response: Sequence[int]) -> Sample:
        """Returns a sample of a prompt, which is only read, and a response, whose tokens count.
        Raises ValueError if there is a response without a prompt."""
        return Sample([*prompt, *response], [False] * len(prompt) + [True] * len(response))

    @property
    def count(self) -> int:
        """The number of counted tokens."""
        return self.loss_mask.count(True)

    @property
    def positions(self) -> list[int]:
        """The positions of the counted tokens in the sequence."""
        return [place for place, counts in enumerate(self.loss_mask) if counts]

    def stream(self, name: str) -> Tensor:
        """Returns the values of this name. Raises KeyError, which lists the names that exist."""
        if name not in self.streams:
            there = ", ".join(self.streams) or "none"
            raise KeyError(f"Sample: streams: expected {name}, got {there}")
        return self.streams[name]

    def with_stream(self, name: str, values: Tensor) -> Self:
        """Returns the same sample with one more stream, or with a new one of this name."""
        return replace(self, streams={**self.streams, name: values})


AnySample = TypeVar("AnySample", bound=Sample)


def with_streams(
    samples: Sequence[AnySample], name: str, values: Iterable[Tensor]
) -> list[AnySample]:
    """Returns each sample with one more stream. Raises ValueError if the numbers differ."""
    return [sample.with_stream(name, x) for sample, x in zip(samples, values, strict=True)]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples, padded on the right, and the places of their counted tokens, T in all."""

    members: list[int]
    """Index of each sample among all samples"""
    counts: list[int]
    """Number of counted tokens of each"""
    input_ids: Tensor
    """[B, L]"""
    attention_mask: Tensor
    """[B, L]: 0 for padding"""
    rows: Tensor
    """[T]: the row of each counted token in input_ids"""
    columns: Tensor
    """[T]: the column from which it is predicted"""
    targets: Tensor
    """[T]: the tokens themselves"""
    streams: dict[str, Tensor]
    """[T] each: the streams that all members have"""
    is_last: bool = True
    """Whether it is the last one of a pass over the samples"""

    def pick(self, hidden: Tensor) -> Tensor:
        """[B, L, D] -> [T, D], at the positions from which counted tokens are predicted."""
        return hidden[self.rows, self.columns]

    def split(self, values: Tensor) -> list[Tensor]:
        """[T] -> one tensor for each member."""
        return list(values.split(self.counts))


def micro_batches(
    samples: Sequence[Sample],
    tokens: int,
    device: torch.device | str,
    *,
    pad: int = 0,
    equal_lengths: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Yields batches of samples of similar length, the longest last. A batch has at most `tokens`
    tokens with padding, or one sample. equal_lengths: only samples of the same length share a
    batch, so that nothing is padded.

    rank, world: yields the share of this rank, every world-th batch. All ranks get the same number
    of batches, about equally many tokens, and the last batch may be an empty one.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    if world > 1 and samples:
        tokens = min(tokens, max(max(lengths), -(-sum(lengths) // world)))
    groups: list[list[int]] = []
    for i in sorted(range(len(samples)), key=lambda i: (lengths[i], i)):
        fits = bool(groups) and (len(groups[-1]) + 1) * lengths[i] <= tokens
        if fits and not (equal_lengths and lengths[groups[-1][0]] != lengths[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    for first in range(0, len(groups), world):
        members = groups[first + rank] if first + rank < len(groups) else []
        chosen = [samples[i] for i in members] or [_empty(samples[0])]
        yield _batch(chosen, members, device, pad, is_last=first + world >= len(groups))


def _empty(sample: Sample) -> Sample:
    """Returns a short sample without counted tokens that has the same streams."""
    ids, streams = sample.token_ids[:2], {name: x[:0] for name, x in sample.streams.items()}
    return replace(sample, token_ids=ids, loss_mask=[False] * len(ids), streams=streams)


def _batch(
    samples: Sequence[Sample],
    members: list[int],
    device: torch.device | str,
    pad: int,
    is_last: bool,
) -> Batch:
    width = max(len(sample.token_ids) for sample in samples)
    ids = torch.full((len(samples), width), pad)
    mask = torch.zeros_like(ids)
    rows: list[int] = []
    columns: list[int] = []
    for row, sample in enumerate(samples):
        ids[row, : len(sample.token_ids)] = torch.tensor(sample.token_ids)
        mask[row, : len(sample.token_ids)] = 1
        positions = sample.positions
        rows += [row] * len(positions)
        columns += [position - 1 for position in positions]
    at = torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)
    shared = set[str].intersection(*(set(sample.streams) for sample in samples))
    streams = {name: torch.cat([s.streams[name] for s in samples]) for name in sorted(shared)}
    return Batch(
        members=members,
        counts=[sample.count for sample in samples],
        input_ids=_on(device, ids),
        attention_mask=_on(device, mask),
        rows=_on(device, at[0]),
        columns=_on(device, at[1]),
        targets=_on(device, ids[at[0], at[1] + 1]),
        streams={name: _on(device, values) for name, values in streams.items()},
        is_last=is_last,
    )


def _on(device: torch.device | str, values: Tensor) -> Tensor:
    """Returns the values on a device, without waiting for the work that a GPU is doing."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
