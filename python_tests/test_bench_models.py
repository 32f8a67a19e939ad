"""The benchmark of real models: that it measures what it says, and its arithmetic."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_models as bench
import pytest
import real_models
import torch
from implementations import Implementation, policy_loss

ROOT = Path(__file__).parent.parent
SMALL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 301},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


def test_a_small_run(tmp_path: Path) -> None:
    """A tied and an untied model; every case has a time, the losses the same gradient."""
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "bench/bench_models.py", "--device", "cpu", "--json", str(file)]
    command += ["--models", "Qwen3-4B", "Llama-3.1-8B", "--tokens=64", "--length=32", "--layer=2"]
    command += ["--sweep_tokens=20", "--rounds=1", f"--fields={json.dumps(SMALL)}"]
    done = subprocess.run(
        [*command, "--peers", "eager", "cce"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing: cce: runs on a GPU only" in done.stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for model in ("Qwen3-4B", "Llama-3.1-8B"):
        found = {(r["name"], r["layer"]): r for r in rows if r["model"] == model}
        losses = [(name, layer) for name in (bench.OURS, "eager") for layer in (None, 2)]
        updates = [(bench.ADAMW, None), (bench.ADAMW, 2)]
        sweep = [(bench.SWEEP_GEMMS, None), (bench.SWEEP, None)]
        assert set(found) == {*losses, *updates, *(sweep if model == "Qwen3-4B" else [])}
        for row in found.values():
            assert row["ms"] > 0 and "failed" not in row, row
        for layer in (None, 2):
            ours, eager = found[bench.OURS, layer], found["eager", layer]
            assert eager["gradient_norm"] == pytest.approx(ours["gradient_norm"], rel=1e-4)
            assert eager["x_bupo"] == pytest.approx(eager["ms"] / ours["ms"])
        internal, full = found[bench.OURS, 2], found[bench.OURS, None]
        assert internal["gradient_norm"] != pytest.approx(full["gradient_norm"], rel=1e-2)
        assert internal["x_full"] == pytest.approx(internal["ms"] / full["ms"])


def training() -> bench.Training:
    model = real_models.build("Qwen3-8B", SMALL, torch.float32, "cpu")
    return bench.Training(model, 2, 8)


def test_the_models_have_their_public_sizes() -> None:
    """Parameters as their authors state them, in billions."""
    for name, billions in (("Qwen3-4B", 4.02), ("Qwen3-8B", 8.19), ("Llama-3.1-8B", 8.03)):
        model = real_models.build(name, {}, torch.bfloat16, "meta")
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
        assert model.is_gradient_checkpointing and model.training


def test_an_update_leaves_the_weights_and_a_step_the_whole_gradient() -> None:
    given = training()
    before = [p.detach().clone() for p in given.model.parameters()]
    for layer, with_gradient in ((None, 4), (2, 2)):
        (case,) = bench.adamw_cases(given, [layer])
        given.clear()
        case.run()
        touched = [x.mlp.up_proj.weight.grad is not None for x in given.model.model.layers]
        assert sum(touched) == with_gradient and all(touched[:with_gradient])
    assert all(torch.equal(p, q) for p, q in zip(given.model.parameters(), before))


def test_a_case_that_runs_out_of_memory_stops_no_other() -> None:
    given = training()

    def broken(_: object) -> dict:
        raise RuntimeError("out of memory\nwith details")

    others = [Implementation("broken fwd+bwd", broken, 3), Implementation("x", policy_loss, 3)]
    cases = bench.training_cases(given, others, [None])
    bench.measure(cases, given, 1)
    rows = [case.row() for case in cases]
    assert [row["name"] for row in rows] == [bench.OURS, "broken", "x"]
    assert rows[1]["failed"] == "RuntimeError: out of memory" and "ms" not in rows[1]
    assert rows[0]["ms"] > 0 and rows[2]["gradient_norm"] == rows[0]["gradient_norm"]
    assert all(p.grad is None for p in given.model.parameters())


def row(name: str, layer: int | None, ms: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "layer": layer, "ms": ms} | more


def test_ratios_and_bars() -> None:
    rows = [
        row(bench.OURS, None, 100.0, gradient_norm=2.0),
        row("right", None, 150.0, gradient_norm=2.05),
        row("wrong", None, 50.0, gradient_norm=2.3),
        row("nan", None, 50.0, gradient_norm=float("nan")),
        {"name": "eager", "layer": None, "failed": "out of memory"},
        row(bench.OURS, 6, 46.0, gradient_norm=3.0),
        row(bench.ADAMW, None, 120.0),
        row(bench.ADAMW, 6, 48.0),
        row(bench.SWEEP_GEMMS, None, 10.0),
        row(bench.SWEEP, None, 11.0),
    ]
    bench.add_ratios(rows)
    assert rows[1]["x_bupo"] == 1.5 and "failed" not in rows[1]
    assert rows[2]["failed"] == "its gradient's norm is +15.0% off" and "failed" in rows[3]
    lines = bench.bars(rows)
    assert [line.split(":")[0].strip() for line in lines] == ["NOT MET", "met", "met"]
    assert "bupo: layer 6 / full step = 0.46, bar <= 0.45" in lines[0]
    assert "entropy_flow / its bare GEMMs = 1.10" in lines[2]
