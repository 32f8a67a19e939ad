"""Writes the numbers of a run to metrics.jsonl, eval.jsonl and other files, and to mirrors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bupo import ranks
from bupo.runlog.mirrors import Mirrors
from bupo.runlog.run_directory import append_rows, json_lines, read_rows, replace_text
from bupo.types import EvalResult


class Recorder:
    """Appends rows to the files of the run directory, flushes each line, and mirrors them."""

    def __init__(
        self,
        run: Path,
        keep_until_step: int,
        wandb: str | None = None,
        name: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """keep_until_step: rows of later steps are removed, because these steps will run again.
        settings: the settings of the run by dotted key, for W&B."""
        self._run = run
        for file in ("metrics.jsonl", "eval.jsonl", "diagnostics.jsonl"):
            rows = [r for r in read_rows(run / file) if r["step"] <= keep_until_step]
            replace_text(run / file, json_lines(rows))
        self._mirrors: Mirrors | None = None
        if ranks.is_first():
            self._mirrors = Mirrors(run, keep_until_step, wandb, name, dict(settings or {}))

    def step(self, row: dict[str, Any]) -> None:
        self._append("metrics.jsonl", row)
        self._mirror(row["step"], {k: v for k, v in row.items() if "/" in k or "_" in k})

    def evaluation(self, step: int, when: str, result: EvalResult) -> None:
        row = {"step": step, "when": when, **result.row()}
        self._append("eval.jsonl", row)
        self._mirror(step, result.scalars())

    def diagnostics(self, row: dict[str, Any]) -> None:
        self._append("diagnostics.jsonl", row)

    def problems(self, step: int, file_name: str) -> Callable[[list[dict[str, Any]]], None]:
        """Starts the file of a data set's problems and responses; returns a function that extends
        it."""
        folder = self._run / "evaluations" / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / file_name, "")
        return lambda rows: append_rows(folder / file_name, rows)

    def rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        folder = self._run / "rollouts"
        folder.mkdir(exist_ok=True)
        replace_text(folder / f"step_{step:06d}.jsonl", json_lines(rows, ascii_only=False))

    def _mirror(self, step: int, values: dict[str, float]) -> None:
        if self._mirrors is not None:
            self._mirrors.scalars(step, values)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        append_rows(self._run / name, [row])

    def close(self) -> None:
        if self._mirrors is not None:
            self._mirrors.close()
