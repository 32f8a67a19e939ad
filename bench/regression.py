"""Compares a fresh benchmark with the last committed one, by ratios: `regression.py FRESH.jsonl`.

Absolute times differ from card to card and day to day; time over bare GEMMs of the same run does
not. Exit status 0: every figure of the last run in the baseline has a fresh one that is at most
--tolerance worse. 1: one is worse, or missing. 2: there is nothing that could be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
BASELINE = ROOT / "bench" / "results" / "cuda.jsonl"
RATIOS = ("x_three_gemms", "x_one_gemm")
"""A row with three products is compared by the first, one with a single product by the second."""

Row = dict[str, Any]


class Incomparable(Exception):
    """The files do not hold two runs of the same benchmark on the same kind of machine."""


class Figure(NamedTuple):
    what: str
    before: float
    now: float | None
    """None: the fresh run has no such figure"""
    why: str = ""

    def change(self) -> float:
        return math.inf if self.now is None else self.now / self.before - 1


def last_run(file: Path) -> list[Row]:
    """The rows of the newest date."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        newest = max(row["date"] for row in rows)
    except OSError as error:
        raise Incomparable(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Incomparable(f"{file}: not a benchmark's JSON lines ({error})") from None
    return [row for row in rows if row["date"] == newest]


def is_ours(row: Row) -> bool:
    """Neither a peer nor the floor itself."""
    return not row.get("peer") and str(row.get("name", "")).startswith(
        ("policy_loss", "lm_head_logprobs")
    )


def label(row: Row) -> str:
    shape = ", ".join(
        f"{k}={row.get(name)}" for k, name in zip("NDV", ("tokens", "width", "vocab"))
    )
    return f"{row['name']}, {row.get('dtype')}, {shape}"


def ratio(row: Row) -> float | None:
    for key in RATIOS if row.get("products", 3) == 3 else RATIOS[::-1]:
        value = row.get(key)
        if isinstance(value, (int, float)) and 0 < value < math.inf:
            return float(value)
    return None


def compare(baseline: list[Row], fresh: list[Row]) -> list[Figure]:
    """One figure for every ratio of ours in the baseline."""
    machine = {row.get("gpu") or row.get("cpu") for row in baseline}
    other = {row.get("gpu") or row.get("cpu") for row in fresh}
    if machine != other or None in machine:
        raise Incomparable(f"the baseline is of {machine}, the fresh run of {other}")
    now = {label(row): row for row in fresh if is_ours(row)}
    dropped = {
        tuple(row.get(k) for k in ("tokens", "width", "vocab")): row["failed"]
        for row in fresh
        if row.get("name") == "shape" and "failed" in row
    }
    figures = []
    for row in baseline:
        before = ratio(row) if is_ours(row) else None
        if before is None:
            continue
        name = label(row)
        match = now.get(name, {})
        shape = tuple(row.get(k) for k in ("tokens", "width", "vocab"))
        why = match.get("failed") or dropped.get(shape) or "not in the fresh run"
        value = ratio(match) if match else None
        figures.append(Figure(name, before, value, "" if value else why))
    if not figures:
        raise Incomparable("the baseline holds no ratio of ours")
    if all(figure.now is None for figure in figures):
        raise Incomparable("the fresh run holds none of the baseline's figures")
    return figures


def print_table(figures: list[Figure], tolerance: float) -> int:
    """How many are worse or missing."""
    width = max(len(f.what) for f in figures)
    print(f"| {'figure':{width}} | before |   now | change |         |")
    print(f"| {'-' * width} | -----: | ----: | -----: | ------- |")
    bad = 0
    for f in figures:
        worse = not f.change() <= tolerance
        bad += worse
        now = "    -" if f.now is None else f"{f.now:5.2f}"
        change = "     -" if f.now is None else f"{f.change():+6.1%}"
        verdict = f.why or ("WORSE" if worse else "ok")
        print(f"| {f.what:{width}} | {f.before:6.2f} | {now} | {change} | {verdict:7} |")
    return bad


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fresh", type=Path, help="JSON lines of bench_lm_head.py --json")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="default: %(default)s")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="share by which a ratio may grow: %(default)s"
    )
    args = parser.parse_args(arguments)
    if not 0 <= args.tolerance < 1:
        parser.error("--tolerance must be in [0, 1)")
    try:
        figures = compare(last_run(args.baseline), last_run(args.fresh))
    except Incomparable as error:
        print(f"regression: nothing to compare: {error}")
        return 2
    bad = print_table(figures, args.tolerance)
    good = f"none of {len(figures)} ratios grew by more than {args.tolerance:.0%}"
    print(f"regression: {bad} of {len(figures)} are worse or missing" if bad else good)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
