"""Where the FFNs stop exploring: the boundary layer of Bottom-up Policy Optimization.

The paper (arXiv 2512.19673) takes the last layer with dH_FFN > 0 before the FFN leaves exploration,
measured once on rollouts of the base model, and gives no tolerance. Taken literally, noise of a
plateau near 0 moves the answer far up. Here dH counts as positive above a tolerance relative to the
curve's largest value, and the answer comes with its uncertainty over prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.1
"""Share of the largest mean dH_FFN up to which a layer neither explores nor converges"""
RESAMPLES = 1000
SUDDEN = 0.5
"""Convergence is sudden if the last two layers make more than this share of the entropy's fall"""


@dataclass(frozen=True)
class Boundary:
    """The boundary layer and how sure it is; layers count from 1."""

    layer: int | None
    """None: no clear boundary, see reason"""
    low: int | None
    high: int | None
    """95 % interval over prompts, by bootstrap"""
    candidate: int | None
    """What the rule gives for the mean curve, clear or not"""
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
    """The last layer of the first run of exploring layers of dH_FFN, [layer, prompt] in nats.

    Clear if at least 95 % of 1000 resamples of the prompts give a boundary, and their 95 % interval
    spans at most an eighth of the layers (two at least) beyond one layer. Errors: ValueError for
    another shape, no prompt or values that are not finite.
    """
    change = np.asarray(change, dtype=np.float64)
    if change.ndim != 2 or 0 in change.shape or not np.isfinite(change).all():
        raise ValueError(
            "boundary_layer: change: expected finite values [layer, prompt], at least one each, "
            f"came shape {list(change.shape)}"
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
        reason = "one prompt says nothing of its uncertainty"
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
    largest = float(curve.max())
    if largest <= 0:
        return None, tolerance * float(np.abs(curve).max())
    limit = tolerance * largest
    exploring = curve > limit
    first = int(exploring.argmax())
    after = np.flatnonzero(~exploring[first:])
    return (first + int(after[0]) if len(after) else len(curve)), limit


def segments(curve: NDArray[np.floating], limit: float) -> list[tuple[str, int, int]]:
    """Runs of layers by what their FFN does to the entropy, within a limit in nats."""
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
    """progressive or sudden, and the share of the fall of a mean entropy curve [layer], from its
    largest value to the last layer, that the last two layers make: what it falls from the largest
    of the last three. "none" if it does not fall."""
    entropy = np.asarray(entropy, dtype=np.float64)
    fall = float(entropy.max() - entropy[-1])
    if fall <= 0 or len(entropy) < 3:
        return "none", 0.0
    share = float(entropy[-3:].max() - entropy[-1]) / fall
    return ("sudden" if share > SUDDEN else "progressive"), share
