"""Data of the layer x token heat maps, small enough to be part of the page.

Numbers are whole multiples of a step from the smallest one, as unsigned integers in base64: three
decimals at least, two bytes each where the range allows.
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


def packed(values: NDArray[Any], step: float | None = None) -> dict[str, Any]:
    """{low, step, bits, data}: value = low + step * integer. None: thousandths, or finer where the
    range is narrow."""
    lowest, highest = float(values.min()), float(values.max())
    if step is None:
        step = min(1e-3, 10.0 ** math.floor(math.log10(max(highest - lowest, 1e-6) / 6000)))
    low = math.floor(lowest / step) * step
    whole = np.rint((values.astype(np.float64) - low) / step)
    bits = 16 if whole.max() < 1 << 16 else 32
    data = whole.astype(f"<u{bits // 8}").tobytes()
    return {"low": low, "step": step, "bits": bits, "data": base64.b64encode(data).decode()}


def heat_maps(found: Analysis) -> list[dict[str, Any]]:
    """Of each text that was looked at closer: rows are layers, from the first one kept to the
    last."""
    near, flow, wide = found.closer, found.flow, found.lens
    kept = np.array(near.layers) - 1
    maps = []
    for number in range(int(near.text.max()) + 1):
        mine = np.flatnonzero(near.text == number)
        all_mine = np.flatnonzero(flow.text == number)[: len(mine)]
        quantities = {}
        for suffix in ("", "_normed"):
            view = f"layer{suffix}"
            quantities[f"entropy{suffix}"] = flow.entropy[view][np.ix_(kept, all_mine)]
            quantities[f"logprob{suffix}"] = flow.logprob[view][np.ix_(kept, all_mine)]
            quantities[f"kl{suffix}"] = wide.kl[view][:, all_mine]
            quantities[f"rank{suffix}"] = wide.rank[view][:, all_mine]
        used, places = np.unique(
            np.concatenate([near.top_tokens[v][:, mine].ravel() for v in near.top_tokens]),
            return_inverse=True,
        )
        parts = np.split(places, len(near.top_tokens))
        maps.append(
            {
                "title": "".join(found.piece(t) for t in near.token[mine][:40].tolist())[:60],
                "tokens": [found.piece(t) for t in near.token[mine].tolist()],
                "positions": near.position[mine].tolist(),
                "layers": near.layers,
                "pieces": [found.piece(t) for t in used.tolist()],
                "values": {
                    name: packed(x, 1.0 if name.startswith("rank") else None)
                    for name, x in quantities.items()
                },
                "top": {
                    view.replace("layer_normed", "normed").replace("layer", "raw"): {
                        "k": near.top_tokens[view].shape[-1],
                        "piece": packed(part, 1.0),
                        "p": packed(np.exp(near.top_logprobs[view][:, mine].ravel()), 1e-4),
                    }
                    for view, part in zip(near.top_tokens, parts)
                },
            }
        )
    return maps
