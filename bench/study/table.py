"""The tables of docs/study.md, made of the results."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean

from rows import Row
from study.cells import BASELINE

RESAMPLES = 10_000


def last(row: Row, key: str = "avg") -> float:
    """A figure of the evaluation after training."""
    return float(row["evals"][-1][key])


def area(row: Row) -> float:
    """The mean of Avg over the training, by the trapezoidal rule over the evaluations."""
    points = [(evaluation["step"], evaluation["avg"]) for evaluation in row["evals"]]
    pieces = pairwise(points)
    total = sum((after - before) * (a + b) / 2 for (before, a), (after, b) in pieces)
    return float(total / (points[-1][0] - points[0][0]))


def interval(differences: Sequence[float]) -> str:
    """The mean of paired differences and, of three or more, its 95 % bootstrap interval."""
    mean = f"{fmean(differences):+.3f}"
    if len(differences) < 3:
        return f"{mean} (too few seeds)"
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(differences, k=len(differences))) for _ in range(RESAMPLES))
    low, high = means[RESAMPLES // 40], means[-RESAMPLES // 40 - 1]
    return f"{mean} [{low:+.3f}, {high:+.3f}]"


def study_table(rows: list[Row]) -> str:
    """Each cell against the baseline, over the seeds that both have."""
    by_cell: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_cell.setdefault(row["cell"], {})[row["seed"]] = row
    base = by_cell.get(BASELINE, {})
    k = max(int(key[5:]) for key in rows[0]["evals"][-1] if key.startswith("pass@"))
    figures: list[tuple[str, Callable[[Row], float]]] = [
        ("Avg", last),
        ("mean Avg while training", area),
        (f"Pass@{k}", lambda row: last(row, f"pass@{k}")),
    ]
    lines = [
        f"| cell | seeds | {' | '.join(f'{name} | against {BASELINE}' for name, _ in figures)} |",
        "|---|---:|" + "---:|---|" * len(figures),
    ]
    for cell, runs in sorted(by_cell.items(), key=lambda item: item[0] != BASELINE):
        cells = [cell, str(len(runs))]
        for _, figure in figures:
            pairs = [figure(runs[seed]) - figure(base[seed]) for seed in runs if seed in base]
            cells.append(f"{fmean(map(figure, runs.values())):.3f}")
            cells.append("" if cell == BASELINE or not pairs else interval(pairs))
        lines.append(f"| {' | '.join(cells)} |")
    first = [row["evals"][0]["avg"] for row in base.values()]
    n, date = rows[0]["evals"][-1]["n"], max(row["date"] for row in rows)[:10]
    before = f" Before training, Avg is {fmean(first):.3f}." if first else ""
    return "\n".join(lines) + (
        f"\n\nAveraged over seeds; differences are paired by seed, with 95 % bootstrap intervals "
        f"over seeds. {n} held-out problems.{before} {date}, torch {rows[0]['torch']}."
    )
