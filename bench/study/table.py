"""The tables of docs/study.md, made of the results."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean, stdev

from rows import Row
from study.cells import BASELINE, EDITIONS

AREA = "mean Avg while training"
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t for 1 to 9 degrees of freedom"""


def evaluations(row: Row, dataset: str | None = None) -> list[Row]:
    """The evaluations on a data set; None: on the first one."""
    name = dataset or row["evals"][0].get("dataset")
    return [x for x in row["evals"] if x.get("dataset") == name]


def last(row: Row, key: str = "avg", dataset: str | None = None) -> float:
    """A figure of the evaluation after training."""
    return float(evaluations(row, dataset)[-1][key])


def area(row: Row, steps: Collection[int]) -> float:
    """The mean of Avg over the training, by the trapezoidal rule over the evaluations after these
    steps."""
    found = {x["step"]: x["avg"] for x in evaluations(row)}
    points = [(step, found[step]) for step in sorted(steps)]
    pieces = pairwise(points)
    total = sum((after - before) * (a + b) / 2 for (before, a), (after, b) in pieces)
    return float(total / (points[-1][0] - points[0][0]))


def by_cell(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """The runs of each cell by seed, the baseline first and the others in the study's order."""
    named = [name for edition in EDITIONS.values() for name in edition.cells]
    order = list(dict.fromkeys([BASELINE, *named, *(row["cell"] for row in rows)]))
    found: dict[str, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: order.index(row["cell"])):
        found.setdefault(row["cell"], {})[row["seed"]] = row
    return found


def differences(
    cells: dict[str, dict[int, Row]], cell: str, figure: Callable[[Row], float]
) -> list[float]:
    """A figure minus that of the baseline, for each seed that both have."""
    base, runs = cells.get(BASELINE, {}), cells[cell]
    return [figure(runs[seed]) - figure(base[seed]) for seed in runs if seed in base]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Their mean, and half of its 95 % t-interval; None for a single value."""
    n = len(values)
    half = T_975[n - 2] * stdev(values) / math.sqrt(n) if n > 1 else None
    return fmean(values), half


def interval(values: Sequence[float]) -> str:
    mean, half = spread(values)
    if half is None:
        return f"{mean:+.3f} (one seed)"
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def study_table(rows: list[Row]) -> str:
    """Each cell against the baseline, over the seeds that both have."""
    found = by_cell(rows)
    base = found.get(BASELINE, {})
    # A run of two phases has one more evaluation, between them.
    steps = set[int].intersection(*({x["step"] for x in row["evals"]} for row in rows))
    k = max(int(key[5:]) for key in rows[0]["evals"][-1] if key.startswith("pass@"))
    figures: list[tuple[str, Callable[[Row], float]]] = [
        ("Avg", last),
        (AREA, lambda row: area(row, steps)),
        (f"Pass@{k}", lambda row: last(row, f"pass@{k}")),
    ]
    others = list(dict.fromkeys(x.get("dataset") for x in rows[0]["evals"]))[1:]
    for name in others:
        figures.append((f"Avg on {name}", partial(last, dataset=name)))
        figures.append((f"Pass@{k} on {name}", partial(last, key=f"pass@{k}", dataset=name)))
    lines = [
        f"| cell | seeds | {' | '.join(f'{name} | against {BASELINE}' for name, _ in figures)} |",
        "|---|---:|" + "---:|---|" * len(figures),
    ]
    starts = [row | {"evals": [x for x in row["evals"] if not x["step"]]} for row in base.values()]
    if starts:
        cells = ["before training", str(len(starts))]
        for name, figure in figures:
            cells += ["" if name == AREA else f"{fmean(map(figure, starts)):.3f}", ""]
        lines.append(f"| {' | '.join(cells)} |")
    for cell, runs in found.items():
        cells = [cell, str(len(runs))]
        for _, figure in figures:
            pairs = differences(found, cell, figure)
            cells.append(f"{fmean(map(figure, runs.values())):.3f}")
            cells.append("" if cell == BASELINE or not pairs else interval(pairs))
        lines.append(f"| {' | '.join(cells)} |")
    n, date = rows[0]["evals"][-1]["n"], max(row["date"] for row in rows)[:10]
    return "\n".join(lines) + (
        f"\n\nAveraged over seeds; differences are paired by seed, with 95 % t-intervals over "
        f"seeds. {n} held-out problems of each data set. {date}, torch {rows[0]['torch']}."
    )
