"""The benchmark of ranks: what it runs and writes, and the tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tables

ROOT = Path(__file__).parent.parent


def test_a_small_run(tmp_path: Path) -> None:
    file = tmp_path / "ranks.jsonl"
    sizes = ["--layers=2", "--width=64", "--vocab=301", "--samples=2", "--new_tokens=4"]
    options = ["--rounds=1", "--steps=1", f"--json={file}", *sizes]
    command = [sys.executable, "bench/bench_ranks.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x_one_update of ranks with copies = " in done.stdout and "bar <= 1.15" in done.stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    one, copies, parts = (row for row in rows if "ranks" in row)
    assert [(x["ranks"], x["parts"]) for x in (one, copies, parts)] == [(1, 1), (2, 1), (2, 2)]
    assert min(x["update"] for x in (one, copies, parts)) > 0
    assert parts["x_one_update"] == pytest.approx(parts["update"] / one["update"])
    planned = {row["planned"]: row for row in rows if "planned" in row}
    assert list(planned) == ["Qwen3-4B", "Qwen3-8B", "Qwen3-32B", "Llama-3.3-70B"]
    for row in planned.values():
        assert row["device_1"] > row["device_8"] > row["device_64"] > row["host_64"]
    # AdamW, weights and gradients of 8.2 billion values in float32, and 16 GiB for the rest
    assert planned["Qwen3-8B"]["device_1"] == pytest.approx(16 * 8.19e9 / 2**30, rel=0.35)
    assert "| 2 ranks, each with a copy of the model |" in tables.ranks_time_table(rows)
    assert "| model | 1 GPU | 8 GPUs | 64 GPUs |" in tables.ranks_memory_table(rows)
