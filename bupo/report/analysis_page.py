"""report.html of an analysis: figures and heat maps in one file that asks nothing of a network.

figures.py draws (axes.py, palette.py), heat_map.py packs what heat_map.js shows,
analysis_page.html.j2 is the page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from matplotlib import colormaps

from bupo.internal.analysis import Analysis
from bupo.report.axes import inline, png, style, svg
from bupo.report.figures import FIGURES, Pictures
from bupo.report.heat_map import heat_maps

HERE = Path(__file__).parent
SCALE = [
    "#" + "".join(f"{round(255 * c):02x}" for c in colormaps["viridis"](x)[:3])
    for x in np.linspace(0, 1, 33)
]


def write_report(
    out: Path,
    found: Sequence[Analysis],
    facts: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Writes figures/NAME.svg and .png and report.html of one analysis, or of two; returns the
    page's path.

    facts: what was analysed, a sentence each; notes: what a reader should know first. Raises
    ValueError for another number of analyses, and OSError.
    """
    if len(found) not in (1, 2):
        raise ValueError(f"write_report: found: expected one or two analyses, came {len(found)}")
    folder = Path(out) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures, shown = Pictures(found), {}
    for name, (title, reading, _) in FIGURES.items():
        figure = pictures.draw(name)
        with style():
            text, image = svg(figure), png(figure)
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
        (folder / f"{name}.png").write_bytes(image)
        shown[name] = title, reading, inline(text, name, html.escape(title))
    models = [{"name": each.name, "maps": heat_maps(each)} for each in found]
    data = {"scale": SCALE, "models": models}
    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = env.from_string((HERE / "analysis_page.html.j2").read_text(encoding="utf-8")).render(
        found=found,
        summaries=[each.summary() for each in found],
        facts=facts,
        notes=notes,
        figures=shown,
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        script=(HERE / "heat_map.js").read_text(encoding="utf-8"),
    )
    partial = Path(out) / ".report.html"
    partial.write_text(page, encoding="utf-8", errors="replace")
    partial.replace(Path(out) / "report.html")
    return Path(out) / "report.html"
