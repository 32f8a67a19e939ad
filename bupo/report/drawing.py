"""The parts that all figures share: size, style, legends, scales, and encoding as PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from bupo.report.palette import GREY, GRID, INK

Style = dict[str, Any]
WIDTH = 10
LABEL = 200
"""Longest label of a line, in characters; a legend shortens it further"""
SETTINGS: Style = {
    "svg.fonttype": "none",  # text stays text, small and searchable
    "svg.hashsalt": "bupo",  # the same figure has the same bytes
    "text.parse_math": False,  # no name is read as mathematics
    "text.color": INK,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
}


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures are made and written in the common style. Nothing changes outside."""
    with rc_context(SETTINGS):
        yield


def figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Returns a figure of this height in inches and its axes in reading order."""
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for ax in axes:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    return fig, axes


def short(name: object, most: int) -> str:
    """Shortens a name to a label. The middle is left out, as the ends of a path tell most. A space
    is put before a leading underscore, which would hide the label from a legend."""
    text = "".join(c if c.isprintable() else "�" for c in str(name))
    half = (most - 1) // 2
    text = text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
    return f" {text}" if text.startswith("_") else text


def legend(fig: Figure, axes: Sequence[Axes], extra: Sequence[Any] = ()) -> None:
    """Adds a legend below the figure with each label of the axes once, followed by extra. Labels
    are shortened here and not before, so that two runs with similar names both appear."""
    handles = [handle for ax in axes for handle in ax.get_legend_handles_labels()[0]]
    shown = {str(handle.get_label()): handle for handle in [*handles, *extra]}
    labels = [short(label, 40) for label in shown]
    lengths = [8 + len(label) for label in labels]  # in characters, with the handle
    columns = len(shown) if sum(lengths) < 125 else 125 // max(lengths)
    if shown:
        fig.legend(shown.values(), labels, loc="outside lower center", ncols=columns)


def spread(n: int, most: int = 9) -> NDArray[np.int_]:
    """Returns at most `most` evenly spaced whole numbers from 1 to n as places for labels."""
    return np.unique(np.linspace(1, n, min(n, most)).round().astype(int))


def logarithmic(ax: Axes) -> None:
    """Makes the y axis logarithmic, with plain numbers as labels."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    ax.yaxis.set_minor_locator(NullLocator())


def heat(ax: Axes, values: NDArray[Any], unit: str = "", **options: Any) -> None:
    """Draws values [layer, column], both counted from 1, as coloured cells with a colour bar."""
    rows, columns = values.shape
    options |= {"extent": (0.5, columns + 0.5, 0.5, rows + 0.5), "interpolation": "nearest"}
    image = ax.imshow(values, origin="lower", **options)
    ax.grid(False)
    ax.set_yticks(spread(rows))
    ax.set_ylabel("layer")
    ax.figure.colorbar(image, ax=ax, label=unit).outline.set_visible(False)


def encoded(fig: Figure, kind: str) -> bytes:
    """Returns the bytes of the figure as a file of this kind, png or svg."""
    options: Style = {"dpi": 150, "facecolor": "white"}
    if kind == "svg":
        options = {"metadata": {"Date": None, "Creator": None}}
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
