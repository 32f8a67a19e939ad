"""The figures of an analysis, or of two, overlaid: the second is dashed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bupo.internal.analysis import Analysis
from bupo.internal.curves import Curve, single
from bupo.report import axes as shared
from bupo.report.palette import GREY, INK, LAYER, NORMED, OF_POLICY, OF_SEGMENT

MARKERS = {"layer": "o", "attention": "^", "ffn": "s"}
NORM = "with final norm"
NAMES = {"layer": "layer", "attention": "attention", "ffn": "FFN"}


class Pictures:
    """Curves of each analysis, computed once."""

    def __init__(self, found: Sequence[Analysis]) -> None:
        self.found = list(found)
        self.names = [each.name for each in found]
        self.curves = [each.curves() for each in found]
        self.depth = max(each.flow.layers for each in found)

    def draw(self, name: str) -> Figure:
        """The figure of this name, a key of FIGURES."""
        with shared.style():
            return FIGURES[name][2](self)

    def policies(self, ax: Axes, kind: str, suffix: str = "") -> None:
        """A line a policy and model of a quantity."""
        for n, curves in enumerate(self.curves):
            for policy, color in OF_POLICY.items():
                curve = curves.get(f"{kind}.{policy}{suffix}")
                if curve is not None:
                    shared.line(ax, curve, color, NAMES[policy], n, MARKERS[policy])

    def raw_and_normed(self, ax: Axes, kind: str, plus: float = 0.0) -> None:
        """The layer policy of each model, without and with the final norm; raw is wider, to be seen
        where both are equal."""
        pairs = (("layer", LAYER, "raw", "o", 3.2), ("layer_normed", NORMED, NORM, "D", 1.5))
        for n, curves in enumerate(self.curves):
            for name, color, label, marker, width in pairs:
                curve = curves[f"{kind}.{name}"]
                moved = Curve(curve.layers, curve.by_text + plus)
                shared.line(ax, moved, color, label, n, marker, width)


def entropy_flow(pictures: Pictures) -> Figure:
    fig, (raw, normed) = shared.figure(1, 2, 3.9, sharey=True)
    for ax, suffix, text in ((raw, "", "raw"), (normed, "_normed", "with the final norm")):
        shared.title(ax, f"Entropy, {text}")
        pictures.policies(ax, "entropy", suffix)
        shared.over_layers(ax, pictures.depth)
        for bound in sorted({each.flow.vocab for each in pictures.found}):
            shared.limit(ax, math.log(bound), "ln V" if ax is raw else "")
    raw.set_ylabel("nats per token", color=INK)
    top = max(math.log(each.flow.vocab) for each in pictures.found)
    raw.set_ylim(0, 1.08 * top)
    for each in pictures.found:
        model = float(single(each.flow)["final_entropy"].mean[0])
        normed.plot([each.flow.layers], [model], "*", color=INK, markersize=10, label="the model")
    shared.legend(fig, normed, pictures.names)
    return fig


def entropy_change(pictures: Pictures) -> Figure:
    fig, panels = shared.figure(3, 1, 7.2, sharex=True)
    for ax, (policy, color) in zip(panels, OF_POLICY.items()):
        shared.title(ax, f"Change of entropy by the {NAMES[policy]}")
        ax.axhline(0, color=GREY, linewidth=1)
        count = len(pictures.found)
        for n, curves in enumerate(pictures.curves):
            curve = curves[f"entropy_change.{policy}"]
            x = np.array(curve.layers) + (n - (count - 1) / 2) * 0.4
            hollow = {"facecolor": "none", "edgecolor": color, "hatch": "////"}
            look: shared.Style = {"color": color} if n == 0 else hollow
            ax.bar(x, curve.mean, 0.8 / count, zorder=2, **look)
            if curve.error is not None:
                bars: shared.Style = {"fmt": "none", "ecolor": INK, "elinewidth": 1, "zorder": 3}
                ax.errorbar(x, curve.mean, curve.error, **bars)
        ax.set_ylabel("nats", color=INK)
        ax.margins(y=0.08)
        ax.use_sticky_edges = False
        shared.over_layers(ax, pictures.depth, ax is panels[-1])
    _boundaries(panels[-1], pictures)
    kinds = [Patch(color=c, alpha=0.25, linewidth=0, label=n) for n, c in OF_SEGMENT.items()]
    if len(pictures.found) > 1:
        kinds += [
            Patch(facecolor=fill, edgecolor=GREY, hatch=hatch, label=shared.short(name, 40))
            for name, fill, hatch in zip(pictures.names, (GREY, "none"), ("", "////"))
        ]
    fig.legend(handles=kinds, loc="outside lower center", ncols=5, frameon=False, labelcolor=INK)
    return fig


def _boundaries(ax: Axes, pictures: Pictures) -> None:
    """Segments of the first model behind the bars, boundary layers as lines."""
    for kind, first, last in pictures.found[0].boundary.segments:
        ax.axvspan(first - 0.5, last + 0.5, color=OF_SEGMENT[kind], alpha=0.18, lw=0, zorder=0)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.16 * (high - low))
    for n, each in enumerate(pictures.found):
        layer = each.boundary.layer
        if layer is None:
            continue
        ax.axvline(layer + 0.5, color=INK, linewidth=1.4, linestyle=shared.DASHES[n])
        right = layer < 0.7 * pictures.depth
        ax.annotate(
            f"boundary: layer {layer}"
            + (f" ({each.name})"[:30] if len(pictures.found) > 1 else ""),
            (layer + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5 if right else -5, -3 - 12 * n),
            textcoords="offset points",
            ha="left" if right else "right",
            va="top",
            fontsize=8.5,
            color=INK,
        )


def scale(pictures: Pictures) -> Figure:
    fig, (norms, entropies) = shared.figure(1, 2, 3.9)
    shared.title(norms, "Length of the vectors")
    pictures.policies(norms, "norm")
    shared.logarithmic(norms)
    norms.set_ylabel("Euclidean norm, logarithmic", color=INK)
    shared.title(entropies, "Entropy of the layer policy")
    pictures.raw_and_normed(entropies, "entropy")
    entropies.set_ylim(0, 1.04 * entropies.get_ylim()[1])
    entropies.set_ylabel("nats per token", color=INK)
    for ax in (norms, entropies):
        shared.over_layers(ax, pictures.depth)
    handles = entropies.get_legend_handles_labels()[0][:2]
    shared.legend(fig, norms, pictures.names, handles)
    return fig


def to_model(pictures: Pictures) -> Figure:
    fig, (kl, agreement, rank) = shared.figure(1, 3, 3.7)
    shared.title(kl, "KL to the model")
    pictures.raw_and_normed(kl, "kl")
    kl.set_ylabel("nats per token", color=INK)
    kl.set_ylim(bottom=0)
    shared.title(agreement, "Same likeliest token")
    pictures.raw_and_normed(agreement, "agreement")
    agreement.set_ylabel("share of tokens", color=INK)
    agreement.set_ylim(-0.02, 1.02)
    shared.title(rank, "Rank of the token that came")
    pictures.raw_and_normed(rank, "rank", plus=1)
    shared.logarithmic(rank)
    rank.set_ylabel("mean, 1 = likeliest, logarithmic", color=INK)
    for ax in (kl, agreement, rank):
        shared.over_layers(ax, pictures.depth)
    shared.legend(fig, kl, pictures.names)
    return fig


def residual_cosines(pictures: Pictures) -> Figure:
    fig, (ax,) = shared.figure(1, 1, 3.6)
    shared.title(ax, "Cosine of what is written with the stream it is added to")
    pictures.policies(ax, "cosine")
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set_ylabel("cosine", color=INK)
    shared.over_layers(ax, pictures.depth)
    shared.legend(fig, ax, pictures.names)
    return fig


def layer_cosines(pictures: Pictures) -> Figure:
    fig, panels = shared.figure(1, max(2, len(pictures.found)), 4.4)
    lowest = min(float(each.lens.similarity.min()) for each in pictures.found)
    for ax, each in zip(panels, pictures.found):
        depth = each.flow.layers
        shared.title(
            ax, shared.short(each.name, 50) if len(pictures.found) > 1 else "Layer with layer"
        )
        image = ax.imshow(
            each.lens.similarity,
            cmap="cividis",
            vmin=lowest,
            vmax=1,
            origin="lower",
            extent=(0.5, depth + 0.5, 0.5, depth + 0.5),
            interpolation="nearest",
        )
        ax.grid(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(shared.FixedLocator(shared.layer_ticks(depth, 8)))
        ax.set_xlabel("layer", color=INK)
        ax.set_ylabel("layer", color=INK)
        bar = fig.colorbar(image, ax=ax, shrink=0.85, label="mean cosine")
        bar.ax.tick_params(colors=GREY, labelcolor=INK, labelsize=8.5)
        bar.ax.yaxis.label.set_color(INK)
        bar.outline.set_visible(False)
    if len(pictures.found) == 1:
        _neighbours(panels[1], pictures)
    return fig


def _neighbours(ax: Axes, pictures: Pictures) -> None:
    """Beside the matrix of one model: each layer with the next and with the last."""
    similarity = pictures.found[0].lens.similarity
    layers = np.arange(1, len(similarity) + 1)
    shared.title(ax, "Layer with the next and the last")
    ax.plot(layers[:-1], np.diag(similarity, 1), "o-", color=LAYER, markersize=4, label="next")
    ax.plot(layers, similarity[:, -1], "D--", color=NORMED, markersize=4, label="last")
    ax.set_ylabel("mean cosine", color=INK)
    shared.over_layers(ax, pictures.depth)
    ax.legend(frameon=False, labelcolor=INK)


FIGURES: dict[str, tuple[str, str, Callable[[Pictures], Figure]]] = {
    "entropy_flow": (
        "Entropy flow",
        "How undecided the policy of each layer, attention and FFN is, from ln V (knows nothing) "
        "to 0 (sure): lines are means over texts, bands hold the middle 80 % of texts. Raw is the "
        "paper's definition; with the final norm the last layer is the model itself (star).",
        entropy_flow,
    ),
    "entropy_change": (
        "Where entropy is made and spent",
        "Bars above 0 widen the choice (exploration), bars below narrow it (convergence); thin "
        "lines are standard errors over texts. Shades name the segments of the first model's FFN, "
        "the vertical line is the boundary layer: the last that explores before the FFNs stop.",
        entropy_change,
    ),
    "scale": (
        "Scale or certainty?",
        "A raw policy gets surer when its vector merely gets longer: where the raw entropy falls "
        "as the norm of H grows while the normed entropy stays, it is scale, not certainty.",
        scale,
    ),
    "to_model": (
        "How far from the model",
        "Distance of the layer policies to the model's own: KL to it, share of tokens where both "
        "hold the same token likeliest, and how high the layer ranks the token that came.",
        to_model,
    ),
    "residual_cosines": (
        "What is added, seen from the stream",
        "Near 0 a module writes new features; below 0 it takes away from what is there, above 0 it "
        "amplifies.",
        residual_cosines,
    ),
    "layer_cosines": (
        "Layers beside each other",
        "Bright blocks are layers whose streams point the same way; an edge between blocks is a "
        "place where the representation turns.",
        layer_cosines,
    ),
}
"""Name: title, how to read it, what draws it"""
