"""Measures, on the model that a run begins with, which layer phase 1 of BuPO trains.

The paper (arXiv 2512.19673) measures the base model's own rollouts once and takes the boundary
layer: the last layer before the FFNs leave exploration, dH_FFN > 0. bupo.internal defines the
measure, its tolerance and its uncertainty; this module applies it in a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bupo import ranks
from bupo.config import Config, RunError
from bupo.internal import boundary_layer, entropy_flow
from bupo.rl import sharding
from bupo.rl.spread import generate
from bupo.runlog.display import Display
from bupo.runlog.run_directory import replace_text
from bupo.types import Prompt, RolloutEngine

PROMPTS = 64
"""Number of rollouts measured, one per prompt, because the uncertainty is taken over prompts"""
FILE = "auto_layer.json"


def with_measured_layer(
    config: Config,
    out: Path,
    model: Any,
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    start: int,
    alive: Callable[[], object] = lambda: None,
) -> Config:
    """Returns the configuration with bupo.layer set to the measured layer. If `start` > 0 steps are
    done, reads the layer from FILE, which was written to the run directory when the run began.
    Calls alive() as the work advances. Raises RunError if that file is missing, or if the model has
    no clear boundary: training the wrong layer costs more than choosing one by hand."""
    file = out / FILE
    if start and not file.is_file():
        raise RunError(
            f"bupo.auto_layer: {file}, which records the layer that this run trains, is missing; "
            "restore it, or start a new run with bupo.layer"
        )
    if start:
        layer = json.loads(file.read_text(encoding="utf-8"))["layer"]
    else:
        layer = _measure(config, file, model, engine, prompts, alive)
    return replace(config, bupo=replace(config.bupo, layer=layer))


def _measure(
    config: Config,
    file: Path,
    model: Any,
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    alive: Callable[[], object],
) -> int:
    display = Display()
    with display.waiting("auto_layer: rollouts of the initial model", alive):
        seed = f"{config.seed}/auto_layer"
        rollouts, _ = generate(engine, config.rollout, prompts[:PROMPTS], 1, seed)
    texts = [r for r in rollouts if r.count]
    with display.waiting(f"auto_layer: entropies of {len(texts)} responses", alive):
        with sharding.gathered(model, with_layers=False):
            flow = entropy_flow(model, texts, config.rollout.temperature)
        flow = ranks.gathered(flow)[0]  # GPUs round differently
    tolerance = config.bupo.auto_layer
    assert tolerance is not None
    found = boundary_layer(flow.by_text(flow.change("ffn")), tolerance, config.seed)
    tokens = len(flow.token)
    record = {"responses": len(texts), "tokens": tokens, **asdict(found)}
    if found.layer is None:
        chosen = "none" if found.candidate is None else f"layer {found.candidate}"
        replace_text(file.with_suffix(".failed.json"), json.dumps(record, indent=1) + "\n")
        raise RunError(
            f"bupo.auto_layer: no clear boundary in {len(texts)} responses ({found.reason}; the "
            f"rule gives {chosen}); see {file.with_suffix('.failed.json')} and set bupo.layer, "
            "bupo.auto_layer=null"
        )
    replace_text(file, json.dumps(record, indent=1) + "\n")
    display.say(
        f"auto_layer: layer {found.layer} of {flow.layers} (95 % of resamples in {found.low}.."
        f"{found.high}), from {tokens} tokens of {len(texts)} responses; the curve is in {file}"
    )
    return found.layer
