"""The texts of an analysis: samples whose counted tokens are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bupo.samples import Sample


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
