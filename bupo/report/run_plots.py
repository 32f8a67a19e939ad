"""The figures of training runs over their steps.

For one run, orange is the internal phase and blue the final policy. For several, each run has its
own colour.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bupo.report.drawing import LABEL, Style, figure, legend, logarithmic, short
from bupo.report.palette import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SERIES
from bupo.report.run_files import Row, Run, number, plus_minus

PANELS = {
    "reward": {"reward/mean": "mean reward"},
    "entropy": {"policy/entropy": "entropy, nats per token"},
    "length": {
        "response/length": "mean length, tokens",
        "response/truncated": "truncated, share of responses",
    },
}
"""Keys of metrics.jsonl and their labels, by figure"""
STAGES = {
    "rollout": BLUE,
    "reward": GREEN,
    "old_logprobs": "#56b4e9",
    "update": ORANGE,
    "critic": PURPLE,
    "sync": "#9a8700",
    "diagnostics": "#d55e00",
    "rest": GREY,
}
"""The stages of a step, and their colours"""
WHEN = {"before": (GREY, ":"), "phase_switch": (ORANGE, "--"), "latest": (BLUE, "-")}
"""The colour for one run and the line style for several, by evaluation"""


def draw_steps(name: str, runs: Sequence[Run]) -> Figure | None:
    """Draws the figure of a key of PANELS. Returns None if no run has recorded its values."""
    keys = [k for k in PANELS[name] if any(np.isfinite(run.column(k)).any() for run in runs)]
    if not keys:
        return None
    fig, axes = figure(len(keys), 1, 1 + 2.9 * len(keys), sharex=True)
    markers: list[Line2D] = []
    for ax, key in zip(axes, keys):
        for run, color in zip(runs, _colors(runs)):
            _mark_phases(ax, run, color, 0.1 / len(runs) ** 0.5)
            _line(ax, run, key, color)
            if key == "policy/entropy":
                label = "" if color else "final policy, same tokens"
                _line(ax, run, "final/entropy", color or BLUE, label, dashed=True)
        if key == "reward/mean":
            markers = _evaluations(ax, runs)
        ax.set_title(PANELS[name][key].capitalize())
        low, high = ax.dataLim.intervaly
        if name == "entropy" and low > 0 and high > 20 * low:
            logarithmic(ax)
        elif low >= 0:
            ax.set_ylim(0, 1.07 * high or 1)
        ax.margins(x=0.015)
    axes[-1].xaxis.set_major_locator(
        MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )
    axes[-1].set_xlabel("training step")
    legend(fig, axes, markers)
    return fig


def draw_time(runs: Sequence[Run]) -> Figure | None:
    """Draws the seconds that each stage of a step takes, with a panel for each run. Returns None if
    no run has recorded them."""
    runs = [run for run in runs if np.isfinite(run.column("time/step")).any()]
    if not runs:
        return None
    fig, axes = figure(len(runs), 1, 1 + 2.4 * len(runs))
    for ax, run in zip(axes, runs):
        edges = np.append(run.steps - 0.5, run.steps[-1] + 0.5)
        seconds = {name: np.nan_to_num(run.column(f"time/{name}")) for name in STAGES}
        named = np.sum(list(seconds.values()), axis=0)
        seconds["rest"] = np.maximum(np.nan_to_num(run.column("time/step")) - named, 0)
        below = np.zeros(len(run.steps))
        for name, values in seconds.items():
            if values.any():
                look: Style = {"fill": True, "color": STAGES[name], "label": name}
                ax.stairs(below + values, edges, baseline=below, **look)
                below = below + values
        ax.set_title(short(run.name, LABEL) if len(runs) > 1 else "Time of a step")
        ax.set_ylabel("seconds")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        ax.margins(x=0.015)
    axes[-1].set_xlabel("training step")
    legend(fig, axes)
    return fig


def _colors(runs: Sequence[Run]) -> list[str | None]:
    """Returns the colour of each of several runs. A single run has None, for colours by phase."""
    return [SERIES[n % len(SERIES)] if len(runs) > 1 else None for n in range(len(runs))]


def _mark_phases(ax: Axes, run: Run, color: str | None, alpha: float) -> None:
    """Shades internal phases and draws a line at each switch."""
    for n, phase in enumerate(run.phases):
        first, last = phase.steps[0] - 0.5, phase.steps[-1] + 0.5
        if phase.internal:
            ax.axvspan(first, last, color=color or ORANGE, alpha=alpha, linewidth=0)
        if n > 0:
            ax.axvline(first, color=color or GREY, linewidth=1, linestyle=(0, (2, 2)))


def _line(
    ax: Axes, run: Run, key: str, color: str | None, label: str | None = None, dashed: bool = False
) -> None:
    """Draws every step as a thin line and the running mean within each phase as a bold line."""
    steps, values = run.steps, run.column(key)
    width = max(3, len(steps) // 25) if len(steps) >= 12 else 1
    for phase in run.phases:
        mine = np.isin(steps, phase.steps) & np.isfinite(values)
        x, y, hue = steps[mine], values[mine], color or (ORANGE if phase.internal else BLUE)
        if not len(x):
            continue
        window = np.ones(min(width, len(x)))
        mean = np.convolve(y, window, "same") / np.convolve(np.ones(len(x)), window, "same")
        look: Style = {"linewidth": 1.2, "linestyle": "--"} if dashed else {"linewidth": 2}
        look |= {"marker": "o" if len(x) == 1 else "", "markersize": 3}
        name = (short(run.name, LABEL) if color else phase.policy) if label is None else label
        if not dashed:
            ax.plot(x, y, color=hue, linewidth=0.8, alpha=0.4)
        ax.plot(x, mean, color=hue, label=name, **look)


def _evaluations(ax: Axes, runs: Sequence[Run]) -> list[Line2D]:
    """Draws Avg@K with standard errors, with a marker for each data set. Returns legend handles."""
    rows = [row for run in runs for row in run.evals if plus_minus(row, "avg")]
    handles = []
    for n, dataset in enumerate(dict.fromkeys(row["dataset"] for row in rows)):
        look: Style = {"marker": "Dsv^PX"[n % 6], "markersize": 4.5, "linestyle": ":"}
        look |= {"linewidth": 1.2, "zorder": 4}
        for run, color in zip(runs, _colors(runs)):
            mine = [
                row for row in run.evals if row["dataset"] == dataset and plus_minus(row, "avg")
            ]
            x, y, error = ([number(r.get(k)) for r in mine] for k in ("step", "avg", "avg_se"))
            hue = color or SERIES[2 + n % 5]
            ax.errorbar(x, y, error, color=hue, elinewidth=1.2, **look)
        samples = next(row.get("k_samples", "K") for row in rows if row["dataset"] == dataset)
        hue = INK if len(runs) > 1 else SERIES[2 + n % 5]
        handles.append(Line2D([], [], color=hue, label=f"{dataset} Avg@{samples}", **look))
    return handles


def draw_evaluations(runs: Sequence[Run]) -> Figure | None:
    """Draws Pass@K before training, at the phase switch and at the latest evaluation."""
    curves = {}
    for run, color in zip(runs, _colors(runs)):
        for row in run.evals:
            if pass_ks([row]):
                when = row["when"] if row["when"] in WHEN else "latest"
                label = run.name if color else f"{when.replace('_', ' ')}, step {row['step']}"
                alone, line = WHEN[when]
                look: Style = {"color": color, "linestyle": line} if color else {"color": alone}
                curves[run.name, row["dataset"], when] = row, label, look
    return draw_pass_at_k(list(curves.values()))


def pass_ks(rows: Sequence[Row]) -> list[int]:
    """Returns every K for which a row of eval.jsonl has a Pass@K."""
    keys = {key for row in rows for key in row if plus_minus(row, key)}
    return sorted(int(key[5:]) for key in keys if re.fullmatch(r"pass@[1-9]\d{0,8}", key))


def draw_pass_at_k(curves: Sequence[tuple[Row, str, Style]]) -> Figure | None:
    """Draws Pass@K over K with standard errors, with a panel for each data set. Returns None if no
    row has a Pass@K.

    curves: rows of eval.jsonl, each with the label and the style of its line.
    """
    datasets = list(dict.fromkeys(row["dataset"] for row, _, _ in curves if pass_ks([row])))
    if not datasets:
        return None
    columns = min(len(datasets), 3)
    rows = -(-len(datasets) // columns)
    fig, axes = figure(rows, columns, 1 + 2.9 * rows)
    for ax, dataset in zip(axes, datasets):
        mine = [curve for curve in curves if curve[0]["dataset"] == dataset]
        ks = pass_ks([row for row, _, _ in mine])
        for row, label, look in mine:
            y, error = ([number(row.get(f"pass@{k}{end}")) for k in ks] for end in ("", "_se"))
            ax.errorbar(ks, y, error, marker="o", capsize=2.5, label=short(label, LABEL), **look)
        ax.set_title(short(dataset, 30))
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.minorticks_off()
        ax.set_xlabel("K, responses per problem")
        ax.set_ylim(0, min(1.03, 1.07 * ax.dataLim.y1 or 1))
    for ax in axes[len(datasets) :]:
        ax.remove()
    axes[0].set_ylabel("share of problems solved")
    legend(fig, axes)
    return fig
