"""Which policies a run trains, in which order."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bupo.config.errors import require
from bupo.config.limits import Group, setting

_LAYERS = re.compile(r"(\d+)(?:(-)(\d+)?)?")


@dataclass
class BupoConfig(Group, prefix="bupo."):
    layer: int | None = setting(None, at_least=1)
    """Layer l of the internal policy pi^l, counted from 1, that policy=bupo trains in phase 1 and
    policy=internal in all steps. It has no default, for the right layer depends on the model: the
    paper takes 6 for Qwen3-4B and -8B and the last but one for Llamas; bupo.auto_layer measures
    it."""
    steps: int = setting(30, at_least=0)
    """Number of steps in phase 1, the paper's s_inter, after which the final policy is trained."""
    final_norm: bool = False
    """Apply the model's final norm to H^l before the unembedding (the paper does not)."""
    auto_layer: float | None = setting(None, at_least=0, below=1)
    """Measure the layer before step 1, with policy=bupo: the layer where the FFNs of the model stop
    exploring, on 64 of its own responses. The value is the share of the largest rise of entropy by
    an FFN below which a layer no longer explores, for example 0.1. auto_layer.json in the run
    directory has the curve. null: bupo.layer is given."""
    auto_stop: float | None = setting(None, above=0)
    """End phase 1 before bupo.steps where it has stopped helping, with policy=bupo: when the final
    policy's log perplexity of the probes (see diagnostics.every) has risen by this many nats, for
    example 0.1, or KL(pi^l || pi) has made no new low for 5 steps. null: never."""


@dataclass
class PhaseConfig(Group, prefix="phases[]."):
    layer: int | None = setting(None, at_least=1)
    """Layer of the internal policy that the phase trains, counted from 1; null: the final policy."""
    steps: int | None = setting(None, at_least=1)
    """Number of steps in the phase; null, in the last phase only: all that remain."""
    lr: dict[Any, float] = setting({}, at_least=0)
    """Factors of optimizer.lr for parts of the model; 0 freezes a part. The parts are embedding,
    head (unless it is the embedding), a layer (6), a range of layers (1-6), all layers from one on
    with the final norm (7-), and others: whatever is not named, 1 if not given. {7-: 0} trains up to
    layer 6; {6: 1, others: 0} trains layer 6 alone."""

    def __post_init__(self) -> None:
        self.lr = {str(key): factor for key, factor in self.lr.items()}  # YAML reads 6 as a number
        super().__post_init__()
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
