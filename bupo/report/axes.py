"""What all figures of the report share: axes over layers, lines with bands, labels, SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from bupo.internal.curves import Curve
from bupo.report.palette import GREY, GRID, INK, VARIABLES

DASHES: list[Any] = ["solid", (0, (4, 1.6))]
"""Of the first model and of the one it is compared with"""
WIDTH = 10
Style = dict[str, Any]


@contextmanager
def style() -> Iterator[None]:
    """Text stays text (small, searchable), and no name of a model is read as mathematics."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "bupo",
        "text.parse_math": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "axes.titlesize": 9.5,
        "legend.fontsize": 8.5,
    }
    with rc_context(settings):
        yield


def figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Inches; axes in reading order."""
    fig = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for ax in axes:
        ax.set_facecolor("none")
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(colors=GREY, labelcolor=INK, labelsize=8.5, length=2.5)
        ax.grid(axis="y", color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.yaxis.set_major_locator(MaxNLocator(5))
    return fig, axes


def over_layers(ax: Axes, depth: int, labelled: bool = True) -> None:
    """x axis of layers 1..L."""
    ax.set_xlim(0.4, depth + 0.6)
    ax.xaxis.set_major_locator(FixedLocator(layer_ticks(depth)))
    if labelled:
        ax.set_xlabel("layer", color=INK)


def layer_ticks(depth: int, most: int = 10) -> list[int]:
    """1, L and round numbers between them that touch neither."""
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if depth / s <= most)
    inner = [x for x in range(step, depth, step) if x > 1 and depth - x > step / 2]
    return sorted({1, *inner, depth})


def short(name: str, most: int) -> str:
    """A name with its middle left out where it is long: beginnings and ends of paths tell most."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", color=INK, fontweight="bold")


def line(
    ax: Axes, curve: Curve, color: str, label: str, number: int, marker: str, width: float = 1.8
) -> None:
    """Mean over texts, and the middle 80 % of them. number: of the model."""
    if curve.by_text.shape[1] > 2:
        low, high = curve.band
        ax.fill_between(curve.layers, low, high, color=color, alpha=0.14, linewidth=0)
    few = len(curve.layers) <= 48
    ax.plot(
        curve.layers,
        curve.mean,
        color=color,
        linestyle=DASHES[number],
        linewidth=width,
        marker=marker if few else "",
        markersize=2.2 + width,
        markerfacecolor=color if number == 0 else "none",
        label=label,
    )


def legend(fig: Figure, ax: Axes, names: Sequence[str], extra: Sequence[Any] = ()) -> None:
    """Below the figure: what the colours are, and with two models what the dashes are."""
    handles, labels = ax.get_legend_handles_labels()
    shown: dict[str, Any] = {}
    for handle, text in zip(handles, labels):
        shown.setdefault(text, handle)
    entries = [*shown.values(), *extra]
    if len(names) > 1:
        entries += [
            Line2D([], [], color=INK, linestyle=dash, linewidth=1.8, label=name)
            for dash, name in zip(DASHES, names)
        ]
    texts = [*shown, *(h.get_label() for h in entries[len(shown) :])]
    fig.legend(
        entries,
        [short(str(t), 60) for t in texts],
        loc="outside lower center",
        ncols=min(len(entries), 4 if len(names) > 1 else 6),
        frameon=False,
        labelcolor=INK,
        handlelength=2.6,
    )


def logarithmic(ax: Axes) -> None:
    """y axis, its numbers written plainly."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    digits = (1, 2, 5) if high / low < 300 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    ax.yaxis.set_minor_locator(NullLocator())


def limit(ax: Axes, value: float, text: str) -> None:
    """A horizontal line with its name."""
    ax.axhline(value, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
    ax.annotate(
        text,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color=GREY,
    )


def png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(fig)
    fig.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def svg(fig: Figure) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(fig).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline(text: str, name: str, description: str) -> str:
    """An SVG file as an element of a page: identifiers of its own, colours from CSS."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<image [^>]*?)\bid="[^"]*"', r"\1", text)  # equal colour bars have equal ones
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1, flags=re.DOTALL)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text
