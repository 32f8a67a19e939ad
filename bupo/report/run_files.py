"""Reads the files of a run directory and tolerates damaged or missing ones."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
RANKS = ("tokens_per_second", "slowest", "rollout_max", "rollout_min")
"""Metrics of several ranks"""
ROLLOUTS_READ = 64
"""Number of rollouts read from each step's file, which can hold a thousand long responses"""


class Phase(NamedTuple):
    """Consecutive steps that trained one policy."""

    internal: bool
    policy: str
    """Description, for example: policy of layer 3"""
    steps: list[int]


@dataclass(frozen=True)
class Run:
    """The contents of a run directory; rows are in ascending order of their steps."""

    name: str
    rows: list[Row]
    """Rows of metrics.jsonl, one per step"""
    evals: list[Row]
    """Rows of eval.jsonl"""
    looks: list[Row]
    """Rows of diagnostics.jsonl, one per measurement of the layers"""
    config: str
    notes: list[str]
    """Sentences that a reader should read first"""

    @property
    def steps(self) -> NDArray[np.int_]:
        return np.array([row["step"] for row in self.rows], dtype=int)

    def column(self, key: str) -> NDArray[np.float64]:
        """Returns the values of a key for each step; nan if missing, not finite or above 1e99."""
        values = np.array([number(row.get(key)) for row in self.rows], dtype=float)
        return np.where(np.abs(values) < 1e99, values, np.nan)

    @property
    def phases(self) -> list[Phase]:
        def policy(row: Row) -> tuple[bool, str]:
            internal = row.get("phase") == "internal"
            return internal, f"policy of layer {row.get('layer')}" if internal else "final policy"

        groups = groupby(self.rows, policy)
        return [Phase(*key, [row["step"] for row in rows]) for key, rows in groups]

    @property
    def sentence(self) -> str:
        """A sentence that summarises the run"""
        if not self.rows:
            return "No training step has been recorded yet."
        n, phases = len(self.rows), self.phases
        counts = [str(len(p.steps)) if len(phases) > 1 else "all" for p in phases]
        parts = ", then ".join(f"{c} on the {p.policy}" for c, p in zip(counts, phases))
        reward = [f"{value:.2f}" for value in self.column("reward/mean") if math.isfinite(value)]
        start = f"Mean reward {' → '.join(reward[:1] + reward[1:][-1:])} in " if reward else ""
        return f"{start}{n} step{'s' * (n > 1)} ({parts})."

    @property
    def sentence_on_ranks(self) -> str:
        """A sentence on the speed of several ranks, or nothing about a single process"""
        columns = (self.column(f"ranks/{key}") for key in RANKS)
        tokens, numbers, longest, shortest = (x[np.isfinite(x)] for x in columns)
        if not numbers.size:
            return ""
        slowest, counts = np.unique(numbers, return_counts=True)
        return (
            f"A rank processes {np.median(tokens):,.0f} response tokens a second. Generation takes "
            f"{np.median(longest):.3g} s on the slowest rank and {np.median(shortest):.3g} s on "
            f"the fastest; in {counts.max() / numbers.size:.0%} of the steps rank "
            f"{slowest[counts.argmax()]:.0f} is the slowest."
        )


def number(value: object) -> float:
    """Converts a value to float, or to nan if it is not a number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def plus_minus(row: Row, key: str) -> str:
    """Formats a mean with its standard error if that is defined; empty without a mean."""
    value, error = number(row.get(key)), number(row.get(f"{key}_se"))
    spread = "" if math.isnan(error) else f" ± {error:.3f}"
    return "" if math.isnan(value) else f"{value:.3f}{spread}"


def read_run(folder: Path, name: str) -> Run:
    """Reads the run in a folder and names it. Raises OSError, but not for a file's contents."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run directory: {folder}")
    notes: list[str] = []
    # A resumed run may write a row twice; the later one counts.
    rows = {row["step"]: row for row in _rows(folder / "metrics.jsonl", notes)}
    looks = {row["step"]: row for row in _rows(folder / "diagnostics.jsonl", notes)}
    evals = {}
    for row in _rows(folder / "eval.jsonl", notes):
        row |= {"dataset": str(row.get("dataset")), "when": str(row.get("when"))}
        evals[row["step"], row["dataset"], row["when"]] = row
    values = [item for row in rows.values() for item in row.items() if item[0] != "layer"]
    bad = [k for k, v in values if v is None or (isinstance(v, float) and not math.isfinite(v))]
    counts = [f"{key} in {bad.count(key)} of {len(rows)} steps" for key in dict.fromkeys(bad)]
    notes += [f"Not finite: {', '.join(counts)}."] if counts else []
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    steps, tests, seen = (
        sorted(table.values(), key=lambda row: row["step"]) for table in (rows, evals, looks)
    )
    return Run(name, steps, tests, seen, text, notes)


def _rows(file: Path, notes: list[str], limit: int | None = None, **given: object) -> list[Row]:
    """Reads up to `limit` lines as JSON objects with a step, adding the values of `given`. Other
    lines, such as one left incomplete by a killed process, are counted in notes."""
    rows, unread = [], 0
    with file.open("rb") if file.is_file() else io.BytesIO() as lines:
        for line in islice(lines, limit):
            try:
                row = json.loads(line.decode(errors="replace")) | given
                rows.append(row | {"step": int(row["step"])})
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                unread += bool(line.strip())
    if unread:
        notes.append(f"{file.name}: {unread} unreadable line{'s' * (unread > 1)} left out.")
    return rows


def some_rollouts(folder: Path, run: Run) -> list[Row]:
    """Returns a best and a worst rollout of the first step and of the last step of each phase."""
    picked = []
    for step in dict.fromkeys([*run.steps[:1], *(phase.steps[-1] for phase in run.phases)]):
        rows = _rows(folder / f"rollouts/step_{step:06d}.jsonl", [], ROLLOUTS_READ, step=step)
        rows.sort(key=lambda row: -np.nan_to_num(number(row.get("reward")), nan=-1e9))
        picked += rows[:1] + rows[1:][-1:]
    return picked
