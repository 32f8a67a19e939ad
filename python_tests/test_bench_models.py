"""The benchmark of real models: that it measures what it says, and its arithmetic."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_models as bench
import measure
import pytest
import real_models
import torch
from batch import Batch
from implementations import Implementation, policy_loss, ratio_loss

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
    command += ["--sweep_tokens=20", "--rounds=1", f"--fields={json.dumps(SMALL)}", "--card_gib=0"]
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
            assert 0 < eager["off_head"] < 1e-4 and 0 < eager["off_first_layer"] < 1e-4
            assert ours["off_head"] == 0 and eager["x_bupo"] == eager["ms"] / ours["ms"]
        for name in (bench.OURS, "eager", bench.ADAMW):
            assert found[name, 2]["x_full"] == found[name, 2]["ms"] / found[name, None]["ms"]


@pytest.mark.parametrize("longest", [0, 1, 7, 8, 31, 64])
def test_the_longest_sequence_is_found(longest: int) -> None:
    tried = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= 100 * longest + 50

    assert bench.longest_that_fits(fits, 100, 6400) == 100 * longest
    assert len(tried) == len(set(tried)) <= 14 and max(tried) <= 6400


def test_the_longest_sequences_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a meter that is told what a sequence takes; one loss breaks, and for one there is no
    time."""
    taken = {"bupo": 1.0, "eager": 4.0}
    now = {"mib": 0.0}

    class Meter:
        def __init__(self, _: object) -> None: ...

        def __enter__(self) -> "Meter":
            return self

        def __exit__(self, *_: object) -> None:
            self.mib = now["mib"]

    def step(training: real_models.Training, layer: None, run: Implementation) -> None:
        if run.name == "broken fwd+bwd":
            raise RuntimeError("no kernel image")
        name = run.name.removesuffix(" fwd+bwd")
        now["mib"] = taken[name] * training.ids.numel() * 8

    monkeypatch.setattr(bench, "Peak", Meter)
    monkeypatch.setattr(real_models.Training, "step", step)
    args = argparse.Namespace(card_gib=1.0, longest_step=16)
    others = [Implementation(f"{name} fwd+bwd", policy_loss, 3) for name in ("eager", "broken")]
    model = training().model
    rows = bench.longest_rows(model, others, args, time.monotonic() + 60)
    assert [row.get("sequence") for row in rows] == [128, 32, None]
    assert rows[2]["failed"] == "RuntimeError: no kernel image"
    rows = bench.longest_rows(model, others, args, time.monotonic() - 1)
    assert {row["failed"] for row in rows} == {"TimeoutError: no time was left"}


def training() -> real_models.Training:
    model = real_models.build("Qwen3-8B", SMALL, torch.float32, "cpu")
    return real_models.Training(model, 2, 8)


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
        given.clear()
        bench.adamw_case(given, layer).run()
        touched = [x.mlp.up_proj.weight.grad is not None for x in given.model.model.layers]
        assert sum(touched) == with_gradient and all(touched[:with_gradient])
    assert all(torch.equal(p, q) for p, q in zip(given.model.parameters(), before))


def without_softmax(batch: Batch) -> dict:
    """Right but for the part of dlogits that every token of the vocabulary has."""
    logits = torch.nn.functional.linear(batch.hidden, batch.weight)
    chosen = logits.gather(-1, batch.targets[:, None]).squeeze(-1)
    logprobs = chosen - logits.detach().logsumexp(-1)
    ratio_loss(batch, logprobs).backward()
    return {}


def test_a_loss_is_handed_the_policy_of_a_trained_model() -> None:
    given = training()
    for layer in (None, 2):
        handed: list[Batch] = []
        given.step(layer, Implementation("", lambda b, seen=handed: seen.append(b) or {}, 3))
        (batch,) = handed
        logits = given.head.logits(batch.hidden).detach()
        assert float(logits.std()) == pytest.approx(real_models.SPREAD, rel=0.05)
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, batch.targets[:, None]).squeeze(1)
        assert float((chosen - batch.old_logprobs).abs().max()) < 0.3
        assert float(chosen.mean()) > float(logprobs.mean()) + 2, "sampled from it"


def test_a_loss_with_another_gradient_is_refused() -> None:
    given = training()
    others = [Implementation(f"{f.__name__} fwd+bwd", f, 3) for f in (policy_loss, without_softmax)]
    cases = bench.loss_cases(given, others, [None, 2])
    measure.time_rounds(cases, 1)
    rows = {(case.name, case.layer): case.row() for case in cases}
    for layer in (None, 2):
        assert rows["policy_loss", layer]["off_head"] == 0
        assert "off ours" in rows["without_softmax", layer]["failed"]


def test_no_peer_is_compared_with_another_in_place_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(batch: Batch) -> dict:
        raise RuntimeError("out of memory")

    given = training()
    peer = Implementation("peer fwd+bwd", policy_loss, 3)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "policy_loss", broken)
        cases = bench.loss_cases(given, [peer], [None])
    measure.time_rounds(cases, 1)
    ours, other = (case.row() for case in cases)
    assert ours["failed"] == "RuntimeError: out of memory" and "ms" not in other
    assert other["failed"] == "ours has no gradient to compare it with"


def test_a_case_that_runs_out_of_memory_stops_no_other() -> None:
    given = training()

    def broken(batch: Batch) -> dict:
        batch.hidden.sum().backward()
        raise RuntimeError("out of memory\nwith details")

    others = [Implementation("broken fwd+bwd", broken, 3), Implementation("x", policy_loss, 3)]
    cases = bench.loss_cases(given, others, [None])
    measure.time_rounds(cases, 1)
    rows = [case.row() for case in cases]
    assert [row["name"] for row in rows] == [bench.OURS, "broken", "x"]
    assert rows[1]["failed"] == "RuntimeError: out of memory" and "ms" not in rows[1]
    assert rows[0]["ms"] > 0 and rows[2]["ms"] > 0 and rows[2]["off_head"] == 0
    assert all(p.grad is None for p in given.model.parameters())


def test_nothing_begins_after_the_deadline() -> None:
    given = training()
    (case,) = bench.loss_cases(given, [], [None])
    measure.time_rounds([case], 3, deadline=time.monotonic() - 1)
    assert case.row() == {"name": bench.OURS, "layer": None, "failed": "no time was left"}


# ---- arithmetic --------------------------------------------------------------------------------


def row(name: str, layer: int | None, ms: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "layer": layer, "ms": ms} | more


def test_ratios_and_bars() -> None:
    rows = [
        row(bench.OURS, None, 100.0),
        row("peer", None, 150.0),
        {"name": "eager", "layer": None, "failed": "out of memory"},
        row(bench.OURS, 6, 46.0),
        row(bench.SWEEP_GEMMS, None, 10.0),
        row(bench.SWEEP, None, 11.0),
        row(bench.ADAMW, 6, 48.0),
    ]
    bench.add_ratios(rows)
    assert rows[1]["x_bupo"] == 1.5 and rows[3]["x_full"] == 0.46
    lines = bench.bars(rows)
    assert [line.split(":")[0].strip() for line in lines] == ["NOT MET", "NO FIGURE", "met"]
    assert "phase 1 / full step = 0.46, bar <= 0.45" in lines[0]
    assert "entropy_flow / its bare GEMMs = 1.10" in lines[2]
    bench.add_ratios([*rows, row(bench.ADAMW, None, 120.0)])
    assert "met: phase 1 / full step, with AdamW = 0.40" in bench.bars(rows)[1]


def test_the_fastest_peer_has_a_right_gradient_of_the_same_loss(tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    right = {"error_d_hidden": 1e-3, "error_d_weight": 1e-3}

    def peer(name: str, ms: float, tokens: int = 8, **more: Any) -> dict[str, Any]:
        shape = {"tokens": tokens, "width": 4, "vocab": 9}
        return shape | {"name": name, "ms": ms, "products": 3} | right | more

    rows = [
        peer("policy_loss fwd+bwd", 1.0),
        peer("eager fwd+bwd", 9.0),
        peer("liger fused linear CE fwd+bwd", 2.0),
        peer("torch.compile of eager fwd+bwd", 3.0),
        peer("cce fwd+bwd", 3.5, error_d_weight=0.3),
        peer("cce_exact fwd", 4.0, products=1),
        peer("cce_exact fwd+bwd", 6.0),
        peer("trl ChunkedLogProb fwd+bwd", 1.0, tokens=16),
    ]
    file.write_text("".join(json.dumps(x) + "\n" for x in rows))
    assert bench.fastest_peer(file) == "cce_exact"
    file.write_text(json.dumps(rows[0]) + "\n")
    assert bench.fastest_peer(file) == "eager"
