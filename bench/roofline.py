"""The rooflines in docs/, one for each benchmark that has measured the ceilings of its machine.
tables.py draws them.

    rate <= min(peak rate, intensity x bandwidth),   intensity = flop / bytes

flop counts the products that the mathematics needs; bytes counts every input read once and every
output written once. A square product and a copy in memory measure the two ceilings in the same run.
"""

from functools import partial
from typing import Any

import pictures
from rows import RESULTS, Row, is_wrong_peer, newest, shape_of

BENCHMARKS = {"cuda": "a GPU", "cpu": "a CPU", "cpu_avx2": "a CPU without AVX-512"}
SMALL: dict[str, Any] = {"fontsize": 8}


def rows_to_draw(name: str) -> list[Row]:
    """The rows with a rate of one benchmark's first shape and dtype. Rows in which not all tokens
    are live leave out products and are not shown, nor are peers with a wrong gradient. [] where the
    ceilings are not known."""
    rows = newest(RESULTS / f"{name}.jsonl")
    if not rows or "copy_gb_s" not in rows[0]:
        return []
    rows = [row for row in rows if shape_of(row) == shape_of(rows[0]) and "gb_s" in row]
    dtype = rows[0]["dtype"]
    return [r for r in rows if r["dtype"] == dtype and r["live"] == 1 and not is_wrong_peer(r)]


def draw(rows: list[Row], machine: str) -> Any:
    """On the left the roofline, on the right the rate of each implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    run, (tokens, width, vocab) = rows[0], shape_of(rows[0])
    title = f"LM-head ops on {machine}, {run['dtype']}, N={tokens} D={width} V={vocab}"
    peak, bandwidth = run["gemm_tflops"][run["dtype"]], run["copy_gb_s"] / 1e3
    rows = sorted(rows, key=lambda row: row["gflops"])
    rates = [row["gflops"] / 1e3 for row in rows]
    intensities = [row["gflops"] / row["gb_s"] for row in rows]
    grey, blue, orange = "#9ca3af", "#1d4ed8", "#c2410c"  # peers, bare products, bupo
    colors = [
        grey if row.get("peer") else blue if "GEMM" in row["name"] else orange for row in rows
    ]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 0.25 * len(rows) + 2.2), layout="constrained"
    )
    figure.suptitle(title, fontsize=10)
    ridge = peak / bandwidth
    low, high = min(ridge, *intensities) / 8, max(ridge, *intensities) * 2
    left.plot([low, ridge, high], [low * bandwidth, peak, peak], color="#222222", lw=1.2)
    left.scatter(intensities, rates, c=colors, s=22, zorder=3)
    roofs = [(f"copy: {run['copy_gb_s']:.0f} GB/s", low * bandwidth)]
    for text, y in (*roofs, (f"square product: {peak:.3g} TFLOP/s", peak)):
        left.annotate(text, (low, y), (6, 5), textcoords="offset points", **SMALL)
    left.set(xscale="log", yscale="log", xlabel="flop / byte", ylabel="TFLOP/s")
    left.margins(y=0.12)
    right.barh([row["name"] for row in rows], rates, color=colors, height=0.7)
    right.axvline(peak, color="#222222", lw=1.2)
    right.set(xlabel="TFLOP/s", xlim=(0, 1.05 * max(peak, *rates)))
    for y, rate in enumerate(rates):
        right.annotate(f"{rate:.3g} ", (rate, y), color="white", ha="right", va="center", **SMALL)
    right.tick_params(axis="y", labelsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25, lw=0.5)
        axes.set_axisbelow(True)
    return figure


def update_pictures(check: bool) -> list[str]:
    """Draws the pictures that are missing or show other results; with `check` draws none. Returns
    their names."""
    stale = []
    for name, machine in BENCHMARKS.items():
        stale += pictures.update(
            f"roofline_{name}.png", rows_to_draw(name), partial(draw, machine=machine), check
        )
    return stale
