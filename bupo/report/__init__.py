"""The report of a training run: report.html and PNG plots, from the files of its run directory.

run_files.py reads, plots.py and layer_maps.py draw, run_page.html.j2 is the page;
`python -m bupo.report` for a finished run, or several overlaid.
"""

import base64
from pathlib import Path

import jinja2

from bupo.report.layer_maps import draw_layers
from bupo.report.plots import TITLES, draw
from bupo.report.run_files import pass_ks, pick_rollouts, plus_minus, read_run, short

__all__ = ["write_report"]


def write_report(run_dir: Path, *others: Path, out_dir: Path | None = None) -> Path:
    """Write report.html (one self-contained file) and its plots as PNG; return the page's path.

    They go into run_dir; with others (the runs overlaid) into run_dir/comparison; or into out_dir.
    Missing keys, values that are not numbers and unreadable lines are left out, and a run without a
    step gives a page that says so. Raises OSError only: a directory missing or not writable.
    """
    paths = list(dict.fromkeys(Path(path).resolve() for path in (run_dir, *others)))
    unique = len({path.name for path in paths}) == len(paths)
    runs = [read_run(path, path.name if unique else str(path)) for path in paths]
    out = Path(out_dir or (Path(run_dir) / "comparison" if others else run_dir))
    out.mkdir(parents=True, exist_ok=True)
    images = {}
    for name in TITLES:
        try:
            png = draw_layers(runs) if name == "layers" else draw(name, runs)
        except Exception as error:  # a plot must never end a training run; the page says it is gone
            runs[0].notes.append(f"{name}.png could not be drawn: {error!r:.200}")
            continue
        if png:
            (out / f"{name}.png").write_bytes(png)
            images[name] = TITLES[name], base64.b64encode(png).decode()
    rollouts = {r.name: list(pick_rollouts(p, r.phases)) for r, p in zip(runs, paths, strict=True)}
    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"plus_minus": plus_minus, "short": short}
    page = env.from_string(Path(__file__).with_name("run_page.html.j2").read_text(encoding="utf-8"))
    html = page.render(runs=runs, images=images, rollouts=rollouts, pass_ks=pass_ks)
    (out / "report.html").write_text(html, encoding="utf-8", errors="replace")
    return out / "report.html"
