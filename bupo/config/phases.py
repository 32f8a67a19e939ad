"""Which policies a run trains, in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bupo.config.errors import require


@dataclass
class BupoConfig:
    layer: int = 6
    """The internal policy pi^l, counted from 1 (algorithm=bupo: that of phase 1; internal)."""
    steps: int = 30
    """Steps of phase 1, s_inter of the paper; then the final policy is trained."""
    final_norm: bool = False
    """Apply the model's final norm to H^l before the unembedding (the paper does not)."""
    auto_layer: bool = False
    """Measure the layer before step 1 instead: where the FFNs of the model leave exploration, on 64
    responses of its own (algorithm=bupo; auto_layer.json in the run directory has the curve)."""
    auto_tolerance: float = 0.1
    """Share of the largest rise of entropy by an FFN below which a layer no longer explores."""
    auto_stop: float | None = None
    """End phase 1 before bupo.steps where it has stopped helping: when the final policy's log
    perplexity of the probes (see diagnostics.every) has risen by so many nats, e.g. 0.1, or
    KL(pi^l || pi) has made no new low for 5 steps; null: never (algorithm=bupo)."""

    def __post_init__(self) -> None:
        require(self.layer >= 1, f"bupo.layer counts from 1, got {self.layer}")
        require(self.steps >= 0, f"bupo.steps must be at least 0, got {self.steps}")
        require(self.auto_stop is None or self.auto_stop > 0, "bupo.auto_stop must be > 0 or null")
        require(0 <= self.auto_tolerance < 1, "bupo.auto_tolerance must be in [0, 1)")


@dataclass
class PhaseConfig:
    layer: int | None = None
    """The internal policy that the phase trains, counted from 1; null: the final policy."""
    steps: int | None = None
    """Steps of the phase; null, in the last phase: all that remain."""
    boundary: int | None = None
    """A layer that parts the model: 1..boundary and the embeddings are below, the others and the
    final norm above; the head is neither (a tied head is the embedding)."""
    lr_below: float = 1.0
    """Factor of the learning rate below the boundary; 0 freezes."""
    lr_above: float = 1.0
    """Factor of the learning rate above the boundary; 0 freezes."""

    def __post_init__(self) -> None:
        for key in ("layer", "steps", "boundary"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"phases[].{key} must be at least 1, got {value}")
        rates = (self.lr_below, self.lr_above)
        require(
            all(0 <= rate < math.inf for rate in rates), "phases[].lr_* must be at least 0, finite"
        )
        require(
            self.boundary is not None or rates == (1, 1),
            "phases[].lr_below and .lr_above need phases[].boundary",
        )
        require(any(rates), "phases[].lr_below and .lr_above are both 0: nothing would be trained")
        require(
            self.layer is None or self.lr_below > 0 or self.layer > (self.boundary or 0),
            f"phases[]: lr_below=0 freezes all layers of the policy of layer {self.layer}",
        )
