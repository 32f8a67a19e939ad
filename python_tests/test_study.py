"""bench/study: runs are made once, and the table compares them with the baseline by seed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from study.cells import BASELINE, EDITIONS
from study.plots import draw
from study.run import command
from study.table import area, study_table

from bupo import config

ROOT = Path(__file__).parent.parent


def test_the_smallest_edition(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    options = ["--jobs=2", f"--out={tmp_path / 'runs'}", f"--results={results}"]
    program = [sys.executable, "bench/study/run.py", "minutes", *options]
    for done in ("0 of 2", "2 of 2"):
        said = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
        assert said.returncode == 0 and f"{done} runs are done" in said.stdout, said.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["cell"] for row in rows} == {BASELINE, "BuPO"}
    for row in rows:
        assert [x["step"] for x in row["evals"]] == [0, 2, 4]
        assert len(row["curves"]["reward/mean"]) == 4
    assert f"| {BASELINE} | 1 |" in study_table(rows) and "(one seed)" in study_table(rows)


@pytest.mark.parametrize("edition", EDITIONS)
def test_settings_of_all_cells_are_right(edition: str) -> None:
    for cell in EDITIONS[edition].cells:
        words = command(edition, cell, 3, Path("x"))
        loaded = config.load(ROOT / "recipes" / EDITIONS[edition].recipe, words[4:])
        assert loaded.seed == 3 and loaded.resume == "auto"


def run(cell: str, seed: int, *avgs: float) -> dict:
    evals = [
        {"step": 10 * n, "avg": x / part, "pass@2": x + 0.1, "n": 4, "dataset": f"set {part}"}
        for n, x in enumerate(avgs)
        for part in (1, 2)
    ]
    return {"cell": cell, "seed": seed, "evals": evals, "date": "2026-01-02", "torch": "2"}


def test_differences_are_paired() -> None:
    """Seeds differ by more than cells do, and a seed without the baseline is left out."""
    base = [run(BASELINE, seed, 0.1, 0.1 * seed) for seed in (1, 2, 3)]
    more = {1: 0.04, 2: 0.05, 3: 0.06, 4: 0.05}
    other = [run("other", seed, 0.1, 0.1 * seed + x) for seed, x in more.items()]
    text = study_table([*base, *other])
    line = next(line for line in text.splitlines() if line.startswith("| other"))
    # t = 4.303 for 3 differences with standard deviation 0.01
    assert line.startswith("| other | 4 | 0.300 | +0.050 [+0.025, +0.075] |"), text
    assert "| 0.150 | +0.025 [+0.013, +0.037] |" in line and "Avg on set 2" in text
    left, right = draw([*base, *other]).axes
    curve = {line.get_label(): line.get_ydata() for line in left.lines}["other"]
    assert curve == pytest.approx([0.1, 0.3])
    (bar,) = right.containers
    assert bar.lines[0].get_xdata() == pytest.approx([0.05])
    assert bar.lines[2][0].get_segments()[0][:, 0] == pytest.approx([0.025, 0.075], abs=1e-3)
    assert area(run("x", 1, 0.0, 1.0, 1.0), [0, 10, 20]) == 0.75
    assert area(run("x", 1, 0.0, 1.0, 1.0), [0, 20]) == 0.5
