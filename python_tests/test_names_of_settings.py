"""Algorithms by name, names of other trainers, and short forms: what a user types is understood."""

from pathlib import Path

import pytest

from bupo import config
from bupo.config import MAY_CHANGE, AnalysisConfig, Config, ConfigError
from bupo.config.objective import ALGORITHMS
from bupo.config.other_names import INSTEAD, OTHER_NAMES


def given(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


CUSTOM = ["phases=[{}]"]
STANDS_FOR = {
    "bupo": ["policy=bupo"],
    "internal": ["policy=internal"],
    "custom": ["policy=custom"],
    "grpo": ["policy=final"],
    "dr_grpo": ["policy=final", "advantage=dr_grpo", "loss.aggregation=seq_sum_longest"],
    "rloo": ["policy=final", "advantage=rloo"],
    "reinforce_pp": ["policy=final", "advantage=reinforce_pp"],
    "reinforce_pp_baseline": ["policy=final", "advantage=reinforce_pp_baseline"],
    "ppo": ["policy=final", "advantage=ppo"],
    "gspo": ["policy=final", "loss.type=gspo", "loss.clip_low=3e-4", "loss.clip_high=4e-4"],
    "gmpo": [
        "policy=final",
        "loss.type=gmpo",
        "loss.clip_low=0.4",
        "loss.clip_high=0.4",
        "loss.aggregation=seq_mean",
    ],
    "sapo": ["policy=final", "loss.type=sapo", "loss.aggregation=seq_mean"],
    "cispo": ["policy=final", "loss.type=cispo", "loss.clip_high=4"],
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_stands_for_settings(name: str, tmp_path: Path) -> None:
    phases = CUSTOM if name == "custom" else []
    expected = config.load(None, [*STANDS_FOR[name], *phases])
    assert config.load(None, [f"algorithm={name}", *phases]) == expected
    assert config.load(given(tmp_path, f"algorithm: {name}\n"), phases) == expected
    assert expected.algorithm == name, "so the run directory is named by what was typed"


def test_what_is_given_wins_in_any_order(tmp_path: Path) -> None:
    for typed in (["advantage=rloo", "algorithm=bupo"], ["algorithm=bupo", "advantage=rloo"]):
        assert (c := config.load(None, typed)).policy == "bupo" and c.advantage == "rloo"
    for typed in (
        ["loss={clip_low: 0.1}", "algorithm=gspo"],
        ["algorithm=gspo", "loss.clip_low=0.1"],
    ):
        assert (c := config.load(None, typed)).loss.clip_low == 0.1 and c.loss.clip_high == 4e-4
    file = given(tmp_path, "loss: {aggregation: seq_sum}\nalgorithm: dr_grpo\n")
    assert config.load(file, []).loss.aggregation == "seq_sum"


def test_a_command_line_wins_over_a_file(tmp_path: Path) -> None:
    file = given(tmp_path, "algorithm: dr_grpo\nrollout: {samples: 4}\n")
    rloo = config.load(file, ["algorithm=rloo"])
    assert rloo == config.load(None, [*STANDS_FOR["rloo"], "rollout.samples=4"]), "nothing is left"
    assert config.load(file, ["policy=bupo"]).policy == "bupo"
    file = given(tmp_path, "policy: bupo\nloss: {clip_low: 0.2, clip_high: 0.28}\n")
    gspo = config.load(file, ["algorithm=gspo"])
    assert gspo == config.load(None, STANDS_FOR["gspo"])
    assert config.load(file, ["algorithm=gspo", "algorithm=grpo"]).loss.clip_high == 0.28
    for name in ("gspo", "cispo"):
        file = given(tmp_path, f"loss: {{type: {name}}}\nadvantage: rloo\n")
        assert (c := config.load(file, ["algorithm=ppo"])).advantage == "ppo"
        assert c.loss.type == "ppo", "the file's loss is replaced as well"
        assert config.load(file, [f"algorithm={name}"]).advantage == "grpo"


@pytest.mark.parametrize("name", ["bupo", "grpo", "internal"])
def test_the_settings_of_earlier_runs(name: str, tmp_path: Path) -> None:
    """Their config.yaml has `algorithm`, and every other key besides."""
    policy = {"grpo": "final"}.get(name, name)
    now = Config(policy=policy, advantage="rloo", model=config.ModelConfig(path="a/b"))
    text = config.dump(now)
    assert f"policy: {policy}\n" in text and "algorithm" not in text
    file = given(tmp_path, text.replace(f"policy: {policy}\n", f"algorithm: {name}\n"))
    assert config.load(file, []) == now and config.changes_since(file, now, MAY_CHANGE) == []
    other = config.load(file, ["policy=" + ("final" if policy != "final" else "bupo")])
    assert [c.split(":")[0] for c in config.changes_since(file, other, MAY_CHANGE)] == ["policy"]


def message(*typed: str, schema: type = Config, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        config.read(file, list(typed), schema)
    return str(error.value)


def test_contradictions_of_an_algorithm(tmp_path: Path) -> None:
    expected = "algorithm=gspo means policy=final, but policy=bupo is given as well"
    assert expected in message("policy=bupo", "algorithm=gspo")
    assert expected in message(file=given(tmp_path, "policy: bupo\nalgorithm: gspo\n"))
    known = ", ".join(ALGORITHMS)
    assert message("algorithm=a2c") == f"algorithm must be one of {known}, got 'a2c'"
    assert "unknown key algorithm" in message("algorithm=grpo", schema=AnalysisConfig)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("num_generations=8", "unknown key num_generations; bupo calls it rollout.samples"),
        ("actor.clip_ratio_high=0.3", "key actor.clip_ratio_high; bupo calls it loss.clip_high"),
        ("actor_rollout_ref.actor.optim.lr=1", "optim.lr; bupo calls it optimizer.lr"),
        ("rollout.n=8", "unknown key rollout.n; bupo calls it rollout.samples"),
        ("epsilon=0.2", "bupo calls it loss.clip_low and loss.clip_high"),
        ("algorithm.adv_estimator=gae", "key algorithm.adv_estimator; bupo calls it advantage"),
        ("lora.r=8", "unknown key lora.r; bupo calls it lora.rank"),
        ("use_peft=true", "unknown key use_peft; lora.rank=16 trains LoRA adapters"),
        ("critic.optim.lr=1", "unknown key critic.optim.lr; bupo calls it critic.lr"),
        ("actor.optim.lr=1", "unknown key actor.optim.lr; bupo calls it optimizer.lr"),
        ("optimizer.beta=0.9", "unknown key optimizer.beta; bupo calls it optimizer.betas"),
        ("optimizer.epsilon=0", "unknown key optimizer.epsilon; AdamW's epsilon is always 1e-8"),
        ("loss_type=cispo", "bupo calls it loss.aggregation and loss.type"),
        ("report_to=wandb", "wandb=PROJECT also sends everything to W&B"),
        ("trainer={total_epochs: 3}", "unknown key trainer.total_epochs; bupo counts steps"),
        ("rollout.tensor_model_parallel_size=2", "calls it rollout.vllm={tensor_parallel_size: N}"),
    ],
)  # fmt: skip
def test_names_of_other_trainers(typed: str, expected: str) -> None:
    assert expected in message(typed)


def test_a_file_of_another_trainer(tmp_path: Path) -> None:
    file = given(tmp_path, "actor_rollout_ref: {model: {x: 1}, actor: {ppo_micro_batch_size: 8}}\n")
    start = (
        "unknown key actor_rollout_ref.actor.ppo_micro_batch_size; rollout.prompts and optimizer."
    )
    assert message(file=file).startswith(start)


def test_other_names_point_to_keys_that_exist() -> None:
    keys = set(config.all_keys(Config))
    for ours in OTHER_NAMES:
        assert {part.partition("=")[0] for part in ours.split(" and ")} <= keys, ours
    names = " ".join([*OTHER_NAMES.values(), *INSTEAD.values()]).split()
    assert len(names) == len(set(names)) and not set(names) & keys
    for name in ("learning_rate", "num_train_epochs"):  # of an optimizer, which it does not have
        assert message(f"{name}=1", schema=AnalysisConfig) == f"unknown key {name}"


def test_short_forms(tmp_path: Path) -> None:
    full = ["model.path=a/b", "model.compute_dtype=bfloat16", "data.train=[x]", "eval.files=[y]"]
    short = ["model=a/b", "model.compute_dtype=bf16", "data.train=x", "eval.files=y"]
    assert config.load(None, short) == config.load(None, full)
    text = "model: a/b\ndata: {train: x}\neval: {files: y}\n"
    assert config.load(given(tmp_path, text), ["model.compute_dtype=bf16"]) == config.load(
        None, full
    )
    assert config.load(None, ["model.compute_dtype=fp32"]) == Config()
    text = "data: {train: [x]}\neval: {files: '${data.train}'}\n"
    assert config.load(given(tmp_path, text), []).eval.files == ["x"], "a reference to a list"
    assert config.read(None, ["model=a/b"], AnalysisConfig).model.path == "a/b"
