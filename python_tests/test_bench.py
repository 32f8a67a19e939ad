"""The benchmark's own arithmetic, its tables and bars, and its comparison of two runs."""

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_lm_head
import measure
import peers
import pictures
import pytest
import regression
import roofline
import rows as rows_module
import tables
import torch
from batch import Batch
from implementations import Implementation
from truth import Truth, policy_slope, relative_error

import bupo.ops as ops

ROOT = Path(__file__).parent.parent


# ---- the program -------------------------------------------------------------------------------


def test_a_small_run_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "bench/bench_lm_head.py", "--json", str(file), "--rounds", "1"]
    size = ["--tokens", "96", "--width", "24", "--vocab", "301"]
    done = subprocess.run([*command, *size], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(r["name"], r["dtype"]): r for r in map(json.loads, file.read_text().splitlines())}
    assert ("eager fwd+bwd", "float32") in rows and ("eager fwd+bwd", "bfloat16") not in rows
    for (name, dtype), row in rows.items():
        assert row["tokens"] == 96 and row["ms"] > 0 and row["x_three_gemms"] > 0, row
        if "GEMM" not in name and "cross_entropy" not in name:
            assert row["error_logprobs"] < 1e-4, row
        if "bwd" in name:
            limit = 5e-5 if dtype == "float32" else 1e-2
            assert row["error_d_hidden"] < limit and row["error_d_weight"] < limit, row
    assert regression.main([str(file), "--baseline", str(file)]) == 0


def test_the_kernels_that_are_set_stay_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpu-check's smoke test leaves out those that hang by an environment variable."""
    seen: list[object] = []

    def bench_shapes(*_: object) -> bool:
        seen.append(ops.build_info()["cuda_kernels"])
        return True

    monkeypatch.setattr(bench_lm_head, "bench_shapes", bench_shapes)
    monkeypatch.setattr(bench_lm_head, "ceilings", lambda *_: {})
    for given in ([], ["--kernels", "sm90_cooperative"]):
        ops.set_cuda_kernels("portable")
        monkeypatch.setattr(sys, "argv", ["bench_lm_head.py", *given])
        assert bench_lm_head.main() == 0
    ops.set_cuda_kernels("auto")
    assert seen == ["portable", "sm90_cooperative"]


def test_the_truth_is_that_of_the_reference() -> None:
    """And a wrong gradient is seen: one bad row of dX, one of dW, a nan."""
    batch = Batch.make(700, 12, 90, torch.float32)
    truth = Truth.of(batch, 64, 30)
    assert {0, 699} <= set(truth.rows.tolist()) and {0, 89} <= set(truth.entries.tolist())
    x, w = (t.detach().double().requires_grad_() for t in (batch.hidden, batch.weight))
    exact = ops.reference.lm_head_logprobs(x, w, batch.targets)
    torch.testing.assert_close(truth.logprobs, exact.logprobs.detach())
    torch.testing.assert_close(truth.entropy, exact.entropy.detach())
    slope = policy_slope(batch, truth.logprobs)
    expected = torch.autograd.grad((exact.logprobs * slope).sum(), (x, w))
    got = truth.gradients(batch, slope)
    for name, g, e in zip("xw", got, expected, strict=True):
        e = e[truth.rows if name == "x" else truth.entries]
        assert relative_error(g, e) < 1e-12
        e = e.clone()
        e[3] = -e[3]
        assert relative_error(g, e) > 0.01
        e[3, 0] = torch.nan
        assert not relative_error(e, g) <= 1


def test_a_peer_is_there_or_missing_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [x for x in sys.path if "site-packages" not in x])
    names = [peer.name for peer in peers.PEERS]
    found, missing = peers.load(names, "cpu")
    for name in names:
        assert any(x.name.startswith(f"{name} fwd") for x in found) != (name in missing), name
    assert "runs on a GPU only" in missing["cce"]
    if "verl FusedLinearForPPO" in missing:
        assert "verl" in missing["verl FusedLinearForPPO"]
        assert "package verl==0.9.1" in missing["verl FusedLinearForPPO"]


def test_a_kernel_is_imported_past_the_init_of_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "heavy_trainer" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").write_text("raise ImportError('ray is not installed')")
    (inner / "kernel.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):  # the second of two peers in one package finds it there
        peers.import_without_init("heavy_trainer.inner")
        assert importlib.import_module("heavy_trainer.inner.kernel").answer == 42
        assert importlib.util.find_spec("heavy_trainer") is not None
    with pytest.raises(ModuleNotFoundError, match="no_such_trainer"):
        peers.import_without_init("no_such_trainer.inner")


def test_a_slow_peer_is_timed_less_often() -> None:
    batch = Batch.make(4, 8, 9, torch.float32)

    def implementation(name: str, seconds: float, peer: bool) -> Implementation:
        def run(_: Batch) -> dict:
            time.sleep(seconds)
            return {}

        return Implementation(name, run, 3, peer=peer)

    given = [("floor", 0.001, False), ("slow peer", 0.1, True), ("ours", 0.1, False)]
    cases = [measure.Case(implementation(*x), torch.float32, [batch]) for x in given]
    measure.time_rounds(cases, 6)
    assert [len(case.milliseconds) for case in cases] == [6, measure.ENOUGH, 6]


# ---- bars --------------------------------------------------------------------------------------


def gpu_row(name: str, ms: float, products: int = 3, **more: Any) -> dict[str, Any]:
    row = {"name": name, "dtype": "bfloat16", "ms": ms, "products": products, "peer": False}
    return row | {"x_three_gemms": ms / 40, "x_one_gemm": ms / 13, "x_ours": ms / 42} | more


def right(error: float = 2e-3) -> dict[str, float]:
    return {"error_d_hidden": error, "error_d_weight": error}


def test_a_peer_counts_only_with_a_right_gradient() -> None:
    rows = [
        gpu_row("policy_loss fwd+bwd", 42.0, **right()),
        gpu_row("fast and wrong fwd+bwd", 20.0, peer=True, **right(0.3)),
        gpu_row("fast and nan fwd+bwd", 21.0, peer=True, **right(float("nan"))),
        gpu_row("fast without gradient fwd+bwd", 22.0, peer=True),
        gpu_row("slow and right fwd+bwd", 84.0, peer=True, **right()),
    ]
    rows_module.add_best_peer(rows)
    assert rows[0]["best_peer"] == "slow and right fwd+bwd" and rows[0]["x_best_peer"] == 0.5
    bars = "\n".join(bench_lm_head.cuda_bars(rows, (8192, 4096, 151936), 1024))
    assert "met: policy_loss / fastest right peer (slow and right fwd+bwd) = 0.50" in bars
    assert "NO FIGURE: lm_head_logprobs fwd / one bare GEMM" in bars
    assert "met: policy_loss / three bare GEMMs = 1.05, bar <= 1.05" in bars


def test_bars_that_are_not_met_and_rows_without_a_time() -> None:
    rows = [
        gpu_row("policy_loss fwd+bwd", 50.0, extra_mib=4000.0, **right(4e-3)),
        {"name": "policy_loss fwd+bwd, live 0.25", "dtype": "bfloat16", "failed": "out of memory"},
    ]
    rows_module.add_best_peer(rows)
    bars = bench_lm_head.cuda_bars(rows, (8192, 4096, 151936), 1024)
    assert sum(line.startswith("NOT MET") for line in bars) == 4, bars
    assert "NO FIGURE: policy_loss live 0.25 / live 1" in bars
    assert not any(line.strip().startswith("met") for line in bars)


def test_the_table_of_a_gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    more = {"gpu": "H", "driver": "1", "torch": "2", "commit": "abc", "peak_mib": 5.0}
    write(
        tmp_path / "cuda.jsonl",
        gpu_row("policy_loss fwd+bwd", 42.0, x_best_peer=0.5, **more, **right()),
        gpu_row("wrong fwd+bwd", 20.0, **more | {"peer": True}, **right(0.3)),
        {"name": "eager fwd+bwd", "peer": True, "failed": "out of memory"},
        {"name": "cce", "peer": True, "missing": "No module named 'cut_cross_entropy'"},
        gpu_row("policy_loss fwd+bwd", 168.0, tokens=32, **more),
    )
    lines = tables.table_named("cuda").splitlines()
    assert lines[2] == "| policy_loss fwd+bwd | 42.0 | 3.23 | 1.05 | 0.50 | 5 | 2.0e-03 |"
    assert lines[3] == "| wrong fwd+bwd | wrong gradient, error 3.0e-01 | | | | | |"
    assert "out of memory" in lines[4] and "cut_cross_entropy" in lines[5]
    assert lines[-1].startswith("N=8, D=4, V=9, H, driver 1") and len(lines) == 8


def test_the_table_of_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    nothing = "Not measured yet: there is no bench/results/cuda.jsonl."
    assert tables.table_named("cuda") == tables.table_named("cuda_shapes") == nothing
    run = {"model": "M", "length": 4, "driver": "1", "torch": "2", "commit": "abc"}
    run |= {"transformers": "5", "layer": None}
    figures = {"ms": 1000.0, "x_bupo": 1.0, "x_full": 1.0, "peak_mib": 7.0, "total_mib": 9.0}
    write(
        tmp_path / "models_cuda.jsonl",
        run | {"name": "bupo"} | figures,
        run | {"name": "bupo", "ms": 300.0, "layer": 6, "x_full": 0.3},
        run | {"name": "eager", "failed": "out of memory"},
        run | {"name": "entropy_flow", "ms": 11.0, "x_gemms": 1.1},
        run | {"name": "bupo, longest sequence", "sequence": 40960, "gib": 78.0},
    )
    lines = tables.table_named("models").splitlines()
    assert lines[2:7] == [
        "| M: bupo |  | 1000 | 1.00 | 1.00 |  | 7 | 9 |",
        "| M: bupo | layer 6 | 300 |  | 0.30 |  |  |  |",
        "| M: eager |  | out of memory | | | | | |",
        "| M: entropy_flow |  | 11 |  |  | 1.10 |  |  |",
        "| M: bupo, longest sequence |  | 40,960 tokens, 78 GiB | | | | | |",
    ]


# ---- roofline.py -------------------------------------------------------------------------------


def test_the_roofline_shows_what_may_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    rate = {"gflops": 5e5, "gb_s": 200.0, "live": 1, "copy_gb_s": 4000.0}
    rate |= {"gemm_tflops": {"bfloat16": 700.0}}
    rows = [
        gpu_row("three bare GEMMs", 40.0, **rate),
        gpu_row("policy_loss fwd+bwd", 42.0, **rate, **right()),
        gpu_row("policy_loss fwd+bwd, live 0.25", 20.0, **rate | {"live": 0.25}, **right()),
        gpu_row("wrong fwd+bwd", 20.0, **rate | {"peer": True}, **right(0.3)),
        gpu_row("right fwd+bwd", 60.0, **rate | {"peer": True}, **right()),
        gpu_row("right fwd", 20.0, 1, **rate | {"peer": True}),
        {"name": "eager fwd+bwd", "peer": True, "failed": "out of memory"},
        gpu_row("policy_loss fwd+bwd", 168.0, tokens=32, **rate),
    ]
    picture = tmp_path / "roofline_cuda.png"
    write(tmp_path / "cuda.jsonl", *rows)
    shown = [row["name"] for row in roofline.rows_to_draw("cuda")]
    assert shown == [rows[n]["name"] for n in (0, 1, 4, 5)]
    assert (
        roofline.update_pictures(check=False) == [picture.name] and picture.stat().st_size > 10_000
    )
    assert roofline.update_pictures(check=True) == []
    write(tmp_path / "cuda.jsonl", *rows[:2])
    assert roofline.update_pictures(check=True) == [picture.name], "a picture of other results"
    picture.unlink()
    assert roofline.update_pictures(check=True) == [picture.name], "no picture"
    write(tmp_path / "cuda.jsonl", *[gpu_row("policy_loss fwd+bwd", 42.0)])
    assert roofline.update_pictures(check=True) == [], "its ceilings are not known"


# ---- regression.py -----------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> str:
    where = {"date": "2026-01-01T00:00:00", "gpu": "H", "tokens": 8, "width": 4, "vocab": 9}
    path.write_text("".join(json.dumps(where | row) + "\n" for row in rows))
    return str(path)


def compared(tmp_path: Path, fresh: list[dict], *options: str) -> int:
    old = [gpu_row("policy_loss fwd+bwd", 40.0), gpu_row("lm_head_logprobs fwd", 13.0, 1)]
    old.append(gpu_row("a peer fwd+bwd", 60.0, peer=True))
    older = [gpu_row("policy_loss fwd+bwd", 1.0, date="2025-01-01T00:00:00")]
    baseline = write(tmp_path / "old.jsonl", *older, *old)
    return regression.main(
        [write(tmp_path / "new.jsonl", *fresh), "--baseline", baseline, *options]
    )


def test_regression_is_by_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forward = gpu_row("lm_head_logprobs fwd", 13.0, 1)
    good = [gpu_row("policy_loss fwd+bwd", 41.9), forward]
    assert compared(tmp_path, good) == 0
    assert compared(tmp_path, [good[0] | {"ms": 9e9}, forward]) == 0, "a slower card, same ratio"
    assert compared(tmp_path, good, "--tolerance", "0.02") == 1
    assert compared(tmp_path, [gpu_row("policy_loss fwd+bwd", 42.1), forward]) == 1
    assert "WORSE" in capsys.readouterr().out
    assert compared(tmp_path, [good[0], gpu_row("lm_head_logprobs fwd", 14.0, 1)]) == 1


@pytest.mark.parametrize(
    ("fresh", "status"),
    [
        ([], 2),
        ([gpu_row("a peer fwd+bwd", 1.0, peer=True)], 2),
        ([gpu_row("policy_loss fwd+bwd", 40.0)], 1),
        ([gpu_row("policy_loss fwd+bwd", 40.0), gpu_row("lm_head_logprobs fwd", 0.0, 1)], 1),
        ([gpu_row("policy_loss fwd+bwd", float("nan")), gpu_row("lm_head_logprobs fwd", 1, 1)], 1),
        ([{"name": "policy_loss fwd+bwd", "dtype": "bfloat16", "failed": "out of memory"}], 2),
        ([gpu_row("policy_loss fwd+bwd", 40.0, gpu="another card")], 2),
        ([gpu_row("policy_loss fwd+bwd", 40.0, tokens=16)], 2),
        ([gpu_row("policy_loss fwd+bwd", 40.0, dtype="float16")], 2),
    ],
    ids=["empty", "peers", "one lost", "zero", "nan", "failed", "card", "shape", "dtype"],
)
def test_regression_does_not_pass_on_what_it_cannot_compare(
    fresh: list[dict], status: int, tmp_path: Path
) -> None:
    assert compared(tmp_path, fresh) == status


def test_regression_says_why_a_figure_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shape that had no time is one row for all of its figures."""
    other = [gpu_row("lm_head_logprobs fwd", 13.0, 1), gpu_row("policy_loss fwd+bwd", 40.0)]
    left_out = {"name": "shape", "failed": "left out: about 60 s", "tokens": 16}
    baseline = write(tmp_path / "old.jsonl", *other, other[1] | {"tokens": 16})
    fresh = write(tmp_path / "new.jsonl", *other, left_out)
    assert regression.main([fresh, "--baseline", baseline]) == 1
    assert "left out: about 60 s" in capsys.readouterr().out
    for tolerance in ("5", "-0.1", "nan"):
        with pytest.raises(SystemExit):
            regression.main([fresh, "--baseline", baseline, "--tolerance", tolerance])
    assert "--tolerance must be at least 0 and below 1, got 5.0" in capsys.readouterr().err


def test_regression_without_a_baseline_or_with_a_broken_file(tmp_path: Path) -> None:
    fresh = write(tmp_path / "new.jsonl", gpu_row("policy_loss fwd+bwd", 40.0))
    assert regression.main([fresh, "--baseline", str(tmp_path / "none.jsonl")]) == 2
    (tmp_path / "broken.jsonl").write_text("{")
    assert regression.main([fresh, "--baseline", str(tmp_path / "broken.jsonl")]) == 2
    peers = write(tmp_path / "peers.jsonl", gpu_row("a peer fwd+bwd", 1.0, peer=True))
    assert regression.main([fresh, "--baseline", peers]) == 2
