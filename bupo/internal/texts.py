"""What is analysed: token ids, and which of them are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """Token ids of one prompt and response; measured are the tokens from `start` on."""

    token_ids: list[int]
    start: int
    """Place of the first measured token, at least 1: its predecessor predicts it"""
    end: int | None = None
    """Place behind the last measured token; None: that of the text"""

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.token_ids):
            raise ValueError(
                f"Text: start: expected a place in 1..{len(self.token_ids) - 1}, came {self.start}"
            )
        if self.end is not None and not self.start < self.end <= len(self.token_ids):
            raise ValueError(
                f"Text: end: expected a place in {self.start + 1}..{len(self.token_ids)}, "
                f"came {self.end}"
            )

    @property
    def measured(self) -> int:
        return (len(self.token_ids) if self.end is None else self.end) - self.start


@dataclass
class Batch:
    """Texts of equal length, so that nothing is padded, and the places of their measured tokens."""

    ids: Tensor
    """[B, T]"""
    rows: Tensor
    """[N]: the text of each measured token, ..."""
    columns: Tensor
    """[N]: ... and the place that predicts it"""
    targets: Tensor
    """[N]: its id"""
    text: NDArray[np.int64]
    """[N]: number of the text among all"""
    position: NDArray[np.int64]
    """[N]: place of the token in its text"""

    def pick(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [N, D], where measured tokens are predicted."""
        return x[self.rows, self.columns]


def batches_of(
    texts: Sequence[Text], batch_tokens: int, device: torch.device | str
) -> Iterator[Batch]:
    """Texts of equal length together, at most batch_tokens (or one text) a batch."""
    groups: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i].token_ids)):
        length = len(texts[i].token_ids)
        same = groups and len(texts[groups[-1][0]].token_ids) == length
        if same and (len(groups[-1]) + 1) * length <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        ids = torch.tensor([texts[i].token_ids for i in group], device=device)
        places = [
            (row, place)
            for row, i in enumerate(group)
            for place in range(texts[i].start, texts[i].start + texts[i].measured)
        ]
        rows = torch.tensor([row for row, _ in places], device=device)
        position = np.array([place for _, place in places], dtype=np.int64)
        columns = torch.tensor(position - 1, device=device)
        text = np.array([group[row] for row, _ in places], dtype=np.int64)
        yield Batch(ids, rows, columns, ids[rows, columns + 1], text, position)
