"""What the files of a run directory say, read forgivingly: the data behind the report."""

import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import numpy as np

ROLLOUTS_READ = 64  # of each step's file, which can hold a thousand long answers


@dataclass(frozen=True)
class Phase:
    """Consecutive steps that trained one policy: that of an internal layer, or the final one."""

    internal: bool
    layer: object
    steps: list[int]

    @property
    def policy(self) -> str:
        digits = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
        return f"π{str(self.layer).translate(digits)}" if self.internal else "final policy"


@dataclass(frozen=True)
class Run:
    """What the files of a run directory say; notes are what a reader should know first."""

    name: str
    rows: list[dict]
    evals: list[dict]
    config: str
    notes: list[str]
    looks: list[dict] = field(default_factory=list)
    """Rows of diagnostics.jsonl"""

    @property
    def steps(self) -> np.ndarray:  # [steps], ascending
        return np.array([row["step"] for row in self.rows], dtype=int)

    def column(self, key: str) -> np.ndarray:  # [steps], nan where missing or out of any range
        values = np.array([number(row.get(key)) for row in self.rows], dtype=float)
        return np.where(np.abs(values) < 1e99, values, np.nan)

    def finite(self, key: str) -> np.ndarray:
        return self.column(key)[np.isfinite(self.column(key))]

    @property
    def phases(self) -> list[Phase]:
        def policy(row: dict) -> tuple[bool, object]:
            return (True, row.get("layer")) if row.get("phase") == "internal" else (False, None)

        groups = groupby(self.rows, policy)
        return [Phase(*who, steps=[row["step"] for row in rows]) for who, rows in groups]

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(row["dataset"] for row in self.evals))

    @property
    def sentence(self) -> str:
        """What happened, in plain words."""
        if not self.rows:
            return "No training step has been recorded yet."
        n, phases = len(self.rows), self.phases
        counts = [str(len(p.steps)) if len(phases) > 1 else "all" for p in phases]
        whose = [f"policy of layer {p.layer}" if p.internal else "final policy" for p in phases]
        parts = ", then ".join(f"{c} on the {w}" for c, w in zip(counts, whose, strict=True))
        reward = [f"{value:.2f}" for value in self.finite("reward/mean")]
        start = f"Mean reward {' → '.join(reward[:1] + reward[1:][-1:])} in " if reward else ""
        return f"{start}{n} step{'s' * (n > 1)} ({parts})."


def number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def short(value: object) -> str:
    x = number(value)
    return "" if math.isnan(x) else f"{x:,.0f}" if 1e3 <= abs(x) < 1e7 else f"{x:.3g}"


def plus_minus(row: dict, key: str) -> str:
    value, error = number(row.get(key)), number(row.get(f"{key}_se"))
    spread = "" if math.isnan(error) else f" ± {error:.3f}"
    return "" if math.isnan(value) else f"{value:.3f}{spread}"


def pass_ks(rows: list[dict]) -> list[int]:
    """Every K for which a row of eval.jsonl has a pass@K."""
    keys = {key for row in rows for key in row if plus_minus(row, key)}
    return sorted(int(key[5:]) for key in keys if re.fullmatch(r"pass@\d+", key))


def read_run(run_dir: Path, name: str) -> Run:
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no such run directory: {run_dir}")
    notes: list[str] = []
    evals = {}  # here and in rows, of what a resumed run wrote twice the later counts
    rows = {row["step"]: row for row in _read(run_dir / "metrics.jsonl", notes)}
    for row in _read(run_dir / "eval.jsonl", notes):
        row |= {"dataset": str(row.get("dataset")), "when": str(row.get("when"))}
        evals[row["step"], row["dataset"], row["when"]] = row
    values = [(k, v) for row in rows.values() for k, v in row.items() if k != "layer"]
    bad = [k for k, v in values if v is None or (isinstance(v, float) and not math.isfinite(v))]
    counts = [f"{key} in {bad.count(key)} of {len(rows)} steps" for key in dict.fromkeys(bad)]
    notes += [f"Not finite: {', '.join(counts)}."] if counts else []
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    ordered = sorted(evals.values(), key=lambda row: row["step"])
    looks = {row["step"]: row for row in _read(run_dir / "diagnostics.jsonl", notes)}
    by_step = [[table[step] for step in sorted(table)] for table in (rows, looks)]
    return Run(name, by_step[0], ordered, text, notes, by_step[1])


def _read(path: Path, notes: list[str], limit: int | None = None) -> Iterator[dict]:
    """Rows of a file. Lines that are no JSON object with a step (a write cut short) are noted."""
    unread = 0
    with path.open("rb") if path.is_file() else io.BytesIO() as lines:
        for line in islice(lines, limit):
            try:
                row = json.loads(line.decode(errors="replace"))
                row["step"] = int(row["step"] if limit is None else 0)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                unread += bool(line.strip())
                continue
            yield row
    if unread:
        notes.append(f"{path.name}: {unread} unreadable line{'s' * (unread > 1)} left out.")


def pick_rollouts(run_dir: Path, phases: list[Phase]) -> Iterator[dict]:
    """A best and a worst rollout of the first step, the first after a switch, and the last."""
    paths = run_dir.glob("rollouts/step_*.jsonl")
    files = {int(path.stem[5:]): path for path in paths if path.stem[5:].isdecimal()}
    where = {min(files): "first step", max(files): "last step"} if files else {}
    for phase in phases[1:]:
        if after := [step for step in files if step >= phase.steps[0]]:
            where.setdefault(min(after), "after the switch")
    for step in sorted(where):
        rows = list(_read(files[step], [], ROLLOUTS_READ))
        rows.sort(key=lambda row: -np.nan_to_num(number(row.get("reward")), nan=-1e9))
        for row in rows[:1] + rows[1:][-1:]:
            yield row | {"step": step, "where": where[step]}
