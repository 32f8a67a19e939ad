"""The benchmark of the internal policies: both ways give the same figures, and its arithmetic."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import bench_internal as bench
import pytest
from implementations import entropy_flow_rows

ROOT = Path(__file__).parent.parent
SMALL = {"layers": 2, "width": 64, "vocab": 97, "texts": 3, "length": 32}


def test_a_small_run(tmp_path: Path) -> None:
    file = tmp_path / "internal_cpu.jsonl"
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    command = [sys.executable, "bench/bench_internal.py", f"--json={file}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    floor, ours, hooks = (json.loads(line) for line in file.read_text().splitlines())
    assert [row["name"] for row in (floor, ours, hooks)] == list(bench.WAYS)
    assert 0 <= ours["gap_to_hooks"] < 1e-4 and floor["gap_to_hooks"] is None
    assert hooks["x_ours"] == pytest.approx(hooks["seconds"] / ours["seconds"])
    assert ours["x_gemms"] == pytest.approx(ours["seconds"] / floor["seconds"])
    assert "3 texts of 32 tokens" in done.stdout and "bar <= 1.5" in done.stdout


def test_both_ways_see_every_policy() -> None:
    size = argparse.Namespace(**SMALL)
    found = {name: bench.WAYS[name](size)() for name in (bench.OURS, bench.HOOKS)}
    ours, hooks = found.values()
    assert ours.keys() == hooks.keys() and len(ours) == 8
    for name, values in ours.items():
        assert values.shape == hooks[name].shape == (2, 3 * 31)
        assert float((values - hooks[name]).abs().max()) < 1e-4, name
    rows = sum(x.numel() for x in ours.values()) + 2 * 3 * 31
    assert entropy_flow_rows(2, 3 * 31) == rows, "the floor has as many rows as the sweep"
    spread = ours["layer_normed"].std()
    assert spread > 0.05, "policies that differ from one another"


def test_bars() -> None:
    def run(seconds: float, peak: float) -> dict[str, float]:
        return {"seconds": seconds, "peak_mib": peak}

    rows = bench.rows_of(
        {bench.FLOOR: run(10, 50), bench.OURS: run(14, 100), bench.HOOKS: run(28, 900)}
    )
    verdicts = [line.split(":")[0].strip() for line in bench.bars(rows)]
    assert verdicts == ["met", "met", "NOT MET"]
    assert bench.largest_gap({"a": [1.0, 2.0]}, {"a": [1.0, 2.5]}) == 0.5
