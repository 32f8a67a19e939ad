"""bench/study: runs are made once, and the table compares them with the baseline by seed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from study.cells import BASELINE, EDITIONS
from study.run import command
from study.table import area, interval, study_table

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
    assert f"| {BASELINE} | 1 |" in study_table(rows) and "(too few seeds)" in study_table(rows)


@pytest.mark.parametrize("edition", EDITIONS)
def test_settings_of_all_cells_are_right(edition: str) -> None:
    for cell in EDITIONS[edition].cells:
        words = command(edition, cell, 3, Path("x"))
        loaded = config.load(ROOT / "recipes" / EDITIONS[edition].recipe, words[4:])
        assert loaded.seed == 3 and loaded.resume == "auto"


def run(cell: str, seed: int, *avgs: float) -> dict:
    evals = [{"step": 10 * n, "avg": x, "pass@2": x + 0.1, "n": 4} for n, x in enumerate(avgs)]
    return {"cell": cell, "seed": seed, "evals": evals, "date": "2026-01-02", "torch": "2"}


def test_differences_are_paired() -> None:
    """Seeds differ by more than cells do, and a seed without the baseline is left out."""
    base = [run(BASELINE, seed, 0.1, 0.1 * seed) for seed in (1, 2, 3)]
    other = [run("other", seed, 0.1, 0.1 * seed + 0.05) for seed in (1, 2, 3, 4)]
    text = study_table([*base, *other])
    line = next(line for line in text.splitlines() if line.startswith("| other"))
    assert line.startswith("| other | 4 | 0.300 | +0.050 [+0.050, +0.050] |"), text
    assert area(run("x", 1, 0.0, 1.0, 1.0)) == 0.75
    low, high = interval([0.0, 0.1, 0.2, 0.3]).partition("[")[2].strip("]").split(", ")
    assert 0 <= float(low) < 0.15 < float(high) <= 0.3
