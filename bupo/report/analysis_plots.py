"""The figures of an analysis, or of two overlaid, of which the second is dashed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bupo.report.drawing import Style, figure, heat, legend, logarithmic, short, spread
from bupo.report.palette import BLUE, GREEN, GREY, INK, OF_SEGMENT, ORANGE, PURPLE

if TYPE_CHECKING:
    from bupo.internal.analysis import Analysis

DASHES: list[Any] = ["solid", (0, (4, 1.6))]
"""Line styles of the first model and of the one that it is compared with"""
POLICIES = [
    ("layer", "layer", BLUE, "o", 1.8),
    ("attention", "attention", ORANGE, "^", 1.8),
    ("ffn", "FFN", GREEN, "s", 1.8),
]
"""Part of a curve's name, label, colour, marker and width"""
RAW_AND_NORMED = [
    ("layer", "raw", BLUE, "o", 3.2),
    ("layer_normed", "with final norm", PURPLE, "D", 1.5),
]
"""The same for the layer's policy; raw is wider, so that it is visible where both are equal"""


class Model:
    """An analysis with its curves and summary, computed once."""

    def __init__(self, found: Analysis) -> None:
        self.found, self.curves, self.summary = found, found.curves(), found.summary()
        self.name, self.depth = found.name, found.flow.layers


def _panel(
    ax: Axes,
    models: Sequence[Model],
    title: str,
    unit: str,
    curves: str,
    lines: Sequence[tuple[str, str, str, str, float]],
    plus: float = 0.0,
) -> None:
    """Plots means over texts by layer, and the middle 80 % of texts. curves: the curves' name, with
    {} for the part that `lines` provides. plus: a number added to the values."""
    for n, model in enumerate(models):
        for part, label, color, marker, width in lines:
            curve = model.curves[curves.format(part)]
            if curve.by_text.shape[1] > 2:
                low, high = (bound + plus for bound in curve.band)
                ax.fill_between(curve.layers, low, high, color=color, alpha=0.14, linewidth=0)
            look: Style = {"linestyle": DASHES[n], "linewidth": width, "markersize": 2.2 + width}
            look |= {"marker": marker if len(curve.layers) <= 48 else ""}
            look |= {"markerfacecolor": "none"} if n else {"label": label}
            ax.plot(curve.layers, curve.mean + plus, color=color, **look)
    ax.set_title(title)
    ax.set_ylabel(unit)
    depth = max(model.depth for model in models)
    ax.set_xlim(0.4, depth + 0.6)
    ax.set_xticks(spread(depth))
    ax.set_xlabel("layer" if ax.get_subplotspec().is_last_row() else "")


def _legend(fig: Figure, axes: Sequence[Axes], models: Sequence[Model]) -> Figure:
    """Adds a legend of the colours and, for two models, of the dashes; returns the figure."""
    dashed = [Line2D([], [], linestyle=d, color=INK, label=m.name) for d, m in zip(DASHES, models)]
    legend(fig, axes, dashed if len(models) > 1 else [])
    return fig


def entropy_flow(models: Sequence[Model]) -> Figure:
    fig, (raw, normed) = figure(1, 2, 3.9, sharey=True)
    _panel(raw, models, "Entropy, raw", "nats per token", "entropy.{}", POLICIES)
    _panel(normed, models, "Entropy, with the final norm", "", "entropy.{}_normed", POLICIES)
    bounds = [math.log(model.found.flow.vocab) for model in models]
    raw.set_ylim(0, 1.08 * max(bounds))
    for model, bound in zip(models, bounds):
        for ax in (raw, normed):
            ax.axhline(bound, color=GREY, linewidth=1, linestyle=":")
        y = model.summary["model"]["final_entropy"]["mean"]
        normed.plot([model.depth], [y], "*", color=INK, markersize=10, label="the model")
    place: Style = {"ha": "right", "va": "bottom", "transform": raw.get_yaxis_transform()}
    raw.text(1, max(bounds), "ln V", color=GREY, **place)
    return _legend(fig, [normed], models)


def entropy_change(models: Sequence[Model]) -> Figure:
    fig, panels = figure(3, 1, 7.2, sharex=True)
    for ax, line in zip(panels, POLICIES):
        title = f"Change of entropy by the {line[1]}"
        _panel(ax, models, title, "nats", "entropy_change.{}", [line])
        ax.axhline(0, color=GREY, linewidth=1)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.2 * (high - low))  # leaves room for the names of boundaries
    for kind, first, last in models[0].found.boundary.segments:
        look: Style = {"color": OF_SEGMENT[kind], "alpha": 0.18, "linewidth": 0, "zorder": 0}
        ax.axvspan(first - 0.5, last + 0.5, label=kind, **look)
    for n, model in enumerate(models):
        layer = model.found.boundary.layer
        if layer is not None:
            ax.axvline(layer + 0.5, color=INK, linewidth=1.4, linestyle=DASHES[n])
            text = f"  boundary: layer {layer}  "
            text += f"({short(model.name, 28)})  " if len(models) > 1 else ""
            place: Style = {"transform": ax.get_xaxis_transform(), "va": "top"}
            side = "left" if layer < 0.7 * model.depth else "right"
            ax.text(layer + 0.5, 0.98 - 0.12 * n, text, ha=side, **place)
    return _legend(fig, panels, models)


def scale(models: Sequence[Model]) -> Figure:
    fig, (norms, entropies) = figure(1, 2, 3.9)
    unit = "Euclidean norm, logarithmic"
    _panel(norms, models, "Length of the vectors", unit, "norm.{}", POLICIES)
    logarithmic(norms)
    title = "Entropy of the layer policy"
    _panel(entropies, models, title, "nats per token", "entropy.{}", RAW_AND_NORMED)
    entropies.set_ylim(bottom=0)
    return _legend(fig, [norms, entropies], models)


def to_model(models: Sequence[Model]) -> Figure:
    fig, (kl, agreement, rank) = figure(1, 3, 3.7)
    _panel(kl, models, "KL to the model", "nats per token", "kl.{}", RAW_AND_NORMED)
    kl.set_ylim(bottom=0)
    _panel(
        agreement, models, "Same likeliest token", "share of tokens", "agreement.{}", RAW_AND_NORMED
    )
    agreement.set_ylim(-0.02, 1.02)
    unit = "mean, 1 = likeliest, logarithmic"
    _panel(rank, models, "Rank of the token that came", unit, "rank.{}", RAW_AND_NORMED, plus=1)
    logarithmic(rank)
    return _legend(fig, [kl], models)


def residual_cosines(models: Sequence[Model]) -> Figure:
    fig, (ax,) = figure(1, 1, 3.6)
    title = "Cosine of what is written with the stream it is added to"
    _panel(ax, models, title, "cosine", "cosine.{}", POLICIES[1:])
    ax.axhline(0, color=GREY, linewidth=1)
    return _legend(fig, [ax], models)


def layer_cosines(models: Sequence[Model]) -> Figure:
    fig, panels = figure(1, 2, 4.4)
    lowest = min(float(model.found.lens.similarity.min()) for model in models)
    for ax, model in zip(panels, models):
        ax.set_title(short(model.name, 50) if len(models) > 1 else "Layer with layer")
        cosines = model.found.lens.similarity
        heat(ax, cosines, "mean cosine", cmap="cividis", vmin=lowest, vmax=1)
        ax.set_xlabel("layer")
        ax.set_xticks(ax.get_yticks())
    for ax in panels[len(models) :]:
        ax.remove()
    return fig


FIGURES = (entropy_flow, entropy_change, scale, to_model, residual_cosines, layer_cosines)
"""The figures in the order of the page, which has their titles and explains them"""
