"""The texts of an analysis: samples whose counted tokens are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bupo.samples import Sample


class Text(Sample):
    """A sample whose measured tokens are contiguous, like those of a response."""

    def __init__(self, token_ids: list[int], start: int, end: int | None = None) -> None:
        """Marks the tokens from position `start`, at least 1 (a token is predicted from the one
        before it), up to but not including `end` (None: the end of the text) as measured. Raises
        ValueError if these are not tokens of the text."""
        length = len(token_ids)
        if not 1 <= start < length:
            raise ValueError(f"Text: start: expected a position in 1..{length - 1}, got {start}")
        if end is not None and not start < end <= length:
            raise ValueError(f"Text: end: expected a position in {start + 1}..{length}, got {end}")
        behind = length if end is None else end
        super().__init__(token_ids, [start <= place < behind for place in range(length)])

    @property
    def start(self) -> int:
        """The position of the first measured token"""
        return self.loss_mask.index(True)


@dataclass
class Tokens:
    """The measured tokens of all texts, concatenated."""

    text: NDArray[np.int64]
    """[token]: index of its text"""
    position: NDArray[np.int64]
    """[token]: its position in the text"""
    token: NDArray[np.int64]
    """[token]: its id, the target of every policy's log-prob"""


def measured(function: str, texts: Sequence[Sample]) -> Tokens:
    """Returns the measured tokens of all texts. Raises ValueError, which names a function, if there
    is no text or a text without a measured token."""
    if not texts:
        raise ValueError(f"{function}: texts: expected at least one, got none")
    for number, text in enumerate(texts):
        if not text.count:
            raise ValueError(
                f"{function}: texts: expected measured tokens in each, got none in text {number}"
            )
    places = [np.array(text.positions) for text in texts]
    ids = [np.array(text.token_ids)[place] for text, place in zip(texts, places)]
    numbers = np.repeat(np.arange(len(texts)), [len(place) for place in places])
    return Tokens(numbers, np.concatenate(places), np.concatenate(ids))
