"""A run that was stopped or killed and continued equals one that was not, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_samples
from run_samples import assert_same_run, rows, run, state
from safetensors import safe_open

from bupo import evaluate
from bupo.rl import checkpoint
from bupo.rl.checkpoint import load_step
from bupo.runlog import run_directory
from bupo.runlog.run_directory import checkpoints as complete


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out) == 0
    return out


def test_the_uninterrupted_run_is_what_its_settings_say(whole: Path) -> None:
    metrics = rows(whole / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert [m["phase"] for m in metrics] == ["internal"] * 3 + ["final"] * 3
    assert [m["layer"] for m in metrics] == [1] * 3 + [None] * 3
    assert all(m["policy/grad_norm"] > 0 and m["sync/logprob_gap"] < 1e-5 for m in metrics)
    evals = [(e["step"], e["when"]) for e in rows(whole / "eval.jsonl")]
    assert evals == [
        (0, "before"), (2, "during"), (3, "phase_switch"), (4, "during"), (6, "after"),
    ]  # fmt: skip
    averages = {e["step"]: e["avg"] for e in rows(whole / "eval.jsonl") if e["step"]}
    best = max(averages, key=lambda step: averages[step])
    kept = sorted({best, 3, 4, 6})  # the best, the end of phase 1, the newest two
    assert [checkpoint.load_step(p) for p in run_directory.checkpoints(whole)] == kept


def test_same_seed_same_run_and_other_seed_other_run(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "a") == 0
    assert_same_run(whole, tmp_path / "a")
    assert run(tmp_path / "b", "seed=1") == 0
    assert state(whole) != state(tmp_path / "b")


# Batches of rewards: evaluation before, step 1, 2, evaluation, 3, evaluation, 4, evaluation ...
@pytest.mark.parametrize(
    ("stop", "done"),
    [(1, 0), (2, 0), (3, 1), (4, 2), (5, 2), (6, 3), (7, 3), (9, 4), (11, 6)],
    ids=lambda x: str(x),
)
def test_stopped_and_continued(whole: Path, tmp_path: Path, stop: int, done: int) -> None:
    """In phase 1, at the switch and after it, in a step and in an evaluation."""
    out = tmp_path / "run"
    assert run(out, stop=stop) == 128 + signal.SIGTERM
    assert checkpoint.load_step(run_directory.checkpoints(out)[-1]) == done
    assert (out / "report.html").exists()
    assert run(out, "resume=auto") == 0
    assert_same_run(whole, out)


def test_bupo_evaluate_gives_the_figures_of_training(whole: Path, tmp_path: Path) -> None:
    """The same code, seeds and batches: figure for figure, response for response."""
    newest = run_directory.checkpoints(whole)[-1]
    out = tmp_path / "evaluation"
    command = ["--config", str(whole / "config.yaml"), "--out", str(out), f"model.path={newest}"]
    assert evaluate.main(command) == 0
    trained = rows(whole / "eval.jsonl")[-1]
    assert rows(out / "eval.jsonl") == [
        {k: v for k, v in trained.items() if k not in ("step", "when")}
    ]
    mine, other = (out / "responses", whole / "evaluations/step_000006")
    assert (mine / "addition.jsonl").read_text() == (other / "addition.jsonl").read_text()


def test_stopped_between_two_data_sets(tmp_path: Path) -> None:
    """The second one of an evaluation is not forgotten because the first one is recorded."""
    assert run(tmp_path / "first", "steps=1", "bupo.steps=0") == 0
    (made,) = Path(os.environ["BUPO_CACHE"]).glob("arithmetic-qwen3-2-32-4-*-4-0-*")
    held_out = (made / "eval.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(held_out.replace("addition", "one"))
    (tmp_path / "b.jsonl").write_text(held_out.replace("addition", "two"))
    settings = [
        "task=null", f"model.path={made / 'model'}", f"data.train=[{made / 'train.jsonl'}]",
        f"eval.files=[{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}]", "task_options={}",
        "steps=2", "bupo.steps=1",
    ]  # fmt: skip
    assert run(tmp_path / "whole", *settings) == 0
    assert run(tmp_path / "parts", *settings, stop=1) == 128 + signal.SIGTERM  # in "one"
    assert len(rows(tmp_path / "parts/eval.jsonl")) == 1
    assert run(tmp_path / "parts", *settings, "resume=auto") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    evals = [(e["step"], e["dataset"]) for e in rows(tmp_path / "parts/eval.jsonl")]
    assert evals == [(s, d) for s in (0, 1, 2) for d in ("one", "two")]


def test_killed_then_terminated_then_continued(whole: Path, tmp_path: Path) -> None:
    """Real processes, as a user starts them: SIGKILL, SIGTERM, then the rest. test_kill.py has
    many more kills."""
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bupo.run", *run_samples.arguments(out, "resume=auto")]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
        deadline = time.monotonic() + 120
        file = out / "metrics.jsonl"
        while not (file.exists() and f'"step": {step},' in file.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.02)

    process = start()
    wait_for_step(process, 3)
    process.kill()
    process.communicate()
    process = start()
    wait_for_step(process, 4)
    process.terminate()
    errors = process.communicate()[1]
    assert process.returncode in (0, 128 + signal.SIGTERM), errors  # 0: it was through already
    assert "Traceback" not in errors
    process = start()
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert_same_run(whole, out)


def test_layers_above_are_untouched_until_the_switch(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(out, stop=6) == 128 + signal.SIGTERM  # evaluation at the switch: 3 steps are done
    trained = run_directory.checkpoints(out)[-1]
    cache = Path(os.environ["BUPO_CACHE"])
    # eval_problems is 4
    (start,) = cache.glob("arithmetic-qwen3-2-32-4-*-4-0-*/model/model.safetensors")
    changed, same = set(), set()
    with safe_open(start, "pt") as before, safe_open(trained / "model.safetensors", "pt") as after:
        for name in before.keys():  # noqa: SIM118 - safe_open is no dict
            equal = before.get_tensor(name).equal(after.get_tensor(name))
            (same if equal else changed).add(name)
    assert {n for n in same if ".layers.1." not in n} == {"model.norm.weight"}
    assert not any(".layers.1." in n for n in changed)
    (file,) = (trained / "optimizer").iterdir()
    with safe_open(file, "pt") as moments:
        above = [n for n in moments.keys() if ".layers.1." in n]  # noqa: SIM118
        assert above and not any(moments.get_tensor(n).any() for n in above), "complete, and zero"


def test_a_checkpoint_is_a_model_that_transformers_loads(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    newest = run_directory.checkpoints(whole)[-1]
    assert AutoModelForCausalLM.from_pretrained(newest).config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(newest)("1+2=")["input_ids"]


def test_an_unfinished_checkpoint_is_ignored_and_removed(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(out, stop=5) == 128 + signal.SIGTERM
    torn = out / "checkpoints" / ".step_000004.99"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    (out / "checkpoints" / "step_000005").mkdir()  # no trainer.json: not complete
    assert run(out, "resume=auto") == 0
    assert not torn.exists()
    assert_same_run(whole, out)


def test_continuing_a_finished_run_changes_nothing(whole: Path) -> None:
    before = (rows(whole / "metrics.jsonl"), rows(whole / "eval.jsonl"), state(whole))
    assert run(whole, "resume=auto") == 0
    assert before == (rows(whole / "metrics.jsonl"), rows(whole / "eval.jsonl"), state(whole))


def test_metrics_are_valid_json_with_the_keys_of_the_contract(whole: Path) -> None:
    keys = {
        "step", "phase", "layer", "reward/mean", "response/length", "policy/entropy",
        "final/entropy", "policy/clip_fraction", "sync/logprob_gap", "tokens_per_second",
        "time/rollout", "time/reward", "time/old_logprobs", "time/update", "time/sync", "time/step",
    }  # fmt: skip
    for line in (whole / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
        assert keys <= row.keys()
    assert {p.name for p in whole.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "eval.jsonl", "rollouts", "checkpoints", "tensorboard",
        "report.html", "reward.png", "entropy.png", "length.png",
    }  # fmt: skip


CURES = [
    "optimizer.micro_batch_tokens=64",
    "model.gradient_checkpointing=true",
    "rollout.batch_size=8",
    "reward.timeout=99",
    "model.attn_implementation=eager",
]


def test_what_cures_an_out_of_memory_error_may_change(whole: Path, tmp_path: Path) -> None:
    """It changes the order of sums and nothing else: the run goes on as it would have."""
    out = tmp_path / "run"
    assert run(out, stop=6) == 128 + signal.SIGTERM
    assert run(out, "resume=auto", *CURES) == 0
    metrics, expected = rows(out / "metrics.jsonl"), rows(whole / "metrics.jsonl")
    assert [row["reward/mean"] for row in metrics] == [row["reward/mean"] for row in expected]
    for row, wanted in zip(metrics, expected, strict=True):
        assert row["policy/loss"] == pytest.approx(wanted["policy/loss"], abs=1e-5)


def test_files_may_move_between_two_parts_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model and data under other names are the same run; other data under any name are not."""
    assert run(tmp_path / "first", "steps=1", "bupo.steps=0") == 0
    (made,) = Path(os.environ["BUPO_CACHE"]).glob("arithmetic-qwen3-2-32-4-*-4-0-*")
    lines = (made / "train.jsonl").read_text().splitlines(keepends=True)
    out, old, new = tmp_path / "run", tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        shutil.copytree(made, folder)
    (new / "train.jsonl").rename(new / "problems.jsonl")

    def settings(folder: Path, data: str) -> list[str]:
        return [
            "task=null", "task_options={}", f"model.path={folder / 'model'}", "steps=2",
            f"data.train=[{folder / data}]", "eval.every=0", "bupo.steps=1",
        ]  # fmt: skip

    assert run(out, *settings(old, "train.jsonl"), stop=2) == 128 + signal.SIGTERM
    shutil.rmtree(old)
    (new / "other.jsonl").write_text("".join(lines[1:]))
    assert run(out, *settings(new, "other.jsonl"), "resume=auto") == 2
    assert "started with different training prompts" in capsys.readouterr().err
    assert run(out, *settings(new, "problems.jsonl"), "resume=auto") == 0
    assert run(tmp_path / "whole", *settings(new, "problems.jsonl")) == 0
    assert_same_run(tmp_path / "whole", out)


def test_a_checkpoint_is_written_when_the_last_one_is_old(tmp_path: Path) -> None:
    """By default every half hour; here a step is old at once."""
    only = ["checkpoint.every=0", "checkpoint.keep=[]", "checkpoint.keep_last=9", "eval.every=0"]
    assert run(tmp_path / "often", *only, "checkpoint.minutes=1e-9") == 0
    assert run(tmp_path / "once", *only) == 0
    steps = [[load_step(p) for p in complete(tmp_path / name)] for name in ("often", "once")]
    assert steps == [[1, 2, 3, 4, 5, 6], [6]]


def test_switch_and_best_outlive_newer_checkpoints(tmp_path: Path) -> None:
    few = ["checkpoint.every=1", "checkpoint.keep_last=1", "eval.every=1"]
    assert run(tmp_path / "run", *few) == 0
    averages = {e["step"]: e["avg"] for e in rows(tmp_path / "run/eval.jsonl") if e["step"]}
    best = max(averages, key=lambda step: averages[step])
    kept = [load_step(p) for p in complete(tmp_path / "run")]
    assert kept == sorted({3, best, 6})
    assert run(tmp_path / "two", *few, "checkpoint.keep=[]") == 0
    assert [load_step(p) for p in complete(tmp_path / "two")] == [6]
