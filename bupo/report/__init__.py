"""Web pages with figures of one training run, of several, and of an analysis.

run_plots.py, layer_maps.py and analysis_plots.py draw the figures and page.py writes the page.
drawing.py and palette.py define the style of all figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bupo.report import analysis_plots, heat_map
from bupo.report.drawing import encoded, style
from bupo.report.layer_maps import draw_layers
from bupo.report.page import Draw, write_page
from bupo.report.palette import BLUE
from bupo.report.run_files import Row, read_run, some_rollouts
from bupo.report.run_plots import (
    PANELS,
    draw_evaluations,
    draw_pass_at_k,
    draw_steps,
    draw_time,
    pass_ks,
)

if TYPE_CHECKING:
    from bupo.internal.analysis import Analysis

__all__ = ["write_analysis_report", "write_pass_at_k", "write_report"]


def write_report(run_dir: Path, *others: Path, out_dir: Path | None = None) -> Path:
    """Writes report.html of a training run and its figures as PNG, and returns the page's path.

    They are written to out_dir if it is given, else to run_dir, or to run_dir/comparison if other
    runs are overlaid. The same files give the same bytes. Missing keys, values that are not numbers
    and unreadable lines are left out, and a run without a step gives a page that says so. Raises
    only OSError, if a directory is missing or not writable.
    """
    paths = list(dict.fromkeys(Path(path).resolve() for path in (run_dir, *others)))
    unique = len({path.name for path in paths}) == len(paths)
    runs = [read_run(path, path.name if unique else str(path)) for path in paths]
    draw: Draw = {name: partial(draw_steps, name, runs) for name in PANELS}
    draw |= {"pass_at_k": partial(draw_evaluations, runs)}
    draw |= {"layers": partial(draw_layers, runs[0])} if len(runs) == 1 else {}
    draw |= {"time": partial(draw_time, runs)}
    named = [(f"{run.name}: " if len(runs) > 1 else "", run) for run in runs]
    return write_page(
        Path(out_dir or (Path(run_dir) / "comparison" if others else run_dir)),
        "run_page.html.j2",
        draw,
        notes=[f"{name}{note}" for name, run in named for note in run.notes],
        facts=[f"{name}{run.sentence} {run.sentence_on_ranks}".strip() for name, run in named],
        runs=runs,
        rollouts=[some_rollouts(path, run) for path, run in zip(paths, runs)],
        pass_ks=pass_ks,
    )


def write_pass_at_k(rows: Sequence[Row], file: Path) -> None:
    """Draws rows of eval.jsonl to a PNG file, unless no Pass@K is defined. Raises OSError."""
    with style():
        if figure := draw_pass_at_k([(row, "", {"color": BLUE}) for row in rows]):
            file.write_bytes(encoded(figure, "png"))


def write_analysis_report(
    out: str | Path, found: Sequence[Analysis], facts: Sequence[str] = (), notes: Sequence[str] = ()
) -> Path:
    """Writes figures/NAME.svg and .png and report.html of one analysis, or of two overlaid, and
    returns the page's path.

    facts: sentences on what was analysed. notes: sentences that a reader should read first. Raises
    ValueError for another number of analyses, and OSError.
    """
    if len(found) not in (1, 2):
        raise ValueError(
            f"write_analysis_report: found: expected 1 or 2 analyses, got {len(found)}"
        )
    models = [analysis_plots.Model(each) for each in found]
    maps = [{"name": each.name, "maps": heat_map.heat_maps(each)} for each in found]
    data = json.dumps({"scale": heat_map.SCALE, "models": maps}, ensure_ascii=False)
    return write_page(
        Path(out),
        "analysis_page.html.j2",
        {draw.__name__: partial(draw, models) for draw in analysis_plots.FIGURES},
        folder="figures",
        notes=notes,
        facts=facts,
        summaries=[model.summary for model in models],
        data=data.replace("<", "\\u003c"),
        script=Path(__file__).with_name("heat_map.js").read_text(encoding="utf-8"),
    )
