"""The pictures of the report, as PNG. Of one run, amber is the internal phase and blue the final
policy; of several, colour is the run."""

import io
import re
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from bupo.report.run_files import Phase, Run, number, pass_ks, plus_minus, short

INK, GREY, GRID, INTERNAL, FINAL = "#1f2937", "#6b7280", "#e5e7eb", "#d97706", "#2563eb"
COLORS = [FINAL, INTERNAL, "#0d9488", "#7c3aed", "#e11d48", "#64748b"]  # runs; [2:6] datasets
COLORS += ["#65a30d", "#0891b2", "#c026d3", "#78350f"]
Style = dict[str, Any]
HALO = [withStroke(linewidth=3, foreground="white")]  # keeps text readable over lines
WHEN = {"before": GREY, "phase_switch": INTERNAL, "after": FINAL}
STAGES = {"rollout": "#0d9488", "reward": "#e11d48", "old_logprobs": "#64748b", "update": "#7c3aed"}
STAGES |= {"sync": "#f472b6", "other": "#aab2bf"}
MAX_BARS = 60  # of the time plot; with more steps than this a bar is the mean of several
TITLES = {"reward": "Reward", "pass_at_k": "Pass@K", "entropy": "Entropy"}
TITLES |= {
    "ratio": "How far an update moves the policy",
    "length": "Response length",
    "layers": "Every layer’s policy since the beginning",
    "time": "Time",
}
PANELS = [  # picture, key of metrics.jsonl, y label
    ("reward", "reward/mean", "mean reward"),
    ("entropy", "policy/entropy", "entropy, nats per token"),
    ("ratio", "policy/clip_fraction", "clipped, share"),
    ("ratio", "policy/ratio_max", "largest ratio"),
    ("ratio", "policy/approx_kl", "approx. KL"),
    ("length", "response/length", "mean length, tokens"),
    ("length", "response/truncated", "truncated, share"),
    ("time", "time/step", "seconds per step"),
    ("time", "tokens_per_second", "tokens/s"),
]


def draw(name: str, runs: list[Run]) -> bytes | None:
    """The picture of this name (a key of TITLES), or None if no run recorded what it shows."""
    return _pass_at_k(runs) if name == "pass_at_k" else _picture(name, runs)


def _color(phase: Phase) -> str:
    return INTERNAL if phase.internal else FINAL


def _picture(picture: str, runs: list[Run]) -> bytes | None:
    """The plot as PNG, None if no run recorded what it shows. Several runs have a colour each."""
    panels = [(key, label) for name, key, label in PANELS if name == picture]
    panels = [panel for panel in panels if any(len(run.finite(panel[0])) for run in runs)]
    if not panels:
        return None
    colors = COLORS * len(runs) if len(runs) > 1 else [None]
    ratios = [1.8, 1, 1][: len(panels)]
    fig, grid = figure_of(picture, _key(runs), ratios, right=0.82, hspace=0.16)
    steps = [*np.concatenate([run.steps for run in runs])]
    steps += [row["step"] for run in runs for row in run.evals if picture == "reward"]
    pad = max(0.5, 0.012 * (max(steps) - min(steps)))
    for i, (key, label) in enumerate(panels):
        ax = axes_at(fig, grid[i, 0], label)
        ends = []  # y, text and colour at the right margin
        if key == "time/step":  # the first step warms up: it would flatten all others
            later = [run.finite(key)[-max(1, len(run.rows) - 1) :] for run in runs]
            ax.set_ylim(0, 1.4 * np.quantile(np.concatenate(later), 0.95) or 1)
        for run, color in zip(runs, colors, strict=False):
            name = run.name if color and len(run.name) <= 20 else ""
            _mark_phases(ax, run, color, 0.09 / len(runs) ** 0.5, named=i == 0)
            if key == "policy/entropy":
                final = name if color else "final policy"
                ends += _line(ax, run, "final/entropy", color or FINAL, final, dashed=True)
            if key == "time/step" and not color:
                ends += _stage_bars(ax, run)
            else:
                ends += _line(ax, run, key, color, name)
            if key == "reward/mean":
                ends += _evaluations(ax, run, color)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        ax.tick_params(labelbottom=i == len(panels) - 1)
        ax.set_xlim(min(steps) - pad, max(steps) + pad)
        _limit_y(ax, log=re.search("entropy|ratio_max|kl", key) is not None)
        _end_labels(ax, ends)
    ax.set_xlabel("training step", color=GREY, fontsize=9)
    return png_of(fig)


def _key(runs: list[Run]) -> dict[str, str]:
    """Colour: name of the run and how long it trained internal policies."""
    key = {}
    for run, color in zip(runs if len(runs) > 1 else [], COLORS * len(runs), strict=False):
        ends = [f" ({p.policy} to step {p.steps[-1]})" for p in run.phases if p.internal]
        key[color] = run.name[-60:] + "".join(ends)
    return key


def figure_of(name: str, key: dict, ratios: list, cols: int = 1, **space: float) -> tuple:
    """A figure with a title and a key {colour: text} below it, and the grid for its axes."""
    columns = max(1, min(4, 100 // (8 + max(map(len, key.values()), default=0))))
    head = 0.67 + 0.2 * -(-len(key) // columns)
    height = head + 0.48 + {1: 3.05, 2: 3.6}.get(len(ratios), 1.25 * len(ratios))
    fig = Figure(figsize=(7, height), dpi=150, facecolor="white")
    fig.text(0.02, 1 - 0.12 / height, TITLES[name], fontsize=13, weight="bold", color=INK, va="top")
    lines = [Line2D([], [], color=c, linewidth=2.5, label=f" {text}") for c, text in key.items()]
    at: Style = {
        "loc": "upper left",
        "bbox_to_anchor": (0.02, 1 - 0.4 / height),
        "borderaxespad": 0,
    }
    at |= {"frameon": False, "fontsize": 9, "ncols": columns, "labelcolor": "linecolor"}
    legend = fig.legend(handles=lines, **at)
    for text in legend.get_texts():
        text.set_parse_math(False)
    space |= {"left": 0.1, "bottom": 0.48 / height, "top": 1 - head / height}
    return fig, fig.add_gridspec(len(ratios), cols, height_ratios=ratios, **space)


def png_of(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(fig).print_png(buffer)
    return buffer.getvalue()


def axes_at(fig: Figure, place: SubplotSpec, ylabel: str) -> Axes:
    ax = fig.add_subplot(place)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
    ax.tick_params(colors=GREY, labelsize=8, length=0, which="both")
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_ylabel(ylabel, color=GREY, fontsize=8.5)
    most = 4 if place.rowspan.start else 5
    ax.yaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    return ax


def _mark_phases(ax: Axes, run: Run, color: str | None, alpha: float, named: bool) -> None:
    """Shade internal phases, draw a line at each switch and, for a single run, name the phases."""
    for i, p in enumerate(run.phases):
        first, last = p.steps[0], p.steps[-1]
        if p.internal:
            ax.axvspan(first - 0.5, last + 0.5, color=color or _color(p), alpha=alpha, linewidth=0)
        if i > 0:
            ax.axvline(first - 0.5, color=color or GREY, linewidth=1, linestyle=(0, (2, 2)))
        if named and not color and i in (0, len(run.phases) - 1):  # at the ends they cannot overlap
            text = f"{p.policy} (internal, layer {p.layer})" if p.internal else p.policy
            text += f"  ·  steps {first}–{last}" if last > first else f"  ·  step {first}"
            at: Style = {"transform": ax.transAxes, "ha": "right" if i else "left", "va": "bottom"}
            ax.text(min(i, 1), 1.01, text, color=_color(p), fontsize=9, parse_math=False, **at)


def _line(ax: Axes, run: Run, key: str, color: str | None, label: str, dashed=False) -> list:
    """Every step thin, the running mean bold and never across a switch. Returns its end label."""
    steps, values, ends = run.steps, run.column(key), []
    width = max(3, len(steps) // 25) if len(steps) >= 12 else 1
    for p in run.phases:
        part = np.isin(steps, p.steps) & np.isfinite(values)
        x, y, hue = steps[part], values[part], color or _color(p)
        if not len(x):
            continue
        window = np.ones(min(width, len(x)))
        mean = np.convolve(y, window, "same") / np.convolve(np.ones(len(x)), window, "same")
        dot: Style = {"marker": "o", "markersize": 2} if len(steps) <= 60 and not dashed else {}
        ax.plot(x, y, color=hue, linewidth=0 if dashed else 0.8, alpha=0.35, **dot)
        style: Style = (
            {"linestyle": (0, (3, 1.5)), "linewidth": 1.2} if dashed else {"linewidth": 2}
        )
        ax.plot(x, mean, color=hue, marker="o" if len(x) == 1 else "", markersize=3, **style)
        names = {} if color else {"policy/entropy": p.policy, "reward/mean": "rollouts"}
        text = label or names.get(key, short(mean[-1]))
        if p.steps[-1] == steps[-1]:
            ends = [(mean[-1], text, hue)]
        elif key == "policy/entropy" and p.internal and not color:
            at: Style = {"xytext": (6, 6), "textcoords": "offset points", "va": "center"}
            text = f"{text}, being trained"
            ax.annotate(text, (x[-1], mean[-1]), color=hue, fontsize=8.5, path_effects=HALO, **at)
    return ends


def _evaluations(ax: Axes, run: Run, color: str | None) -> list:
    """Avg@K with standard errors: a marker and, for a single run, a colour for each dataset."""
    ends = []
    for i, dataset in enumerate(run.datasets):
        rows = [row for row in run.evals if row["dataset"] == dataset and plus_minus(row, "avg")]
        x, y, error = ([number(r.get(k)) for r in rows] for k in ("step", "avg", "avg_se"))
        hue, marker = color or COLORS[2 + i % 4], "Dsv^PX"[i % 6]
        style: Style = {"linestyle": (0, (1, 2)), "linewidth": 1.2, "elinewidth": 1.2, "zorder": 4}
        size = 4.5 if len(rows) < 15 else 3
        ax.errorbar(x, y, np.nan_to_num(error), color=hue, marker=marker, markersize=size, **style)
        if rows and (not color or i > 0):
            ends.append((y[-1], f"{dataset} Avg@{rows[-1].get('k_samples', 'K')}", hue))
    return ends


def _stage_bars(ax: Axes, run: Run) -> list:
    """Stage times stacked. In a long run a bar is the mean of several steps."""
    keys = {key[5:] for row in run.rows for key in row if key.startswith("time/")} - {"step"}
    stages = {name: np.nan_to_num(run.column(f"time/{name}")) for name in [*STAGES, *sorted(keys)]}
    rest = np.nan_to_num(run.column("time/step")) - sum(stages.values())
    stages["other"] = stages["other"] + np.clip(rest, 0, None)
    groups = np.array_split(np.arange(len(run.rows)), min(len(run.rows), MAX_BARS))
    x = np.array([run.steps[group].mean() for group in groups])
    width = 0.85 * (x[1] - x[0] if len(x) > 1 else 1)
    top, ends = np.zeros(len(x)), []
    for name, seconds in stages.items():
        height = np.array([seconds[group].mean() for group in groups])
        if seconds.sum() > 0.005 * sum(s.sum() for s in stages.values()):
            ax.bar(x, height, width, top, color=STAGES.get(name, GREY), linewidth=0)
            middle = top[-1] + height[-1] / 2
            ends.append((middle, name.replace("_", " "), STAGES.get(name, GREY)))
            top = top + height
    limit = ax.get_ylim()[1]
    for i in np.flatnonzero(top > limit):
        at: Style = {"xytext": (3, -2), "textcoords": "offset points", "va": "top", "fontsize": 8}
        place = x[i] + width / 2, limit
        ax.annotate(f"↑ {top[i]:.3g} s", place, color=GREY, path_effects=HALO, **at)
    return ends


def _limit_y(ax: Axes, log: bool) -> None:
    """From zero where nothing lies below; logarithmic, if wanted, where values span a decade."""
    low, high = ax.dataLim.intervaly
    if log and low > 0 and high > 20 * low:
        ax.set_yscale("log")
        few = high > 300 * low or ax.bbox.height < 250
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        ax.yaxis.set_minor_locator(NullLocator())
    elif low >= 0 and ax.get_autoscaley_on():
        ax.set_ylim(0, 1.07 * high or 1)


def _end_labels(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name the lines at their right ends, pushed apart where they would overlap."""
    to_axes = ax.transData + ax.transAxes.inverted()
    spots = {text: (np.clip(to_axes.transform((1, y))[1], 0, 1), color) for y, text, color in ends}
    texts = sorted(spots, key=lambda text: spots[text][0])
    shift = np.arange(len(texts)) * 22 / ax.bbox.height  # pixels
    heights = np.maximum.accumulate([spots[text][0] for text in texts] - shift) + shift
    for text, y in zip(texts, heights - max([0, *heights - 1]), strict=True):
        style: Style = {
            "color": spots[text][1],
            "fontsize": 8.5 * max(0.65, min(1, 15.5 / len(text))),
        }
        ax.text(1.015, y, text[:24], va="center", transform=ax.transAxes, parse_math=False, **style)


def _pass_at_k(runs: list[Run]) -> bytes | None:
    """Pass@K over K, a panel for each dataset: before training, at the phase switch, the latest.

    Several runs: colour is the run; before dotted, at the switch dashed, the latest solid.
    """
    key = _key(runs)
    curves: dict[str, dict] = {}
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        for row in (row for row in run.evals if pass_ks([row])):
            when = row["when"] if row["when"] in WHEN else "after"
            curves.setdefault(row["dataset"], {})[run.name, when] = row, color
            if len(runs) == 1:
                label = "latest" if row["when"] not in WHEN else when.replace("_", " ")
                key[WHEN[when]] = f"{label}, step {row['step']}"
    if not curves:
        return None
    cols = min(len(curves), 2 if len(curves) == 4 else 3)
    ratios = [1.0] * -(-len(curves) // cols)
    fig, grid = figure_of("pass_at_k", key, ratios, cols, right=0.97, hspace=0.38)
    for i, (dataset, lines) in enumerate(curves.items()):
        ax = axes_at(fig, grid[i // cols, i % cols], "" if i % cols else "share of problems solved")
        ks = pass_ks([row for row, _ in lines.values()])
        for j, ((_, when), (row, color)) in enumerate(lines.items()):
            x = np.arange(len(ks)) + 0.15 * (j / max(1, len(lines) - 1) - 0.5)
            y, error = ([number(row.get(f"pass@{k}{end}")) for k in ks] for end in ("", "_se"))
            line = {"before": ":", "phase_switch": "--"}.get(when, "-") if len(runs) > 1 else "-"
            style: Style = {"elinewidth": 1.3, "capsize": 2.5, "linewidth": 1.6, "markersize": 4}
            hue = color if len(runs) > 1 else WHEN[when]
            ax.errorbar(x, y, np.nan_to_num(error), color=hue, marker="o", linestyle=line, **style)
        ax.set_xticks(range(len(ks)), map(str, ks))
        ax.set_xlim(-0.4, len(ks) - 0.6)
        ax.set_ylim(0, min(1.03, 1.07 * ax.dataLim.y1 or 1))
        ax.set_title(dataset[:40], fontsize=9, color=INK, loc="left", parse_math=False)
        if i >= len(curves) - cols:
            ax.set_xlabel("K, answers per problem", color=GREY, fontsize=8.5)
    return png_of(fig)
