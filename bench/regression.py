"""Compares a fresh benchmark with the last committed one, by ratios: `regression.py FRESH.jsonl`.

Absolute times differ from card to card and day to day; time over bare GEMMs of the same run does
not. Exit status 0: every figure of the last run in the baseline has a fresh one that is at most
--tolerance worse. 1: one is worse, or missing. 2: there is nothing that could be compared.
"""

import argparse
import math
import sys
from pathlib import Path

from rows import RESULTS, SHAPE, Row, aligned, newest, table

BASELINE = RESULTS / "cuda.jsonl"
OURS = ("policy_loss", "lm_head_logprobs")


class Incomparable(Exception):
    """The files do not hold two runs of the same benchmark on the same kind of machine."""


def last_run(file: Path) -> list[Row]:
    try:
        rows = newest(file)
    except (ValueError, KeyError, TypeError) as error:
        raise Incomparable(f"{file} does not hold JSON lines of a benchmark ({error})") from None
    if not rows:
        raise Incomparable(f"{file} does not exist or is empty")
    return rows


def shape_of(row: Row) -> str:
    return ", ".join(f"{letter}={row.get(key)}" for letter, key in zip("NDV", SHAPE))


def label(row: Row) -> str:
    return f"{row['name']}, {row.get('dtype')}, {shape_of(row)}"


def ratios(rows: list[Row]) -> dict[str, float]:
    """Those of ours by label: over three bare products, or over one if the row has one product."""
    found = {}
    for row in rows:
        value = row.get("x_three_gemms" if row.get("products") == 3 else "x_one_gemm") or math.nan
        if row["name"].startswith(OURS) and not row.get("peer") and 0 < value < math.inf:
            found[label(row)] = value
    return found


def compare(baseline: list[Row], fresh: list[Row], tolerance: float) -> int:
    """Prints a line for each ratio of the baseline. Returns how many are worse or missing."""
    machines = [{row.get("gpu") or row.get("cpu") for row in rows} for rows in (baseline, fresh)]
    if machines[0] != machines[1] or None in machines[0]:
        raise Incomparable(f"the baseline is of {machines[0]}, the fresh run of {machines[1]}")
    before, now = ratios(baseline), ratios(fresh)
    if not before.keys() & now.keys():
        raise Incomparable("the two runs do not have a figure of ours in common")
    failed = {label(row): row["failed"] for row in fresh if "failed" in row}
    dropped = {shape_of(row): row["failed"] for row in fresh if row["name"] == "shape"}
    cells, bad = [], 0
    for name, old in before.items():
        if name in now:
            change = now[name] / old - 1
            worse = change > tolerance
            cells.append([name, f"{old:.2f}", f"{now[name]:.2f}", f"{change:+.1%}"])
            cells[-1].append("WORSE" if worse else "ok")
        else:
            worse = True
            why = failed.get(name) or dropped.get(name[name.index("N=") :], "not in the fresh run")
            cells.append([name, f"{old:.2f}", "-", "-", why])
        bad += worse
    print(aligned(table(("figure", "before", "now", "change", "verdict"), cells)))
    verdict = f"{bad} of {len(before)} ratios are worse or missing"
    good = f"none of {len(before)} ratios grew by more than {tolerance:.0%}"
    print(f"regression: {verdict if bad else good}")
    return bad


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("fresh", type=Path, help="JSON lines of bench_lm_head.py --json")
    add("--baseline", type=Path, default=BASELINE, help="default: %(default)s")
    add("--tolerance", type=float, default=0.05, help="by which a ratio may grow: %(default)s")
    args = parser.parse_args(arguments)
    if not 0 <= args.tolerance < 1:
        parser.error(f"--tolerance must be at least 0 and below 1, got {args.tolerance}")
    try:
        return int(compare(last_run(args.baseline), last_run(args.fresh), args.tolerance) > 0)
    except Incomparable as error:
        print(f"regression: nothing to compare: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
