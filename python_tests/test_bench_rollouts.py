"""The benchmark of rollouts: all ways generate what they are compared on, and its arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import bench_rollouts as bench
import pytest

ROOT = Path(__file__).parent.parent


def test_a_small_run(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    options = ["--prompts=3", "--rounds=1", f"--json={file}"]
    command = [sys.executable, "bench/bench_rollouts.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["name"] for row in rows] == [bench.BARE, bench.OURS, bench.FAST, bench.LISTS]
    assert {row["tokens"] for row in rows} == {3 * 2}
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["ms"])
    assert rows[1]["x_bare"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
    assert "3 prompts of 4 to 16 tokens" in done.stdout and "bar >= 3" in done.stdout


def test_verdicts() -> None:
    rows = [{"name": bench.OURS, "x_bare": 0.9}, {"name": bench.LISTS, "x_bare": 0.31}]
    assert bench.verdict(rows[:1]).split(":")[0].strip() == "NOT MET"
    assert bench.verdict(rows).split(":")[0].strip() == "NOT MET"
    rows[1]["x_bare"] = 0.3
    assert bench.verdict(rows).split(":")[0].strip() == "met"
