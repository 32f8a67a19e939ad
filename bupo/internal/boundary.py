"""The boundary layer of Bottom-up Policy Optimization, at which the FFNs stop exploring.

The paper (arXiv 2512.19673) takes the last layer with dH_FFN > 0 before the FFN leaves exploration,
measured once on rollouts of the base model, and gives no tolerance. Taken literally, noise on a
plateau near 0 can put the boundary far too high. Here dH counts as positive above a tolerance
relative to the curve's largest value, and the result has an uncertainty over prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.1
"""A layer with |dH_FFN| up to this share of the largest mean neither explores nor converges"""
RESAMPLES = 1000
SUDDEN = 0.5
"""Convergence is sudden if the last two layers cause more than this share of the entropy's fall"""


@dataclass(frozen=True)
class Boundary:
    """The boundary layer and its uncertainty; layers count from 1."""

    layer: int | None
    """None if there is no clear boundary; see reason"""
    low: int | None
    high: int | None
    """95 % interval over prompts, by bootstrap"""
    candidate: int | None
    """The boundary of the mean curve, even if it is not clear"""
    tolerance: float
    """In nats: TOLERANCE times the largest mean dH_FFN"""
    curve: list[float]
    """Mean dH_FFN of layers 1..L"""
    segments: list[tuple[str, int, int]]
    """(exploration, integration or convergence, first layer, last layer)"""
    reason: str


def boundary_layer(
    change: NDArray[np.floating], tolerance: float = TOLERANCE, seed: int = 0
) -> Boundary:
    """Finds the last layer of the first run of exploring layers in dH_FFN, [layer, prompt] in nats.

    It is clear if at least 95 % of 1000 resamples of the prompts give a boundary, and if the ends
    of their 95 % interval are at most an eighth of the layers (or two, if that is more) apart.
    Errors: ValueError for another shape, no prompt, or values that are not finite.
    """
    change = np.asarray(change, dtype=np.float64)
    if change.ndim != 2 or 0 in change.shape or not np.isfinite(change).all():
        raise ValueError(
            "boundary_layer: change: expected finite values [layer, prompt], at least one each, "
            f"got shape {list(change.shape)}"
        )
    depth, prompts = change.shape
    curve = change.mean(axis=1)
    candidate, limit = _rule(curve, tolerance)
    draws = np.random.default_rng(seed).integers(prompts, size=(RESAMPLES, prompts))
    found = [_rule(change[:, draw].mean(axis=1), tolerance)[0] for draw in draws]
    given = np.array([layer for layer in found if layer is not None])
    low = high = None
    if len(given):
        low, high = (int(x) for x in np.quantile(given, (0.025, 0.975), method="nearest"))
    widest = max(2, depth // 8)
    if candidate is None:
        reason = "no layer's FFN raises the entropy"
    elif candidate == depth:
        reason = "the FFN of the last layer still explores"
    elif len(given) < 0.95 * RESAMPLES:
        reason = f"only {len(given) / RESAMPLES:.0%} of resamples of the prompts have one"
    elif low is not None and high is not None and high - low > widest:
        reason = f"resamples of the prompts put it anywhere in {low}..{high}"
    elif prompts < 2:
        reason = "a single prompt says nothing about its uncertainty"
    else:
        reason = ""
    return Boundary(
        layer=None if reason else candidate,
        low=low,
        high=high,
        candidate=candidate,
        tolerance=limit,
        curve=curve.tolist(),
        segments=segments(curve, limit),
        reason=reason,
    )


def _rule(curve: NDArray[np.floating], tolerance: float) -> tuple[int | None, float]:
    """Returns the last layer of the first exploring run, or None, and the limit in nats."""
    largest = float(curve.max())
    if largest <= 0:
        return None, tolerance * float(np.abs(curve).max())
    limit = tolerance * largest
    exploring = curve > limit
    first = int(exploring.argmax())
    after = np.flatnonzero(~exploring[first:])
    return (first + int(after[0]) if len(after) else len(curve)), limit


def segments(curve: NDArray[np.floating], limit: float) -> list[tuple[str, int, int]]:
    """Groups consecutive layers by whether their FFN raises the entropy by more than a limit in
    nats (exploration), lowers it by more (convergence) or does neither (integration)."""
    names = np.select(
        [curve > limit, curve < -limit], ["exploration", "convergence"], "integration"
    )
    runs, start = [], 1
    for name, run in groupby(names.tolist()):
        length = len(list(run))
        runs.append((name, start, start + length - 1))
        start += length
    return runs


def convergence(entropy: NDArray[np.floating]) -> tuple[str, float]:
    """Returns "progressive" or "sudden", and the share of the last two layers in the fall of a mean
    entropy curve [layer] from its largest value to the last layer. Their part is the fall from the
    largest of the last three values. Returns "none" and 0 if the curve does not fall."""
    entropy = np.asarray(entropy, dtype=np.float64)
    fall = float(entropy.max() - entropy[-1])
    if fall <= 0 or len(entropy) < 3:
        return "none", 0.0
    share = float(entropy[-3:].max() - entropy[-1]) / fall
    return ("sudden" if share > SUDDEN else "progressive"), share
