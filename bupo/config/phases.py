"""Which policies a run trains, in which order."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from bupo.config.errors import require

_LAYERS = re.compile(r"(\d+)(?:(-)(\d+)?)?")


@dataclass
class BupoConfig:
    layer: int | None = None
    """The internal policy pi^l, counted from 1 (algorithm=bupo: that of phase 1; internal). It has
    no default, for the right layer depends on the model: the paper takes 6 for Qwen3-4B and -8B,
    the last but one for Llamas; bupo.auto_layer measures it."""
    steps: int = 30
    """Steps of phase 1, s_inter of the paper; then the final policy is trained."""
    final_norm: bool = False
    """Apply the model's final norm to H^l before the unembedding (the paper does not)."""
    auto_layer: float | None = None
    """Measure the layer before step 1 instead: where the FFNs of the model leave exploration, on 64
    responses of its own. The value is the share of the largest rise of entropy by an FFN below
    which a layer no longer explores, e.g. 0.1; null: bupo.layer is given (algorithm=bupo;
    auto_layer.json in the run directory has the curve)."""
    auto_stop: float | None = None
    """End phase 1 before bupo.steps where it has stopped helping: when the final policy's log
    perplexity of the probes (see diagnostics.every) has risen by so many nats, e.g. 0.1, or
    KL(pi^l || pi) has made no new low for 5 steps; null: never (algorithm=bupo)."""

    def __post_init__(self) -> None:
        require(
            self.layer is None or self.layer >= 1, f"bupo.layer counts from 1, got {self.layer}"
        )
        require(self.steps >= 0, f"bupo.steps must be at least 0, got {self.steps}")
        require(self.auto_stop is None or self.auto_stop > 0, "bupo.auto_stop must be > 0 or null")
        require(
            self.auto_layer is None or 0 <= self.auto_layer < 1,
            f"bupo.auto_layer must be a share in [0, 1), e.g. 0.1, or null, got {self.auto_layer}",
        )


@dataclass
class PhaseConfig:
    layer: int | None = None
    """The internal policy that the phase trains, counted from 1; null: the final policy."""
    steps: int | None = None
    """Steps of the phase; null, in the last phase: all that remain."""
    lr: dict[Any, float] = field(default_factory=dict)
    """Factors of the learning rate; 0 freezes. Of embedding, head (unless it is the embedding), a
    layer (6), layers (1-6), layers to the last and the final norm (7-), and others: what is not
    named, 1 if not given. {7-: 0} trains up to layer 6; {6: 1, others: 0} layer 6 alone."""

    def __post_init__(self) -> None:
        for key in ("layer", "steps"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"phases[].{key} must be at least 1, got {value}")
        self.lr = {str(key): factor for key, factor in self.lr.items()}  # YAML reads 6 as a number
        for key, factor in self.lr.items():
            require(
                0 <= factor < math.inf,
                f"phases[].lr.{key} must be at least 0 and finite, got {factor}",
            )
        ranges = sorted(self.lr_of_layers().values())
        for (_, last, _), (first, _, _) in pairwise(ranges):
            require(last < first, f"phases[].lr names layer {first} twice: {self.lr}")

    def lr_of_layers(self) -> dict[str, tuple[int, float, float]]:
        """First layer, last layer (infinity where open), factor, by how they are named."""
        found = {}
        for key, factor in self.lr.items():
            if key in ("embedding", "head", "others"):
                continue
            match = _LAYERS.fullmatch(key)
            first = int(match[1]) if match else 0
            last = float(match[3] or (math.inf if match[2] else first)) if match else 0
            require(
                1 <= first <= last,
                "phases[].lr: expected embedding, head, others, a layer (6) or layers (1-6, 7-), "
                f"got {key!r}",
            )
            found[key] = (first, last, factor)
        return found
