"""Maps of all layers' policies over a run, layer x step, as the change since the first step."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bupo.report.drawing import Style, figure, heat, spread
from bupo.report.palette import BLUE, GREY, ORANGE
from bupo.report.run_files import Run, number

MAPS = {
    "entropy": "Entropy of πᵐ, nats",
    "kl_to_final": "KL(πᵐ ‖ π), nats",
    "kl_from_anchor": "KL(πˡ ‖ πᵐ), nats",
    "similarity": "cos(Hˡ, Hᵐ)",
}
"""Title by key of diagnostics.jsonl"""


def draw_layers(run: Run) -> Figure | None:
    """Draws a map of each quantity below the perplexity of the probes. Returns None if the run has
    not measured its layers at least twice."""
    tables = {name: table for name in MAPS if (table := _table(run, name))}
    if not tables:
        return None
    size: Style = {"height_ratios": [0.7, *[1.0] * len(tables)]}
    fig, (top, *below) = figure(1 + len(tables), 1, 1.9 * (1 + len(tables)), **size)
    steps = [row["step"] for row in run.looks]
    perplexity = np.exp([number(row.get("log_perplexity")) for row in run.looks])
    top.plot(range(1, len(steps) + 1), perplexity, color=BLUE, marker="o", markersize=3)
    top.set_title("Perplexity of the probes")
    _over_looks(top, steps, run)
    anchor = next((row["anchor"] for row in run.looks if row.get("anchor")), None)
    for ax, (name, (steps, change)) in zip(below, tables.items()):
        limit = float(np.nanmax(np.abs(change))) or 1.0
        heat(ax, change, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.axhline(number(anchor), color=ORANGE, linewidth=1, linestyle=":")
        ax.set_title(MAPS[name])
        _over_looks(ax, steps, run)
    below[-1].set_xlabel("after training step")
    return fig


def _table(run: Run, name: str) -> tuple[list[int], NDArray[np.float64]] | None:
    """Returns the steps, and values [layer, step] minus those of the first step, for all rows with
    as many layers as the first."""
    rows = [row for row in run.looks if isinstance(row.get(name), list) and row[name]]
    rows = [row for row in rows if len(row[name]) == len(rows[0][name])]
    values = np.array([[number(x) for x in row[name]] for row in rows]).T
    if len(rows) < 2 or not np.isfinite(change := values - values[:, :1]).any():
        return None
    return [row["step"] for row in rows], change


def _over_looks(ax: Axes, steps: list[int], run: Run) -> None:
    """Labels the x axis with the measured steps, which may be unevenly spaced, and draws a line at
    each step where the run switches to another policy."""
    few = spread(len(steps))
    ax.set_xticks(few, [str(steps[i - 1]) for i in few])
    ax.set_xlim(0.5, len(steps) + 0.5)
    for phase in run.phases[1:]:
        place = float(np.searchsorted(steps, phase.steps[0])) + 0.5
        ax.axvline(place, color=GREY, linewidth=1, linestyle=(0, (2, 2)))
