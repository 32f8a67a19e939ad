"""Where numbers go: metrics.jsonl, eval.jsonl and the other files of a run, and their mirrors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bupo.rl.mirrors import Mirrors
from bupo.rl.types import EvalResult, finite_or_none


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file; a last line that was cut by a kill is left out."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def json_lines(rows: Sequence[dict[str, Any]], ascii_only: bool = True) -> str:
    """A line a row, strict JSON: null for what is not finite, wherever it stands."""
    dumped = (json.dumps(_plain(r), ensure_ascii=ascii_only, allow_nan=False) for r in rows)
    return "".join(line + "\n" for line in dumped)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return finite_or_none(value) if isinstance(value, float) else value


def append_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Lines at the end of a JSON lines file, handed to the system at once."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json_lines(rows))


def replace_text(file: Path, text: str) -> None:
    """A new content in one piece: a kill or a full disk leaves the old one."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


class Recorder:
    """Appends rows to the run directory's files, each line flushed, and mirrors them."""

    def __init__(
        self,
        run: Path,
        keep_until_step: int,
        wandb: str | None = None,
        name: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """keep_until_step: rows of later steps are removed (they will be made again). settings of
        the run, by dotted key, for W&B."""
        self._run = run
        for file in ("metrics.jsonl", "eval.jsonl", "diagnostics.jsonl"):
            rows = [r for r in read_rows(run / file) if r["step"] <= keep_until_step]
            replace_text(run / file, json_lines(rows))
        self._mirrors = Mirrors(run, keep_until_step, wandb, name, dict(settings or {}))

    def step(self, row: dict[str, Any]) -> None:
        self._append("metrics.jsonl", row)
        self._mirrors.scalars(row["step"], {k: v for k, v in row.items() if "/" in k or "_" in k})

    def evaluation(self, step: int, when: str, result: EvalResult) -> None:
        row = {"step": step, "when": when, **result.row()}
        self._append("eval.jsonl", row)
        self._mirrors.scalars(step, result.scalars())

    def diagnostics(self, row: dict[str, Any]) -> None:
        self._append("diagnostics.jsonl", row)

    def problems(self, step: int, file_name: str) -> Callable[[list[dict[str, Any]]], None]:
        """Starts the file of one data set's problems and responses; returns what appends to it."""
        folder = self._run / "evaluations" / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file_name).write_text("", encoding="utf-8")
        return lambda rows: append_rows(folder / file_name, rows)

    def rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        folder = self._run / "rollouts"
        folder.mkdir(exist_ok=True)
        text = json_lines(rows, ascii_only=False)
        (folder / f"step_{step:06d}.jsonl").write_text(text, encoding="utf-8")

    def _append(self, name: str, row: dict[str, Any]) -> None:
        append_rows(self._run / name, [row])

    def close(self) -> None:
        self._mirrors.close()


class Stopwatch:
    """Seconds of each stage of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin

    def total(self) -> float:
        return time.monotonic() - self._start
