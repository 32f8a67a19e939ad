"""Data of the layer x token heat maps, packed small enough to be part of the page.

A number is stored as a multiple of a step above the smallest one, in base64-encoded unsigned
integers, with at least three decimals, and in two bytes if the range allows.
"""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bupo.internal.analysis import Analysis

SCALE = [to_hex(color) for color in colormaps["viridis"](np.linspace(0, 1, 33))]
"""The colours of a map, from its smallest value to its largest"""
VIEWS = ("layer", "layer_normed")
"""The layer's policy, raw and with the final norm"""


def packed(values: NDArray[Any], step: float | None = None) -> dict[str, Any]:
    """Returns {low, step, bits, data}, where value = low + step * integer. With step=None, the step
    is a thousandth, or finer if the range is narrow."""
    lowest, highest = float(values.min()), float(values.max())
    if step is None:
        step = min(1e-3, 10.0 ** math.floor(math.log10(max(highest - lowest, 1e-6) / 6000)))
    low = math.floor(lowest / step) * step
    whole = np.rint((values.astype(np.float64) - low) / step)
    bits = 16 if whole.max() < 1 << 16 else 32
    data = whole.astype(f"<u{bits // 8}").tobytes()
    return {"low": low, "step": step, "bits": bits, "data": base64.b64encode(data).decode()}


def heat_maps(found: Analysis) -> list[dict[str, Any]]:
    """Returns the map of each text in found.closer. Rows are layers, from the first one kept."""
    return [_heat_map(found, text) for text in range(int(found.closer.text.max()) + 1)]


def _heat_map(found: Analysis, text: int) -> dict[str, Any]:
    near, flow, wide = found.closer, found.flow, found.lens
    mine = np.flatnonzero(near.text == text)
    tokens = np.flatnonzero(flow.text == text)[: len(mine)]
    kept = np.ix_(np.array(near.layers) - 1, tokens)
    likeliest = np.stack([near.top_tokens[view][:, mine] for view in VIEWS])
    used, places = np.unique(likeliest, return_inverse=True)
    values, top = {}, {}
    for view, pieces in zip(VIEWS, places.reshape(len(VIEWS), -1)):
        suffix = view.removeprefix("layer")
        values[f"entropy{suffix}"] = packed(flow.entropy[view][kept])
        values[f"logprob{suffix}"] = packed(flow.logprob[view][kept])
        values[f"kl{suffix}"] = packed(wide.kl[view][:, tokens])
        values[f"rank{suffix}"] = packed(wide.rank[view][:, tokens], 1.0)
        shares = packed(np.exp(near.top_logprobs[view][:, mine]), 1e-4)
        top[view] = {"k": likeliest.shape[-1], "piece": packed(pieces, 1.0), "p": shares}
    words = [found.piece(token) for token in near.token[mine].tolist()]
    return {
        "title": "".join(words[:40])[:60],
        "tokens": words,
        "positions": near.position[mine].tolist(),
        "layers": near.layers,
        "pieces": [found.piece(token) for token in used.tolist()],
        "values": values,
        "top": top,
    }
