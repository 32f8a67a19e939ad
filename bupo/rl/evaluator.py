"""Decides when a run is evaluated, and records the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bupo.config import Config
from bupo.evaluation import estimates as evaluation
from bupo.rl.schedule import Schedule
from bupo.runlog.monitor import Monitor
from bupo.runlog.recorder import Recorder
from bupo.runlog.run_directory import shared_rows
from bupo.types import Prompt, Reward, Rollout


@dataclass
class Evaluator:
    """Evaluates before step 1, where the phase switches, every eval.every steps, and at the end."""

    config: Config
    out: Path
    schedule: Schedule
    problems: Sequence[Prompt]
    generate: Callable[[Sequence[Prompt], int, str], list[Rollout]]
    """Called with problems, the number of responses to each, and a seed"""
    reward: Reward
    recorder: Recorder
    monitor: Monitor

    def due(self, step: int) -> str | None:
        """Returns why the policy is evaluated after a step, as in eval.jsonl; None if it is not."""
        if not self.problems:
            return None
        if step == 0:
            return "before"
        if step == self.config.steps:
            return "after"
        if self.schedule.switches_after(step):
            return "phase_switch"
        return "during" if self.config.eval.every and step % self.config.eval.every == 0 else None

    def best_step(self) -> int | None:
        """Returns the step with the highest Avg@n, averaged over data sets; the first one of
        equals. Only steps from 1 on with a result on every data set count; None without any."""
        found: dict[int, list[float]] = {}
        for row in shared_rows(self.out / "eval.jsonl"):
            found.setdefault(row["step"], []).append(row["avg"])
        sets = len(evaluation.by_dataset(self.problems))
        whole = {step: fmean(avg) for step, avg in found.items() if step and len(avg) == sets}
        return max(whole, key=lambda step: whole[step], default=None)

    def after(self, step: int) -> None:
        """Evaluates if it is due, on the data sets for which the run does not have a result yet."""
        when = self.due(step)
        if when is None:
            return
        rows = shared_rows(self.out / "eval.jsonl")
        recorded = {row["dataset"] for row in rows if row["step"] == step}
        for dataset, problems in evaluation.by_dataset(self.problems).items():
            if dataset in recorded:
                continue
            shown = f"evaluation on {dataset}"
            with self.monitor.watched(f"step {step}, stage {shown}", shown):
                result = evaluation.evaluate(
                    dataset,
                    problems,
                    self.config,
                    self.generate,
                    self.reward,
                    self.recorder.problems(step, evaluation.file_name(dataset)),
                )
            self.recorder.evaluation(step, when, result)
            self.monitor.display.say(f"evaluation {when.replace('_', ' ')} (step {step}): {result}")
