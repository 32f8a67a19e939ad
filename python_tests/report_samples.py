"""Run directories for the tests of reports, and what a page or a figure shows."""

import html
import json
import math
import re

import numpy as np
from matplotlib.colors import to_hex

from bupo.report.drawing import style

PICTURES = {"reward", "entropy", "length", "pass_at_k"}
HOSTILE = "<script>alert('x')</script> & </td> $\\frac{$ {{ 7*7 }}"


def rows_of_run(steps, internal, layer=3):
    """Metrics of a run that trains layer 3, then the final policy; reward 0.40 first, 0.86 last."""
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        inside = step <= internal
        noise = 0.02 * rng.standard_normal() if 1 < step < steps else 0.0
        entropy = 0.3 - 0.2 * step / steps
        yield {
            "step": step,
            "phase": "internal" if inside else "final",
            "layer": layer if inside else None,
            "reward/mean": 0.40 + 0.46 * (step - 1) / max(1, steps - 1) + noise,
            "response/length": 20 + rng.random(),
            "response/truncated": 0.05 * rng.random(),
            "policy/entropy": 2.0 if inside else entropy,
            "final/entropy": entropy,
            "policy/ratio_max": 1.3 + rng.random(),
        }


def evaluations(steps, internal, dataset="arithmetic"):
    for step, when, avg in (
        (0, "before", 0.39),
        (internal, "phase_switch", 0.36),
        (steps, "after", 0.85),
    ):
        if step or when == "before":
            passes = {f"pass@{k}": 1 - (1 - avg) ** math.sqrt(k) for k in (1, 4, 16)}
            errors = {f"{key}_se": 0.0123 for key in passes}
            common = {"step": step, "when": when, "dataset": dataset, "n": 512, "k_samples": 16}
            yield {**common, "avg": avg, "avg_se": 0.011, **passes, **errors, "length": 19.4}


def looks(steps, depth=4, **changes):
    """Rows of diagnostics.jsonl of a run on layer 2: KL of layer 1 rises by 1, all else stays."""
    for n, step in enumerate(steps):
        row = {"step": step, "anchor": 2, "layers": list(range(1, depth + 1)), "ends_phase": ""}
        row |= {k: [float(m) for m in range(depth)] for k in ("entropy", "similarity")}
        row |= {"kl_to_final": [1.0 + n / (len(steps) - 1), *[1.0] * (depth - 1)]}
        yield row | {"kl_from_anchor": [0.5] * depth, "log_perplexity": 0.2, **changes}


def write_run(run_dir, steps=40, internal=8, metrics=None, evals=None, response="7+5=12#12"):
    """A run directory as training leaves it; metrics and evals replace the ordinary rows."""
    (run_dir / "rollouts").mkdir(parents=True)
    metrics = list(rows_of_run(steps, internal)) if metrics is None else metrics
    evals = list(evaluations(steps, internal)) if evals is None else evals
    lines(run_dir / "metrics.jsonl", metrics)
    lines(run_dir / "eval.jsonl", evals)
    for row in metrics:
        step = row["step"]
        rollouts = [
            {"prompt": f"p{step}_{i}=", "response": f"{response} {step}_{i}", "answer": "12",
             "reward": float(i == 1), "advantage": 0.1, "finish_reason": "stop"}
            for i in range(4)
        ]  # fmt: skip
        lines(run_dir / "rollouts" / f"step_{step:06d}.jsonl", rollouts)
    (run_dir / "config.yaml").write_text("lr: 1.0e-4\nlayer: 3\n")
    return run_dir


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def figures(page):
    """Every figure that the page shows: its SVG by name."""
    found = re.findall(r'<figure id="(\w+)">.*?(<svg.*?</svg>)', page.read_text(), flags=re.DOTALL)
    return dict(found)


def text_of(page):
    """What a reader sees, without the figures."""
    without = re.sub(r"<svg.*?</svg>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", without)).split())


def drawn(draw, *arguments):
    """The axes of a figure in the house style."""
    with style():
        return draw(*arguments).axes


def curves(ax):
    """Every line of the axes as (colour, x, y)."""
    return [(to_hex(line.get_color()), *map(list, line.get_data())) for line in ax.lines]
