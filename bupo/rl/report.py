"""The report of a training run: report.html and PNG plots, from the files of its run directory.

    python -m bupo.rl.report RUN_DIR                     one run; writes into RUN_DIR
    python -m bupo.rl.report RUN_DIR RUN_DIR2 [--out D]  overlaid; into D (RUN_DIR/comparison)

A pure function of metrics.jsonl, eval.jsonl, config.yaml and rollouts/step_*.jsonl: same files,
same bytes. Of one run, amber is the internal phase and blue the final policy; of several, colour
is the run.
"""

import argparse
import base64
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

INK, GREY, GRID, INTERNAL, FINAL = "#1f2937", "#6b7280", "#e5e7eb", "#d97706", "#2563eb"
COLORS = [FINAL, INTERNAL, "#0d9488", "#7c3aed", "#e11d48", "#64748b"]  # runs; [2:6] datasets
COLORS += ["#65a30d", "#0891b2", "#c026d3", "#78350f"]
Style = dict[str, Any]
HALO = [withStroke(linewidth=3, foreground="white")]  # keeps text readable over lines
WHEN = {"before": GREY, "phase_switch": INTERNAL, "after": FINAL}
STAGES = {"rollout": "#0d9488", "reward": "#e11d48", "old_logprobs": "#64748b", "update": "#7c3aed"}
STAGES |= {"sync": "#f472b6", "other": "#aab2bf"}
MAX_BARS = 60  # of the time plot; with more steps than this a bar is the mean of several
ROLLOUTS_READ = 64  # of each step's file, which can hold a thousand long answers
TITLES = {"reward": "Reward", "pass_at_k": "Pass@K", "entropy": "Entropy"}
TITLES |= {
    "ratio": "How far an update moves the policy",
    "length": "Response length",
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

    @property
    def color(self) -> str:
        return INTERNAL if self.internal else FINAL


@dataclass(frozen=True)
class Run:
    """What the files of a run directory say; notes are what a reader should know first."""

    name: str
    rows: list[dict]
    evals: list[dict]
    config: str
    notes: list[str]

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


def write_report(run_dir: Path, *others: Path, out_dir: Path | None = None) -> Path:
    """Write report.html (one self-contained file) and its plots as PNG; return the page's path.

    They go into run_dir; with others (the runs overlaid) into run_dir/comparison; or into out_dir.
    Missing keys, values that are not numbers and unreadable lines are left out, and a run without a
    step gives a page that says so. Raises OSError only: a directory missing or not writable.
    """
    paths = list(dict.fromkeys(Path(path).resolve() for path in (run_dir, *others)))
    unique = len({path.name for path in paths}) == len(paths)
    runs = [_read_run(path, path.name if unique else str(path)) for path in paths]
    out = Path(out_dir or (Path(run_dir) / "comparison" if others else run_dir))
    out.mkdir(parents=True, exist_ok=True)
    images = {}
    for name in TITLES:
        try:
            png = _pass_at_k(runs) if name == "pass_at_k" else _picture(name, runs)
        except Exception as error:  # a plot must never end a training run; the page says it is gone
            runs[0].notes.append(f"{name}.png could not be drawn: {error!r:.200}")
            continue
        if png:
            (out / f"{name}.png").write_bytes(png)
            images[name] = TITLES[name], base64.b64encode(png).decode()
    rollouts = {r.name: list(_pick_rollouts(p, r.phases)) for r, p in zip(runs, paths, strict=True)}
    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"plus_minus": plus_minus, "short": short}
    page = env.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    html = page.render(runs=runs, images=images, rollouts=rollouts, pass_ks=pass_ks)
    (out / "report.html").write_text(html, encoding="utf-8", errors="replace")
    return out / "report.html"


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


# ------------------------------------------------------------------------------------ files to Run


def _read_run(run_dir: Path, name: str) -> Run:
    if not run_dir.is_dir():
        raise FileNotFoundError(f"report: no such run directory: {run_dir}")
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
    return Run(name, [rows[step] for step in sorted(rows)], ordered, text, notes)


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


def _pick_rollouts(run_dir: Path, phases: list[Phase]) -> Iterator[dict]:
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


# ------------------------------------------------------------------------------------ Run to plots


def _picture(picture: str, runs: list[Run]) -> bytes | None:
    """The plot as PNG, None if no run recorded what it shows. Several runs have a colour each."""
    panels = [(key, label) for name, key, label in PANELS if name == picture]
    panels = [panel for panel in panels if any(len(run.finite(panel[0])) for run in runs)]
    if not panels:
        return None
    colors = COLORS * len(runs) if len(runs) > 1 else [None]
    ratios = [1.8, 1, 1][: len(panels)]
    fig, grid = _figure(picture, _key(runs), ratios, right=0.82, hspace=0.16)
    steps = [*np.concatenate([run.steps for run in runs])]
    steps += [row["step"] for run in runs for row in run.evals if picture == "reward"]
    pad = max(0.5, 0.012 * (max(steps) - min(steps)))
    for i, (key, label) in enumerate(panels):
        ax, ends = _axes(fig, grid[i, 0], label), []  # ends: y, text and colour at the right margin
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
    return _png(fig)


def _key(runs: list[Run]) -> dict[str, str]:
    """Colour: name of the run and how long it trained internal policies."""
    key = {}
    for run, color in zip(runs if len(runs) > 1 else [], COLORS * len(runs), strict=False):
        ends = [f" ({p.policy} to step {p.steps[-1]})" for p in run.phases if p.internal]
        key[color] = run.name[-60:] + "".join(ends)
    return key


def _figure(name: str, key: dict, ratios: list, cols: int = 1, **space: float) -> tuple:
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


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(fig).print_png(buffer)
    return buffer.getvalue()


def _axes(fig: Figure, place: SubplotSpec, ylabel: str) -> Axes:
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
            ax.axvspan(first - 0.5, last + 0.5, color=color or p.color, alpha=alpha, linewidth=0)
        if i > 0:
            ax.axvline(first - 0.5, color=color or GREY, linewidth=1, linestyle=(0, (2, 2)))
        if named and not color and i in (0, len(run.phases) - 1):  # at the ends they cannot overlap
            text = f"{p.policy} (internal, layer {p.layer})" if p.internal else p.policy
            text += f"  ·  steps {first}–{last}" if last > first else f"  ·  step {first}"
            at: Style = {"transform": ax.transAxes, "ha": "right" if i else "left", "va": "bottom"}
            ax.text(min(i, 1), 1.01, text, color=p.color, fontsize=9, parse_math=False, **at)


def _line(ax: Axes, run: Run, key: str, color: str | None, label: str, dashed=False) -> list:
    """Every step thin, the running mean bold and never across a switch. Returns its end label."""
    steps, values, ends = run.steps, run.column(key), []
    width = max(3, len(steps) // 25) if len(steps) >= 12 else 1
    for p in run.phases:
        part = np.isin(steps, p.steps) & np.isfinite(values)
        x, y, hue = steps[part], values[part], color or p.color
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
    fig, grid = _figure("pass_at_k", key, ratios, cols, right=0.97, hspace=0.38)
    for i, (dataset, lines) in enumerate(curves.items()):
        ax = _axes(fig, grid[i // cols, i % cols], "" if i % cols else "share of problems solved")
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
    return _png(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description="Report of a training run, or several overlaid.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="where to write the page and its plots")
    args = parser.parse_args()
    try:
        print(write_report(*args.run_dirs, out_dir=args.out))
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
