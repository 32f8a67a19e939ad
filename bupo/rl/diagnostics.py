"""Measures the policies of all layers during a run on probes: fixed responses of the model that the
run began with. auto_stop uses the measurements to end phase 1 when it stops helping.

In the paper (arXiv 2512.19673), phase 1 helps while H^l and the upper layers become more alike, and
harms when perplexity and KL(pi^l, upper layers) rise; the paper gives no rule. Here, phase 1 ends
as soon as one of two conditions holds:

    log ppl(step) - log ppl(0) > bupo.auto_stop,     log ppl = -mean log pi(o_t) over the probes
    KL(pi^l || pi) has made no new low for PATIENCE steps

The probes are samples of the first policy pi_0, so the left side of the first condition estimates
KL(pi_0 || pi): how far phase 1 has moved the final policy, which it does not train itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from bupo import ranks
from bupo.config import Config, RunError
from bupo.internal import Sample, distances
from bupo.rl import sharding
from bupo.rl.schedule import Schedule
from bupo.runlog.recorder import Recorder
from bupo.runlog.run_directory import replace_text, shared_rows
from bupo.types import Prompt, Rollout

PROBES, PROBE_TOKENS = 32, 128
"""Number of responses, and of tokens kept from the beginning of each. A measurement of these, every
10 steps, takes under 5 % of a step's time"""
PATIENCE = 5
FILE, PROBES_FILE = "diagnostics.jsonl", "probes.jsonl"


class Diagnostics:
    """Measures the layers' policies on probes, records them, and decides when phase 1 ends."""

    def __init__(
        self, config: Config, out: Path, model: nn.Module, schedule: Schedule, recorder: Recorder
    ) -> None:
        self._config, self._out, self._model = config, out, model
        self._schedule, self._recorder = schedule, recorder
        self._rows = shared_rows(out / FILE)
        self._anchor = max(schedule.layers(), default=None)
        self._texts: list[Sample] = []

    def begin(
        self,
        start: int,
        generate: Callable[[Sequence[Prompt]], list[Rollout]],
        prompts: Sequence[Prompt],
    ) -> None:
        """Before the first step, generates the probes: one response each to prompts from across the
        list. Later, reads the probes that the run began with; without any, nothing is measured.
        Raises RunError if they are lost and auto_stop needs them, or if all new ones are empty."""
        watched = self._config.bupo.auto_stop is not None
        if not self._config.diagnostics.every and not watched:
            return
        file = self._out / PROBES_FILE
        there = ranks.from_first(file.is_file)
        if start and watched and not there:
            raise RunError(
                f"bupo.auto_stop: {file}, which holds the probes of this run, is missing; restore "
                "it, or start a new run"
            )
        if not start and not (self._rows and there):
            chosen = prompts[:: max(1, len(prompts) // PROBES)][:PROBES]
            rows = [
                {"prompt": r.prompt.token_ids, "response": r.response_ids[:PROBE_TOKENS]}
                for r in generate(chosen)
            ]
            rows = [row for row in rows if row["prompt"] and row["response"]]
            if not rows:
                raise RunError(
                    "diagnostics: all probes are empty; diagnostics.every=0 runs without them"
                )
            replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        self._texts = [Sample.of(row["prompt"], row["response"]) for row in shared_rows(file)]

    def due(self, step: int) -> bool:
        """Whether to measure after a step; 0 stands for the state before the first step."""
        if not self._texts:
            return False
        every, watched = self._config.diagnostics.every, self._config.bupo.auto_stop is not None
        return (
            step in (0, self._config.steps)
            or self._schedule.switches_after(step)
            or bool(every and step % every == 0)
            or (watched and self._schedule.policy(step).layer is not None)
        )

    def after(self, step: int) -> dict[str, float]:
        """Measures if this is due, and returns figures for metrics.jsonl. A resumed run does not
        repeat the measurement of a step."""
        if not self.due(step) or (self._rows and self._rows[-1]["step"] >= step):
            return {}
        config = self._config
        found = distances(
            self._model,
            self._texts,
            self._anchor,
            temperature=config.rollout.temperature,
            final_norm=config.bupo.final_norm,
        )
        sharding.reshard(self._model)
        found = ranks.gathered(found)[0]  # it may end the phase, and GPUs round differently
        row: dict[str, Any] = {"step": step, "anchor": self._anchor, **asdict(found)}
        self._rows.append(row)
        row["ends_phase"] = self._ends_phase(step)
        self._recorder.diagnostics(row)
        figures = {"diagnostics/log_perplexity": found.log_perplexity}
        if self._anchor is not None:
            figures["diagnostics/kl_to_final"] = found.kl_to_final[self._anchor - 1]
            figures["diagnostics/similarity_to_last"] = found.similarity[-1]
        return figures

    def ended_phases(self) -> list[int]:
        """Returns the steps that have ended a phase, including those before a resume."""
        return [row["step"] for row in self._rows if row["ends_phase"]]

    @property
    def ends_phase(self) -> str:
        """Why phase 1 ends with the step that was measured last; empty if it does not end."""
        return str(self._rows[-1]["ends_phase"]) if self._rows else ""

    def _ends_phase(self, step: int) -> str:
        limit = self._config.bupo.auto_stop
        if limit is None or step == 0 or self._schedule.policy(step).layer is None:
            return ""
        if self._schedule.switches_after(step):
            return ""
        if self._rows[0]["step"] != 0:
            raise RunError(
                f"bupo.auto_stop: {self._out / FILE} does not begin with step 0, which later steps "
                "are compared with; restore it, or set bupo.auto_stop=null in a new run"
            )
        assert self._anchor is not None
        return stopped_helping(self._rows, self._anchor, limit)


def stopped_helping(rows: Sequence[dict[str, Any]], layer: int, limit: float) -> str:
    """Returns why phase 1 on a layer is over by the rule above, based on the rows of
    diagnostics.jsonl since step 0; empty if it is not over."""
    drift = rows[-1]["log_perplexity"] - rows[0]["log_perplexity"]
    if not drift <= limit:  # also true if the drift is nan
        return f"log perplexity of the probes has risen by {drift:.3f} nats"
    distance = [row["kl_to_final"][layer - 1] for row in rows]
    since = len(distance) - 1 - distance.index(min(distance))
    if since >= PATIENCE:
        return f"KL(pi^{layer} || pi) has made no new low for {since} steps"
    return ""
