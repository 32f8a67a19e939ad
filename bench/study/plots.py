"""The pictures of docs/study.md: how each way to train learns, and how it ends against GRPO."""

from statistics import fmean
from typing import Any

from rows import Row
from study.cells import BASELINE
from study.table import by_cell, differences, evaluations, last, spread

from bupo.report.drawing import figure, legend, style
from bupo.report.palette import BLUE, GREY, INK, ORANGE, SERIES

CURVES = 5
"""Cells whose curves are drawn: the first ones"""


def draw(rows: list[Row]) -> Any:
    """On the left Avg while training, over the seeds that a cell has; on the right the difference
    from GRPO after training, paired by seed, with its 95 % interval."""
    cells = by_cell(rows)
    with style():
        fig, (left, right) = figure(1, 2, max(3.2, 0.3 * len(cells) + 1.2))
        fig.set_facecolor("white")
        for color, (cell, runs) in zip(SERIES, list(cells.items())[:CURVES]):
            of_runs = [{x["step"]: x["avg"] for x in evaluations(run)} for run in runs.values()]
            steps = sorted(set[int].intersection(*(set(one) for one in of_runs)))
            means = [fmean(one[step] for one in of_runs) for step in steps]
            color = INK if cell == BASELINE else color
            left.plot(steps, means, color=color, label=cell, marker=".")
            for one in of_runs:
                left.plot(steps, [one[s] for s in steps], color=color, alpha=0.2, lw=0.8)
        left.set(xlabel="step", title="Avg on held-out problems; thin lines are seeds")
        compared = [cell for cell in cells if cell != BASELINE and differences(cells, cell, last)]
        for place, cell in enumerate(reversed(compared)):
            mean, half = spread(differences(cells, cell, last))
            clear = half is not None and abs(mean) > half
            color = (ORANGE if mean < 0 else BLUE) if clear else GREY
            right.errorbar(mean, place, xerr=half, color=color, fmt="o", ms=4, capsize=3, lw=1.4)
        right.axvline(0, color=INK, lw=0.8)
        right.set_yticks(range(len(compared)), reversed(compared), fontsize=8)
        right.set(title=f"Avg after training, minus that of {BASELINE}")
        right.grid(axis="x")
        legend(fig, [left])
    return fig
