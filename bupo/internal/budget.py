"""Measures only some of the tokens of texts, as many as a budget of tokens or time allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bupo.samples import Sample

PROBES = (16, 64)
"""Numbers of tokens that are measured to learn what a text and what a token takes"""


def some_tokens(texts: Sequence[Sample], tokens: int, seed: int) -> NDArray[np.bool_]:
    """Draws at most so many of the counted tokens of texts, at least one from each. Each text gives
    the same number of tokens, or all of them if it has fewer. A text remains the unit of every
    standard error, which includes that its mean is over some of its tokens only."""
    counts = [text.count for text in texts]
    left, shares = max(tokens, len(texts)), [0] * len(texts)
    for place, number in enumerate(order := np.argsort(counts, kind="stable").tolist()):
        shares[number] = min(counts[number], left // (len(order) - place))
        left -= shares[number]
    chosen = []
    for number, (count, share) in enumerate(zip(counts, shares)):
        mine = np.zeros(count, bool)
        mine[np.random.default_rng([seed, number]).permutation(count)[:share]] = True
        chosen.append(mine)
    return np.concatenate(chosen)


def only(texts: Sequence[Sample], chosen: NDArray[np.bool_]) -> list[Sample]:
    """Returns the texts with the mask of the tokens that are chosen among the counted ones."""
    left, made = iter(chosen.tolist()), []
    for text in texts:
        mask = [counts and next(left) for counts in text.loss_mask]
        made.append(replace(text, loss_mask=mask, streams={}))
    return made


def affordable(
    seconds: float, texts: Sequence[Sample], measure: Callable[[list[Sample]], object]
) -> tuple[int, int]:
    """Returns the numbers of texts and of tokens that can be measured in so many seconds, by timing
    how long `measure` takes for few and for more tokens of the longest text.

    A text costs about as much as many of its tokens, as the weights are read anew for each. So if
    the time does not allow for all texts, it goes in equal parts to texts and to their tokens. At
    least two texts and one token of each are measured, even if that takes longer.
    """
    begin = time.perf_counter()
    longest = max(texts, key=lambda text: text.count)
    taken = []
    for tokens in (PROBES[0], *PROBES):  # the first call also warms up
        probe = only([longest], some_tokens([longest], tokens, 0))
        before = time.perf_counter()
        measure(probe)
        taken.append((probe[0].count, time.perf_counter() - before))
    (few, of_few), (more, of_more) = taken[1:]
    a_token = max(of_more - of_few, of_more / 100) / max(more - few, 1)
    a_text = max(of_few - few * a_token, 0)
    left = seconds - (time.perf_counter() - begin)
    mean = max(1, sum(text.count for text in texts) // len(texts))
    each = a_text + a_token * min(mean, max(1, math.ceil(a_text / a_token)))
    number = min(max(2, int(left / each)), len(texts))
    return number, max(number, int((left - number * a_text) / a_token))
