"""The command: its help, its errors (one line, before any model is loaded), its dry run."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import run_samples
import torch
from run_samples import arguments

from bupo import config
from bupo.config import shipped
from bupo.rl import checkpoint
from bupo.rl.rollouts import HFEngine
from bupo.rl.schedule import Schedule
from bupo.run import main

REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading or making weights fails the test; a model on the meta device has none."""
    import transformers

    original = transformers.AutoModelForCausalLM.from_config

    def refuse(*arguments: Any, **options: Any) -> Any:
        if torch.get_default_device().type == "meta" and not options:
            return original(*arguments)
        pytest.fail("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", refuse)


BAD = {
    "unknown key": (["rollout.sample=3"], "key rollout.sample; did you mean rollout.samples?"),
    "unknown group": (
        ["optimiser.lr=1"], "unknown key optimiser.lr; did you mean optimizer.lr?"
    ),
    "key as it was typed": (
        ["rolout.prompts=3"], "unknown key rolout.prompts; did you mean rollout.prompts?"
    ),
    "key in a group": (
        ["optimizer={lrr: 1}"], "unknown key optimizer.lrr; did you mean optimizer.lr?"
    ),
    "key without its group": (["gamma=1"], "unknown key gamma; did you mean critic.gamma?"),
    "cut by the shell": (
        ["data.columns={prompt:", "question}"],
        "in a shell, quote what has spaces or braces: 'data.columns={prompt: question}'",
    ),
    "clip": (["loss.clip_low=1.5"], "loss.clip_low must be at most 1"),
    "entropy": (["loss.entropy_coef=-0.1"], "loss.entropy_coef must be at least 0"),
    "long warm-up": (
        ["optimizer.warmup_steps=7"], "optimizer.warmup_steps (7) exceeds steps (6)"
    ),
    "nothing to evaluate on": (
        ["task=null", "model.path=a/b", "data.train=[x.jsonl]"],
        "eval.every=2, but there is nothing to evaluate on: set eval.files, or eval.every=0",
    ),
    "wrong type": (["steps=many"], "steps: Value 'many'"),
    "no assignment": (["steps"], "expected key=value, got 'steps'"),
    "algorithm": (["algorithm=bup"], "must be one of bupo, grpo, internal, custom, got 'bup'"),
    "group size": (["rollout.samples=1"], "rollout.samples must be at least 2"),
    "batch split": (
        ["rollout.prompts=6", "optimizer.updates_per_step=4"],
        "rollout.prompts (6) must be a multiple of optimizer.updates_per_step (4)",
    ),
    "too many prompts": (["rollout.prompts=100000"], "exceeds the number of training prompts"),
    "layer zero": (["bupo.layer=0"], "bupo.layer counts from 1, got 0"),
    "layer over L": (["bupo.layer=3"], "bupo.layer=3 is out of range"),
    "phase 1 too long": (["bupo.steps=6"], "bupo.steps (6) must be less than steps (6)"),
    "phases alone": (["phases=[{}]"], "phases and algorithm=custom need one another"),
    "custom without phases": (["algorithm=custom"], "phases and algorithm=custom need one another"),
    "phase key": (
        ["algorithm=custom", "phases=[{layr: 1}]"],
        "unknown key phases[].layr; did you mean phases[].layer?",
    ),
    "phase type": (["algorithm=custom", "phases=[{layer: x}]"], "layer: Value 'x'"),
    "phase layer over L": (
        ["algorithm=custom", "phases=[{layer: 1, steps: 1}, {layer: 3}]"],
        "phases[1].layer=3 is out of range",
    ),
    "boundary over L": (
        ["algorithm=custom", "phases=[{boundary: 3, lr_above: 0}]"],
        "phases[0].boundary=3 is out of range",
    ),
    "open phase first": (
        ["algorithm=custom", "phases=[{layer: 1}, {}]"], "only the last may leave out steps"
    ),
    "phases too short": (
        ["algorithm=custom", "phases=[{steps: 2}, {steps: 3}]"], "phases have 5 steps, steps=6"
    ),
    "phases too long": (
        ["algorithm=custom", "phases=[{steps: 6}, {}]"],
        "phases have 6 steps before the last, steps=6",
    ),
    "factor without boundary": (
        ["algorithm=custom", "phases=[{lr_above: 0}]"], "need phases[].boundary"
    ),
    "everything frozen": (
        ["algorithm=custom", "phases=[{boundary: 1, lr_above: 0, lr_below: 0}]"],
        "nothing would be trained",
    ),
    "policy frozen": (
        ["algorithm=custom", "phases=[{layer: 1, boundary: 1, lr_below: 0}]"],
        "lr_below=0 freezes all layers of the policy of layer 1",
    ),
    "kl in the reward": (
        ["loss.kl_estimator=k1_reward"], "loss.kl_estimator=k1_reward needs advantage=reinforce_pp"
    ),
    "refills alone": (
        ["rollout.refills=1", "rollout.samples=1", "advantage=reinforce_pp"],
        "rollout.refills needs rollout.samples of at least 2",
    ),
    "overlong buffer": (
        ["reward.overlong_buffer=13"], "reward.overlong_buffer (13) exceeds rollout.max_new_tokens"
    ),
    "critic": (["critic.gae_lambda=2"], "critic.gae_lambda must be in [0, 1]"),
    "missing template": (["data.chat_template=no.jinja"], "chat_template=no.jinja: file not found"),
    "weights": (["data.weights=[1,2]"], "data.weights has 2 values for 0 data.train"),
    "weight": (["data.weights=[0]"], "data.weights must be positive"),
    "column": (["data.columns={question: x}"], "data.columns' names must be one of prompt, answer"),
    "hub": (
        ["task=null", "model.path=a/b", "data.train=[owner/no-such]", "eval.every=0"],
        "from the Hugging Face hub, install the package datasets",
    ),
    "prompt too long": (["data.max_prompt_tokens=5"], "data.max_prompt_tokens=5 (longest 6)"),
    "task": (["task=bupo.tasks.nothing"], "task=bupo.tasks.nothing cannot be imported"),
    "task option": (["task_options={wide: 3}"], "unknown task_options: ['wide']"),
    "task option's type": (
        ["task_options.layers=two"], "task_options.layers must be of type int, got 'two'"
    ),
    "task option's truth": (
        ["task_options.layers=true"], "task_options.layers must be of type int, got True"
    ),
    "task option below 1": (["task_options.layers=-1"], "layers must be at least 1, got -1"),
    "task option 0": (["task_options.width=0"], "task_options.width must be at least 1, got 0"),
    "task option nan": (["task_options.warm_lr=.nan"], "warm_lr must be at least 0, got nan"),
    "task option's multiple": (
        ["task_options.width=12"], "task_options.width must be a multiple of 8, got 12"
    ),
    "all held out": (
        ["task_options.eval_problems=8100"], "must leave some of 8100 problems for training"
    ),
    "long name of out": (["out=" + 300 * "x"], "File name too long; change that, or name another"),
    "long name of template": (["data.chat_template=" + 300 * "x"], "File name too long"),
    "task is no task": (["task=os"], "task=os is not a task"),
    "task with data": (["data.train=[x.parquet]"], "data.train is set, but task="),
    "model": (["model.path=/nowhere/model"], "model.path=/nowhere/model: folder not found"),
    "model name": (["model.path=nobody/ no"], "model.path=nobody/ no: folder not found"),
    "model of a run": (
        ["model.path=runs/x/checkpoints/y"], "model.path=runs/x/checkpoints/y: folder not found"
    ),
    "context": (["rollout.max_new_tokens=1000000"], "does not fit the model's context of 256"),
    "out in a file": (["out=/dev/null/run"], "out=/dev/null/run: /dev/null is a file"),
    "out in proc": (["out=/proc/run"], "out=/proc/run: /proc cannot be written to"),
    "list not closed": (["steps=[1"], "cannot be read"),
    "a value for a group": (["optimizer=3"], "optimizer"),
    "no name": (["=3"], "expected key=value, got '=3'"),
    "not finite": (["optimizer.lr=inf"], "optimizer.lr must be finite, got inf"),
    "nan": (["loss.entropy_coef=nan"], "loss.entropy_coef must be finite, got nan"),
    "betas": (["optimizer.betas=[2,3]"], "optimizer.betas must be in [0, 1)"),
    "decay": (["optimizer.weight_decay=-1"], "optimizer.weight_decay must be at least 0"),
    "warm-up": (["optimizer.warmup_steps=-5"], "optimizer.warmup_steps must be at least 0"),
    "eval.limit": (["eval.limit=0"], "eval.limit must be positive"),
    "reward module": (["reward.function=nope:x"], "reward.function=nope:x cannot be loaded"),
    "reward signature": (["reward.function=math:sqrt"], "reward.function=math:sqrt must take"),
    "reward name": (["reward.function=maths"], "reward.function must be math, strict or module:"),
    "reward of a source": (
        ["reward.by_source={x: 'a'}"], "reward.by_source.x must be math, strict or module:function"
    ),
    "source without reward": (
        ["reward.by_source={other: strict}"],
        "no reward for data source addition (",
    ),
    "wandb": (["wandb=project"], "wandb=project needs the package wandb, which is not installed"),
    "watchdog": (["watchdog.seconds=-1"], "watchdog.seconds must be at least 0"),
    "bad steps": (["max_bad_steps=0"], "max_bad_steps must be positive"),
    "resume without out": (["resume=auto", "out=null"], "resume=auto needs out=DIR"),
    "temperature": (["rollout.temperature=0"], "rollout.temperature must be > 0"),
}  # fmt: skip


@pytest.fixture
def no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the optional packages."""
    find, absent = importlib.util.find_spec, ("wandb", "datasets")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name)
    )


@pytest.mark.usefixtures("no_extras")
@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_mistakes_give_one_line_before_a_model_is_loaded(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    overrides, message = BAD[case]
    out = tmp_path / "run"
    assert main(arguments(out, *overrides)) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert not out.exists()


@pytest.mark.parametrize(
    "text",
    ["- a\n- b\n", "steps: 1\nsteps: 2\n", "steps: [1\n", "# Title\n\ntext `x`: y\n", "\xff"],
)
def test_configuration_file_that_is_none(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="latin-1")
    assert main(["--config", str(file)]) == 2
    errors = capsys.readouterr().err
    assert len(errors.strip().splitlines()) == 1 and errors.startswith("bupo.run: "), errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollot: {top_p: 1}", "unknown key rollot; did you mean rollout?"),
        ("rollout: {topp: 1}", "unknown key rollout.topp; did you mean rollout.top_p?"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_an_unknown_key_of_a_file(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert main(["--config", str(file)]) == 2
    assert capsys.readouterr().err == f"bupo.run: {message}\n"


@pytest.mark.parametrize("advantage", config.ADVANTAGES)
def test_every_advantage_composes_with_both_phases(advantage: str, tmp_path: Path) -> None:
    settings = [f"advantage={advantage}", "steps=2", "bupo.steps=1", "loss.tis_cap=2"]
    settings += ["loss.aggregation=seq_sum_longest"] if advantage == "dr_grpo" else []
    assert main(arguments(tmp_path / "run", *settings)) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["phase"] for row in rows] == ["internal", "final"]
    assert all(row["policy/grad_norm"] > 0 and not row["policy/skipped_updates"] for row in rows)


def test_a_wrong_engine_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs of the sampled tokens that are not the trainer's, before any update uses them."""
    generate = HFEngine.generate

    def shifted(self: Any, *arguments: Any) -> Any:
        rollouts = generate(self, *arguments)
        for rollout in rollouts:
            rollout.logprobs = [x - 0.2 for x in rollout.logprobs]
        return rollouts

    monkeypatch.setattr(HFEngine, "generate", shifted)
    assert main(arguments(tmp_path / "run")) == 1
    errors = capsys.readouterr().err
    assert (
        "sync/logprob_gap: log-probs of sampled tokens differ from the trainer's by 0.2" in errors
    )
    assert "rollout.max_logprob_gap=0.1" in errors
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
    assert "holds a run with other settings (" in errors and change.split("=")[0][:8] in errors
    assert main(arguments(out, "steps=5", "bupo.steps=3", "resume=auto", change)) == 2
    for folder in (out / "checkpoints").iterdir():  # still refused: the numbers are kept
        shutil.rmtree(folder)
    assert main(arguments(out, "steps=6", "resume=auto", change)) == 2
    assert all(p.read_bytes() == x for p, x in before.items() if "checkpoints" not in str(p))


def test_resume_with_fewer_steps_than_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, same = tmp_path / "run", ("bupo.steps=1", "eval.limit=1", "resume=auto")
    assert main(arguments(out, "steps=3", *same)) == 0
    capsys.readouterr()
    assert main(arguments(out, "steps=2", *same)) == 2
    assert f"out={out} has done 3 steps, steps=2" in capsys.readouterr().err


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
    said = "steps: 2 -> 3 (of which optimizer.schedule=linear makes every step's learning rate)"
    assert (said in capsys.readouterr().err) == (status == 2)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    assert main(arguments(out, *TWO_STEPS)) == 0
    return out


TWO_STEPS = ["steps=2", "bupo.steps=1", "checkpoint.every=1", "eval.every=0", "advantage=ppo"]
STATE = "optimizer/state.safetensors"


@pytest.mark.parametrize(
    "file", ["trainer.json", STATE, "model.safetensors", "critic/critic.safetensors"]
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
    assert "remove that folder, and resume=auto goes on from the one before it" in last
    shutil.rmtree(newest)
    assert main(arguments(out, *TWO_STEPS, "resume=auto")) == 0


@pytest.mark.parametrize("text", ["[]", '{"step": 2}', '{"step": "2", "drawn": 0}'])
def test_a_checkpoint_without_its_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(text)
    with pytest.raises(config.ConfigError, match=r"damaged: trainer\.json does not tell step and"):
        checkpoint.load_state(tmp_path)


def test_a_setting_that_is_wrong_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"^no flash$"), checkpoint.reading(tmp_path):
        raise config.ConfigError("no flash")


@pytest.mark.parametrize("where", ["make_plan", "execute", "load_model"])
def test_ctrl_c_before_training(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"bupo.run.{where}", interrupt)
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
    assert last == f"bupo.run: {out}: Permission denied; change that, or name another place"


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
    for more in ([], ["bupo.auto_layer=true"]):
        settings = [*arguments(tmp_path / "run"), "bupo.auto_stop=0.1", *more]
        assert main([*settings, "--dry_run"]) == 0
        assert "steps 1-3 (fewer where bupo.auto_stop says so) train" in capsys.readouterr().err
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
