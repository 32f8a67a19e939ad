"""The policies of all layers over a run: layer x step, as the change since its beginning."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.gridspec import SubplotSpec

from bupo.report.plots import COLORS, GREY, INK, Style, axes_at, figure_of, png_of
from bupo.report.run_files import Run, number

MAPS = {
    "entropy": "entropy of πᵐ, nats",
    "kl_to_final": "KL(πᵐ ‖ π), nats",
    "kl_from_anchor": "KL(πˡ ‖ πᵐ), nats",
    "similarity": "cos(Hˡ, Hᵐ)",
}
MOST_RUNS = 3


def draw_layers(runs: list[Run]) -> bytes | None:
    """The picture as PNG; None if no run has looked at its layers twice."""
    tables = [(run, _tables(run)) for run in runs]
    tables = [(run, found) for run, found in tables if found][:MOST_RUNS]
    if not tables:
        return None
    names = [name for name in MAPS if any(name in found for _, found in tables)]
    ratios = [0.7, *[1.0] * len(names)]
    fig, grid = figure_of("layers", {}, ratios, len(tables), right=0.9, hspace=0.42)
    for column, (run, _) in enumerate(tables):
        ax = _perplexity(fig, grid[0, column], run)
        title = "" if column else "perplexity of the probes"
        ax.set_title(title, fontsize=9, color=INK, loc="left")
        if len(tables) > 1:
            ax.set_title(run.name[-20:], fontsize=9, color=GREY, loc="right", parse_math=False)
    for row, name in enumerate(names, start=1):
        shown = [found[name][1] for _, found in tables if name in found]
        limit = max(float(np.nanmax(np.abs(x))) for x in shown) or 1.0
        for column, (run, found) in enumerate(tables):
            if name in found:
                ax = _map(fig.add_subplot(grid[row, column]), found[name], limit, run)
                title = "" if column else MAPS[name]
                ax.set_title(title, fontsize=9, color=INK, loc="left", parse_math=False)
                if row == len(names):
                    ax.set_xlabel("after training step", color=GREY, fontsize=8.5)
        _scale(fig, grid[row, len(tables) - 1], limit)
    return png_of(fig)


def _tables(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name: (steps, [layer, look] minus the first look), of what has the same layers throughout."""
    found = {}
    for name in MAPS:
        rows = [row for row in run.looks if isinstance(row.get(name), list) and row[name]]
        rows = [row for row in rows if len(row[name]) == len(rows[0][name])]
        if len(rows) > 1:
            values = np.array([[number(x) for x in row[name]] for row in rows]).T
            change = values - values[:, :1]
            if np.isfinite(change).any():
                found[name] = np.array([row["step"] for row in rows]), change
    return found


def _map(ax: Axes, table: tuple[np.ndarray, np.ndarray], limit: float, run: Run) -> Axes:
    """One cell a layer and look, layer 1 at the bottom; looks need not be evenly spaced."""
    steps, change = table
    depth, looks = change.shape
    style: Style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "origin": "lower"}
    extent = (0.5, looks + 0.5, 0.5, depth + 0.5)
    ax.imshow(change, aspect="auto", interpolation="nearest", extent=extent, **style)
    _step_ticks(ax, steps)
    layers = np.unique(np.linspace(1, depth, min(depth, 6)).round().astype(int))
    ax.set_yticks(layers, [str(layer) for layer in layers])
    ax.tick_params(colors=GREY, labelsize=8, length=0)
    ax.set_ylabel("layer m", color=GREY, fontsize=8.5)
    for side in ax.spines.values():
        side.set_visible(False)
    _switches(ax, run, steps)
    anchor = next((row["anchor"] for row in run.looks if row.get("anchor")), None)
    if anchor:
        ax.axhline(number(anchor), color=COLORS[1], linewidth=1, linestyle=(0, (1, 2)))
    return ax


def _perplexity(fig: Any, place: SubplotSpec, run: Run) -> Axes:
    """A point a look, over the columns of the maps below it."""
    ax = axes_at(fig, place, "")
    steps = np.array([row["step"] for row in run.looks])
    values = np.exp([number(row.get("log_perplexity")) for row in run.looks])
    places = np.arange(1, len(steps) + 1)
    ax.plot(places, values, color=COLORS[0], marker="o", markersize=3, linewidth=1.6)
    ax.set_xlim(0.5, len(steps) + 0.5)
    _step_ticks(ax, steps)
    _switches(ax, run, steps)
    return ax


def _step_ticks(ax: Axes, steps: np.ndarray) -> None:
    few = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 8)).astype(int))
    ax.set_xticks(few + 1, [str(steps[i]) for i in few])


def _switches(ax: Axes, run: Run, steps: np.ndarray) -> None:
    """A line where the run goes on with another policy."""
    for phase in run.phases[1:]:
        place = float(np.searchsorted(steps, phase.steps[0])) + 0.5
        if 0.5 < place < len(steps) + 0.5:
            ax.axvline(place, color=GREY, linewidth=1, linestyle=(0, (2, 2)))


def _scale(fig: Any, place: SubplotSpec, limit: float) -> None:
    """The colours' bar, to the right of a row."""
    box = place.get_position(fig)
    ax = fig.add_axes((box.x1 + 0.015, box.y0, 0.015, box.height))
    ax.imshow(
        np.linspace(-1, 1, 128)[:, None], aspect="auto", cmap="RdBu_r", origin="lower",
        extent=(0, 1, -limit, limit),
    )  # fmt: skip
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.set_yticks([-limit, 0, limit], [f"−{limit:.2g}", "0", f"+{limit:.2g}"])
    ax.tick_params(colors=GREY, labelsize=7.5, length=0)
    for side in ax.spines.values():
        side.set_visible(False)
