"""The command: its plan, what a resume may change, how it ends, its help."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import run_samples
from run_samples import arguments

from bupo import config
from bupo.config import shipped
from bupo.rl import checkpoint
from bupo.rl.schedule import Schedule
from bupo.rollouts.hf import HFEngine
from bupo.run import main
from bupo.runlog import display
from bupo.samples import with_streams

REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("advantage", config.ADVANTAGES)
def test_every_advantage_composes_with_both_phases(advantage: str, tmp_path: Path) -> None:
    settings = [f"advantage={advantage}", "steps=2", "bupo.steps=1", "loss.tis_cap=2"]
    settings += ["loss.aggregation=seq_sum_longest"] if advantage == "dr_grpo" else []
    assert main(arguments(tmp_path / "run", *settings)) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["phase"] for row in rows] == ["internal", "final"]
    assert all(row["policy/grad_norm"] > 0 and not row["policy/skipped_updates"] for row in rows)


def test_no_stage_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that passes over the rollouts several times, for each model, is done after the last."""
    told: dict[display.Wait, list[float]] = {}
    done = display.Wait.done

    def tell(wait: display.Wait, fraction: float) -> None:
        told.setdefault(wait, []).append(fraction)
        done(wait, fraction)

    monkeypatch.setattr(display.Wait, "done", tell)
    settings = ["steps=2", "bupo.steps=1", "advantage=ppo", "loss.kl_coef=0.1"]
    settings += ["optimizer.micro_batch_tokens=64"]  # several in each pass
    assert main(arguments(tmp_path / "run", *settings)) == 0
    assert len(told) > 10
    for wait, fractions in told.items():
        assert fractions == sorted(fractions), fractions
        assert fractions[-1] == pytest.approx(1) or "old_logprobs" not in wait.line()


def test_a_wrong_engine_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs of the sampled tokens that are not the trainer's, before any update uses them."""
    generate = HFEngine.generate

    def shifted(self: Any, *arguments: Any) -> Any:
        rollouts = generate(self, *arguments)
        return with_streams(rollouts, "engine", [r.stream("engine") - 0.2 for r in rollouts])

    monkeypatch.setattr(HFEngine, "generate", shifted)
    assert main(arguments(tmp_path / "run")) == 1
    errors = capsys.readouterr().err
    assert (
        "sync/logprob_gap: log-probs of sampled tokens differ from the trainer's by 0.2" in errors
    )
    assert "more than rounding explains (0.01)" in errors
    assert not (tmp_path / "run/metrics.jsonl").read_text()
    assert (
        main(arguments(tmp_path / "other", "steps=1", "bupo.steps=0", "rollout.max_logprob_gap=1"))
        == 0
    )


def test_options_may_stand_between_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    first, *rest = arguments(tmp_path / "run")
    assert main([first, *rest, "--dry_run", "seed=7"]) == 0
    assert main(["steps=7", "--out", str(tmp_path / "run"), "bupo.steps=2", "--dry_run"]) == 0
    assert (
        "steps 1-2 train layer 3 of 6, then the final policy to step 7" in capsys.readouterr().err
    )


@pytest.mark.parametrize("change", ["bupo.steps=1", "seed=9", "task_options.layers=1"])
def test_resume_with_other_settings_is_refused(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, "steps=4", "checkpoint.every=2")) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(arguments(out, "steps=6", "resume=auto", change)) == 2
    errors = capsys.readouterr().err
    assert "holds a run with different settings (" in errors and change.split("=")[0][:8] in errors
    assert main(arguments(out, "steps=5", "bupo.steps=3", "resume=auto", change)) == 2
    for folder in (out / "checkpoints").iterdir():  # still refused: the numbers are kept
        shutil.rmtree(folder)
    assert main(arguments(out, "steps=6", "resume=auto", change)) == 2
    assert all(p.read_bytes() == x for p, x in before.items() if "checkpoints" not in str(p))


def test_a_run_of_another_version_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    """Its config.yaml has a key that is none any more, which nobody typed."""
    (tmp_path / "config.yaml").write_text("rollout: {kv_cache_gib: 1}\n")
    (tmp_path / "metrics.jsonl").touch()
    assert main(arguments(tmp_path, "resume=auto")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path}/config.yaml (the earlier settings) cannot be read: unknown key" in error


def test_resume_with_fewer_steps_than_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    same = ("bupo.steps=1", "eval.limit=1", "optimizer.schedule=constant", "resume=auto")
    assert main(arguments(out, "steps=3", *same)) == 0
    capsys.readouterr()
    assert main(arguments(out, "steps=2", *same)) == 2
    assert f"out={out} has done 3 steps, but steps=2" in capsys.readouterr().err


def test_resume_without_the_earlier_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, "steps=2", "bupo.steps=1")) == 0
    settings = (out / "config.yaml").read_text()
    (out / "config.yaml").unlink()
    capsys.readouterr()
    assert main(arguments(out, "steps=2", "bupo.steps=1", "resume=auto", "optimizer.lr=1")) == 2
    assert "holds a run, but not its config.yaml" in capsys.readouterr().err
    assert not (out / "config.yaml").exists()
    (out / "config.yaml").write_text(settings)
    assert main(arguments(out, "steps=2", "bupo.steps=1", "resume=auto")) == 0


@pytest.mark.parametrize(("schedule", "status"), [("linear", 2), ("constant", 0)])
def test_resume_with_other_steps(
    schedule: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A linear schedule ends at the last step: another one changes every rate before it."""
    settings = ["bupo.steps=1", f"optimizer.schedule={schedule}"]
    assert main(arguments(tmp_path / "run", "steps=2", *settings)) == 0
    capsys.readouterr()
    assert main(arguments(tmp_path / "run", "steps=3", *settings, "resume=auto")) == status
    said = "steps: 2 -> 3 (optimizer.schedule=linear computes the learning rate of every step"
    assert (said in capsys.readouterr().err) == (status == 2)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    assert main(arguments(out, *TWO_STEPS)) == 0
    return out


TWO_STEPS = ["steps=2", "bupo.steps=1", "checkpoint.every=1", "eval.every=0", "advantage=ppo"]
STATE = "shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    "file", ["trainer.json", "model.safetensors", f"optimizer/{STATE}", f"critic/{STATE}"]
)
@pytest.mark.parametrize("length", [0, 9])
def test_a_cut_checkpoint_says_how_to_do_without(
    file: str, length: int, two_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(two_steps, out)
    newest = out / "checkpoints/step_000002"
    (newest / file).write_bytes((newest / file).read_bytes()[:length])
    assert main(arguments(out, *TWO_STEPS, "resume=auto")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"bupo.run: the checkpoint {newest} is damaged: "), last
    assert "remove that folder, and resume=auto continues from the one before it" in last
    shutil.rmtree(newest)
    assert main(arguments(out, *TWO_STEPS, "resume=auto")) == 0


@pytest.mark.parametrize("text", ["[]", '{"step": 2}', '{"step": "2", "drawn": 0}'])
def test_a_checkpoint_without_its_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(text)
    with pytest.raises(config.ConfigError, match=r"damaged: trainer\.json does not state step and"):
        checkpoint.load_state(tmp_path)


def test_a_setting_that_is_wrong_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"^no flash$"), checkpoint.reading(tmp_path):
        raise config.ConfigError("no flash")


@pytest.mark.parametrize(
    "where", ["run_plan.find_sources", "training.execute", "training.load_model"]
)
def test_ctrl_c_before_training(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"bupo.commands.{where}", interrupt)
    assert main(arguments(tmp_path / "run")) == 130
    assert capsys.readouterr().err.endswith("\nstopped before training began\n")


def test_an_out_that_may_not_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where os.access did not tell, as on some network file systems."""
    mkdir, out = Path.mkdir, tmp_path / "run"

    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        if self == out:
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(arguments(out)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"bupo.run: {out}: Permission denied; fix that, or choose another path"


def test_missing_configuration_file(capsys: pytest.CaptureFixture[str], no_model: None) -> None:
    assert main(["--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "bupo.run: configuration file not found: nowhere.yaml\n"


def test_missing_training_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_model: None
) -> None:
    monkeypatch.setenv("BUPO_DATA", "nowhere")
    assert main(["--config", str(shipped("tiny_qwen3_deepmath.yaml"))]) == 2
    assert "data file not found: nowhere/deepmath-5k.parquet" in capsys.readouterr().err


def test_bad_reward_function_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", "reward.function=json:nothing")) == 2
    assert "reward.function=json:nothing cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_earlier_results_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(arguments(out)) == 2
    assert "continue it with resume=auto or choose another" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert [p.name for p in out.iterdir()] == ["metrics.jsonl"]


def test_dry_run_prints_the_plan_and_writes_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    assert main([*arguments(tmp_path / "run"), "--dry_run"]) == 0
    text = capsys.readouterr().err
    assert "steps 1-3 train layer 1 of 2, then the final policy to step 6" in text
    assert "4 prompts x 4 responses = 16" in text
    for more in ([], ["bupo.auto_layer=0.1"]):
        settings = [*arguments(tmp_path / "run"), "bupo.auto_stop=0.1", *more]
        assert main([*settings, "--dry_run"]) == 0
        assert "steps 1-3 (fewer if bupo.auto_stop ends them early)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_teaches_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert config.QUOTES in " ".join(text.split())
    for key in config.all_keys(config.Config):
        assert f"  {key} = " in text
    assert all(help_text for _, _, help_text in config.describe(config.Config))


@pytest.mark.parametrize("name", sorted(p.name for p in (REPOSITORY / "recipes").glob("*.yaml")))
def test_recipes_are_valid(name: str) -> None:
    loaded = config.load(shipped(name), [])
    assert Schedule(loaded).layers() == [loaded.bupo.layer]
    assert Schedule(config.load(shipped(name), ["algorithm=grpo"])).layers() == []


def test_configuration_survives_being_written(tmp_path: Path) -> None:
    loaded = config.load(
        shipped("arithmetic.yaml"), ["optimizer.betas=[0.9,0.95]", "loss.dual_clip=3"]
    )
    (tmp_path / "config.yaml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "config.yaml", []) == loaded


def test_grpo_trains_the_final_policy_only(tmp_path: Path) -> None:
    assert run_samples.run(tmp_path / "run", "algorithm=grpo", "steps=2", "eval.every=0") == 0
    metrics = run_samples.rows(tmp_path / "run" / "metrics.jsonl")
    assert [(m["phase"], m["layer"]) for m in metrics] == [("final", None)] * 2
    assert all(m["policy/entropy"] == m["final/entropy"] for m in metrics)


def test_a_layer_counts_to_L_and_with_the_norm_is_the_final_policy(tmp_path: Path) -> None:
    """pi^L with the final norm is the model: BuPO on it is GRPO, step for step."""
    same = ["steps=3", "bupo.steps=2", "eval.every=0", "eval.files=[]"]
    assert run_samples.run(tmp_path / "a", *same, "bupo.layer=2", "bupo.final_norm=true") == 0
    assert run_samples.run(tmp_path / "b", *same, "algorithm=grpo") == 0
    a, b = (run_samples.rows(tmp_path / name / "metrics.jsonl") for name in "ab")
    for mine, grpo in zip(a, b):
        assert mine["policy/loss"] == pytest.approx(grpo["policy/loss"], rel=1e-5)
        assert mine["policy/entropy"] == pytest.approx(grpo["policy/entropy"], rel=1e-5)
        assert mine["reward/mean"] == grpo["reward/mean"]


def test_the_console_command(tmp_path: Path) -> None:
    """Like `python -m`, it finds modules of the user in the current folder."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["bupo"].partition(":")
    (tmp_path / "mine.py").write_text("def score(responses, answers):\n    return [0]\n")
    program = [sys.executable, "-P", "-c", f"import sys, {module} as m; sys.exit(m.{function}())"]

    def bupo(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*program, *words], cwd=tmp_path, capture_output=True, text=True)

    done = bupo("run", "--dry_run", "reward.function=mine:score")
    assert done.returncode == 0 and "arithmetic" in done.stderr + done.stdout, done.stderr
    assert bupo("report", "nothing").returncode == 2
    assert "bupo analyze" in bupo().stdout and bupo("--help").returncode == 0
    wrong = bupo("train")
    assert wrong.returncode == 2 and "unknown command train; the commands are" in wrong.stderr
