"""The benchmark of a training step: that it measures what it says, and its arithmetic."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_train_step as bench
import pytest
import tables
import torch
import workload
from workload import Size

ROOT = Path(__file__).parent.parent
SMALL = Size(
    layers=4,
    width=64,
    vocab=301,
    prompts=2,
    samples=4,
    prompt_tokens=(3, 6),
    new_tokens=5,
    micro_rollouts=2,
)


def test_a_small_run_without_trl(tmp_path: Path) -> None:
    """A package that cannot be imported stands for TRL: the others have their figures."""
    (tmp_path / "datasets.py").write_text("raise ImportError('no data sets here')")
    file = tmp_path / "rows.jsonl"
    options = [f"--{k}={getattr(SMALL, k)}" for k in ("layers", "width", "vocab", "prompts")]
    options += [f"--{k}={getattr(SMALL, k)}" for k in ("samples", "new_tokens", "micro_rollouts")]
    options += [
        "--prompt_tokens",
        "3",
        "6",
        "--engines=hf",
        "--rounds=1",
        "--steps=1",
        f"--trl_path={tmp_path}",
    ]
    command = [sys.executable, "bench/bench_train_step.py", f"--json={file}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    full, peer, with_ops, phase = (json.loads(line) for line in file.read_text().splitlines())
    assert peer["failed"] == with_ops["failed"] == "ImportError: no data sets here"
    assert "ImportError: no data sets here" in done.stdout
    for row in (full, phase):
        assert row["tokens"] == 8 * 5 and row["peak_mib"] > 0 and row["cpu_seconds"] > 0
        assert sum(row[stage] for stage in bench.STAGES) == pytest.approx(row["step"])
        assert row["without_rollout"] == pytest.approx(row["step"] - row["rollout"])
        assert min(row[stage] for stage in ("rollout", "old_logprobs", "update")) > 0
        assert row["grad_norm"] > 0
    assert (full["layer"], phase["layer"], full["vocab"]) == (None, 1, 301)
    assert phase["x_bupo_step"] == pytest.approx(phase["step"] / full["step"])
    assert phase["grad_norm"] != full["grad_norm"], "another policy"


@pytest.mark.usefixtures("one_thread")
def test_trl_is_measured_with_the_op(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import step_trl

    from bupo import ops

    calls: list[Any] = []
    original = ops.lm_head_logprobs

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(ops, "lm_head_logprobs", counted)
    workload.write(SMALL, tmp_path)
    for with_ops in (False, True):
        assert not calls
        step_trl.main(tmp_path, SMALL, 1, 1, {}, with_ops)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
        assert json.loads(lines[-1])["tokens"] == 8 * 5
    assert calls


def test_no_response_can_end(tmp_path: Path) -> None:
    """The end of sequence is out of reach after any token, and of prompts as well."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workload.write(SMALL, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = workload.prompts(SMALL)
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [3, 6]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == workload.EOS == tokenizer.eos_token_id
    ids = torch.randint(2, SMALL.vocab, (64, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)
    assert logprobs[..., workload.EOS].max() < -100
    others = torch.arange(SMALL.vocab) != workload.EOS
    assert logprobs[..., others].min() > -20, "and nothing else is"
    rewards = workload.reward([tokenizer.decode(row) for row in ids], [])
    assert 16 < sum(rewards) < 48 and set(rewards) == {0.0, 1.0}


def row_of(name: str, step: float, **more: Any) -> dict[str, Any]:
    stages = dict.fromkeys(bench.STAGES, 0.0) | {"rollout": 2.0, "update": step - 2}
    row = {"name": name, "layer": None, "step": step, "cpu_seconds": 2 * step, "tokens": 1024}
    return row | stages | {"without_rollout": step - 2, "peak_mib": 100.0} | more


def test_ratios_and_bars() -> None:
    rows = [row_of(bench.OURS, 4.0), row_of(bench.PEER, 6.0, peak_mib=99.0)]
    bench.add_ratios(rows)
    assert rows[1]["x_bupo_step"] == 1.5 and rows[1]["x_bupo_without_rollout"] == 2.0
    verdicts = [line.strip().split(":")[0] for line in bench.bars(rows)]
    assert verdicts == ["met", "NOT MET", "NOT MET"]
    rows = [row_of(bench.OURS, 4.0), row_of(bench.PEER, 4.9), row_of("phase 1", 3.1, layer=1)]
    bench.add_ratios(rows)
    assert "NOT MET: without_rollout, TRL / bupo = 1.45, bar >= 2" in bench.bars(rows)
    assert "NOT MET: without_rollout, phase 1 / bupo = 0.55, bar <= 0.5" in bench.bars(rows)
    for broken in (0, 1):
        rows = [row_of(bench.OURS, 4.0), row_of(bench.PEER, 6.0)]
        rows[broken] = {"name": rows[broken]["name"], "layer": None, "failed": "out of memory"}
        bench.add_ratios(rows)
        assert all(line.startswith("NO FIGURE") for line in bench.bars(rows))


def test_other_work_gets_no_time() -> None:
    rows = [row_of(bench.OURS, 4.0), row_of(bench.PEER, 6.0, tokens=1023.0)]
    bench.check_work(rows, Size(prompts=4, samples=8, new_tokens=32))
    assert "failed" not in rows[0] and rows[1]["failed"] == "1023 tokens, not 1024"


def test_the_median_leaves_out_the_warm_up() -> None:
    """And a program that breaks gives its last line instead of times."""
    lines = [json.dumps({"step": x, "rollout": 1.0}) for x in (90.0, 3.0, 5.0, 4.0)]
    side = bench.Side("x", ["-c", f"print({chr(10).join(lines)!r})"])
    side.run(threads=1, warm_up=1)
    row = side.row()
    assert (row["step"], row["without_rollout"]) == (4.0, 3.0)
    broken = bench.Side("x", ["-c", f"print({lines[0]!r}); raise ValueError('no')"])
    broken.run(threads=1, warm_up=0)
    assert broken.row() == {"name": "x", "layer": None, "failed": "ValueError: no"}


def test_the_table() -> None:
    rows = [row_of(bench.OURS, 4.0), row_of(bench.PEER, 6.0)]
    rows.append(row_of("bupo, phase 1", 3.0, layer=3))
    bench.add_ratios(rows)
    where = {"date": "2026-01-01T00:00:00", "torch": "2", "transformers": "5", "trl": "1.16.0"}
    where |= {"cpu": "C", "threads": 2} | json.loads(Size().text())
    lines = tables.train_step_table([where | row for row in rows]).splitlines()
    assert lines[3] == "| TRL GRPOTrainer | 2.00 | 0.00 | 4.00 | 0.00 | 6.00 | 4.00 | 12.00 | 100 |"
    assert lines[4].startswith("| bupo, phase 1, layer 3 | 2.00 |")
    assert lines[5] == "| TRL GRPOTrainer / bupo | | | | | 1.50 | 2.00 | 1.50 | 1.00 |"
    assert "threads of C; torch 2, transformers 5, TRL 1.16.0, 2026-01-01" in lines[-1]
