"""What is analysed: samples, whose counted tokens are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bupo.samples import Sample


class Text(Sample):
    """A sample whose measured tokens are one stretch, as those of a response are."""

    def __init__(self, token_ids: list[int], start: int, end: int | None = None) -> None:
        """Measures the tokens from place `start`, at least 1 (its predecessor predicts it), up to
        but without place `end` (None: to the end of the text). Raises ValueError where that is no
        token of the text."""
        length = len(token_ids)
        if not 1 <= start < length:
            raise ValueError(f"Text: start: expected a place in 1..{length - 1}, came {start}")
        if end is not None and not start < end <= length:
            raise ValueError(f"Text: end: expected a place in {start + 1}..{length}, came {end}")
        behind = length if end is None else end
        super().__init__(token_ids, [start <= place < behind for place in range(length)])

    @property
    def start(self) -> int:
        """The place of the first measured token."""
        return self.loss_mask.index(True)


@dataclass
class Tokens:
    """The measured tokens of all texts, one behind another."""

    text: NDArray[np.int64]
    """[token]: which text"""
    position: NDArray[np.int64]
    """[token]: its place in the text"""
    token: NDArray[np.int64]
    """[token]: its id, the target of every policy's log-prob"""


def measured(function: str, texts: Sequence[Sample]) -> Tokens:
    """The tokens that count. Raises ValueError, in the name of a function, where there is no text,
    or one without such a token."""
    if not texts:
        raise ValueError(f"{function}: texts: expected at least one, came none")
    for number, text in enumerate(texts):
        if not text.count:
            raise ValueError(
                f"{function}: texts: expected measured tokens in each, came none in text {number}"
            )
    places = [np.array(text.positions) for text in texts]
    ids = [np.array(text.token_ids)[place] for text, place in zip(texts, places)]
    numbers = np.repeat(np.arange(len(texts)), [len(place) for place in places])
    return Tokens(numbers, np.concatenate(places), np.concatenate(ids))
