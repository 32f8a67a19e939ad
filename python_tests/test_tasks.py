"""Built-in tasks: the model directory that they make is what anybody's is, problems are graded
right, and none that is held out is trained on."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import run_samples
from transformers import AutoModelForCausalLM, GenerationConfig

from bupo import config
from bupo.commands.sources import cache_dir, find_sources
from bupo.config import ConfigError, RewardConfig
from bupo.rewards.choice import make_reward
from bupo.rewards.killable import KillableReward
from bupo.tasks import TaskFiles, arithmetic, countdown, modular, reasoning_gym, smollm2, tiny
from bupo.tasks.small_models import Problem

OPTIONS = {"layers": 2, "width": 32}


def test_the_configuration_names_the_architecture(tmp_path: Path) -> None:
    """As save_pretrained writes it; without it vLLM takes the model for one that embeds."""
    files = tiny.prepare(OPTIONS, tmp_path)
    tiny.build(OPTIONS, files.model)
    written = json.loads((files.model / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]
    ends = GenerationConfig.from_pretrained(files.model).eos_token_id
    assert ends == written["eos_token_id"]
    assert [path.name for path in tmp_path.iterdir()] == [files.model.name]


def test_a_build_that_was_cut_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny.prepare(OPTIONS, tmp_path)

    def cut(self: Path, target: Path) -> Path:
        if self.suffix == ".safetensors":
            raise KeyboardInterrupt
        return rename(self, target)

    rename = Path.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", cut)
        tiny.build(OPTIONS, files.model)
    assert not (files.model / "model.safetensors").exists()
    tiny.build(OPTIONS, files.model)
    assert AutoModelForCausalLM.from_pretrained(files.model).num_parameters() > 0


def rows(files: TaskFiles) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those for training, and those that are held out."""
    assert files.train and files.eval
    train, held_out = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (files.train[0], files.eval[0])
    )
    return train, held_out


@pytest.mark.parametrize("task", [arithmetic, countdown, modular, smollm2])
def test_nothing_that_is_held_out_is_trained_on(task: Any, tmp_path: Path) -> None:
    train, held_out = rows(task.prepare({"eval_problems": 20}, tmp_path))
    prompts = [[str(row["prompt"]) for row in part] for part in (train, held_out)]
    assert not set(prompts[0]) & set(prompts[1]) and len(prompts[1]) >= 20
    other, _ = rows(task.prepare({"eval_problems": 20, "seed": 1}, tmp_path))
    assert other != train


@pytest.mark.parametrize(("task", "share"), [(arithmetic, 0.5), (countdown, 0.35), (modular, 0.5)])
def test_demonstrations_are_right_sometimes(task: Any, share: float) -> None:
    """The warm start leaves something to learn, and what is right gets its reward."""
    problems, _ = task.TASK.problems(task.DEFAULTS)
    rng = random.Random(0)
    written = [task.TASK.demonstration(one, rng) for one in problems[:1000]]
    rewards = task.reward(written, [one.answer for one in problems])
    assert sum(rewards) / 1000 == pytest.approx(share, abs=0.06)
    assert {symbol for text in written for symbol in text} <= set(task.TASK.symbols)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("8+3=11-5=6-2=4#", True),
        ("3-2=1-5=-4+8=4#", True),
        ("5+8=13-2=11+3=14;8+3=11-2=9-5=4#", True),
        ("8+3=11-5=6-2=4", False),  # not ended
        ("8+3=11-5=6-2=4#4", False),
        ("8+3=11-5=6-2=4#;#", False),
        ("8+3=11-5=6-2=4;5+8=13-2=11+3=14#", False),  # the last attempt counts
        ("8-4=4#", False),  # not these numbers
        ("8+3=11-5=6-2=4-0=4#", False),
        ("8+5=13-3=9-2=4#", False),  # worked out wrong
        ("-2+3=1-5=-4+8=4#", False),
        ("4=4#", False),
        ("#", False),
    ],
)
def test_countdown_asks_for_a_last_attempt_that_is_right(response: str, right: bool) -> None:
    assert countdown.reward([response], ["2,3,5,8>4="]) == [right]


def test_a_task_that_has_changed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = modular.prepare({}, tmp_path)
    assert modular.prepare({}, tmp_path) == before
    monkeypatch.setattr(modular, "NOISE", 0)
    assert modular.prepare({}, tmp_path) != before


def test_steps_modulo_11_follow_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modular, "NOISE", 0)
    written = modular.TASK.demonstration(Problem("3*9+5-8=", "2", ""), random.Random(0))
    assert written == "3*9=5;5+5=10;10-8=2#2"
    _, held_out = modular.TASK.problems(modular.DEFAULTS)
    operands: dict[str, set[int]] = {}
    for one in held_out:
        signs = one.prompt.translate(dict.fromkeys(map(ord, "0123456789=")))
        operands.setdefault(one.source, set()).add(len(signs) + 1)
    assert operands == {"modular": {3, 4}, "modular_longer": {5, 6}}
    with pytest.raises(ConfigError, match="eval_problems must be at most 8000 of each kind"):
        modular.prepare({"eval_problems": 9000}, Path())


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_small_task_is_trained(family: str, tmp_path: Path) -> None:
    options = f"{{family: {family}, layers: 2, width: 32, warm_steps: 2, eval_problems: 4}}"
    done = run_samples.run(
        tmp_path / "run", "task=bupo.tasks.countdown", f"task_options={options}", "steps=2",
        "bupo.steps=1", "reward.function=null",
    )  # fmt: skip
    assert done == 0 and len(run_samples.rows(tmp_path / "run/metrics.jsonl")) == 2
    (folder,) = cache_dir().glob(f"countdown-{family}-2-32-2-*")
    made = json.loads((folder / "model/config.json").read_text())
    assert made["model_type"] == family
    with pytest.raises(ConfigError, match="family must be qwen3 or llama, got gpt"):
        countdown.prepare({"family": "gpt"}, tmp_path)


@pytest.mark.parametrize(
    ("task", "given", "used"),
    [
        ("countdown", None, "bupo.tasks.countdown:reward"),
        ("countdown", "strict", "strict"),
        ("tiny", None, None),
    ],
)
def test_a_task_brings_its_reward(task: str, given: str | None, used: str | None) -> None:
    settings = [f"task=bupo.tasks.{task}", "eval.every=0"]
    settings += [f"reward.function={given}"] if given else []
    loaded = config.load(None, settings)
    assert find_sources(loaded).reward.function == used
    assert loaded.reward.function == given, "another task later has its own"


# ---- reasoning-gym -----------------------------------------------------------------------------


KINDS = {"chain_sum": {"weight": 3, "max_terms": 3}, "spell_backward": {}}


def problems_of_gym(cache: Path, **options: Any) -> tuple[Any, Any]:
    return rows(reasoning_gym.prepare({"tasks": KINDS, "eval_problems": 40} | options, cache))


def test_kinds_of_reasoning_gym_are_mixed_by_weight(tmp_path: Path) -> None:
    train, held_out = problems_of_gym(tmp_path, train_problems=400, system_prompt="Think.")
    sources = [row["data_source"] for row in train]
    assert abs(sources.count("chain_sum") - 300) < 10 and abs(len(sources) - 400) < 20
    assert [row["data_source"] for row in held_out] == ["chain_sum"] * 40 + ["spell_backward"] * 40
    assert train[0]["prompt"][0] == {"role": "system", "content": "Think."}


def test_seeds_of_reasoning_gym_share_no_problem(tmp_path: Path) -> None:
    """In the package, problem i of seed 1 is problem i + 1 of seed 0."""
    asked: list[set[str]] = []
    for seed in (0, 1):
        for part in problems_of_gym(tmp_path, seed=seed, tasks={"chain_sum": {"min_digits": 4}}):
            asked.append({row["prompt"][0]["content"] for row in part})
    assert [len(some) for some in asked] == [1000, 40] * 2 and len(set.union(*asked)) == 2080
    few = {"chain_sum": {"max_terms": 2, "max_digits": 1}}  # 200 problems at most
    train, held_out = problems_of_gym(tmp_path, tasks=few)
    known = {str(row["prompt"]) for row in held_out}
    assert train and not known & {str(row["prompt"]) for row in train}


def test_only_full_credit_counts(tmp_path: Path) -> None:
    """The package gives 0.1 and more to any text that contains the answer."""
    _, held_out = problems_of_gym(tmp_path)
    reward = make_reward(RewardConfig(function="bupo.tasks.reasoning_gym:reward"))
    assert isinstance(reward, KillableReward)
    try:
        for row in (held_out[0], held_out[-1]):
            answer = json.loads(row["answer"])["entry"]["answer"]
            ways = [f"<answer> {answer} </answer>.", f"\\boxed{{{answer}}}", f"So:\n{answer}"]
            wrong = [f"{answer}1", f"<answer>It is {answer}</answer>", "", "<answer>nan</answer>"]
            grades = reward.grade([(text, row["answer"]) for text in ways + wrong])
            assert grades.rewards == [1, 1, 1, 0, 0, 0, 0] and grades.errors == 0
    finally:
        reward.close()
    for text in ("It is 1,024.", "<answer>1,024</answer>", "1,024\nHope this helps!"):
        assert reasoning_gym.extract(text) == "1024"
    assert reasoning_gym.extract("Let me see.\nolleh") == "olleh"
    assert reasoning_gym.extract("<answer>a</answer><answer>b</answer> <answer>") == "b"


@pytest.mark.parametrize(
    ("kind", "wrong"), [("prime_factorization", "done"), ("complex_arithmetic", "nan")]
)
def test_what_a_grader_does_not_expect_is_wrong(kind: str, wrong: str) -> None:
    """The one raises an error for words, the other gives full credit to nan."""
    (entry,) = reasoning_gym._entries(kind, {}, 0, 1)
    answer = json.dumps({"kind": kind, "options": {}, "entry": entry})
    responses = [f"<answer>{text}</answer>" for text in (entry["answer"], wrong)]
    assert reasoning_gym.reward(responses, [answer] * 2) == [1, 0]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"n_queens": {}}, "n_queens is refused: its grading evaluates the response as Python"),
        ({"countdown": {}}, "countdown is refused: its grading evaluates"),
        ({"rubiks_cube": {}}, "rubiks_cube is refused: its own answer 'None' does not get full"),
        ({"coin_flip": {}}, "coin_flip is refused: it gives full credit to the answer '0'"),
        ({"game_of_life_halting": {}}, "full credit to the answer .* where 'False' is right"),
        ({"gcd": None}, "expected options for gcd, such as .*, got None"),
        ({"gcd": {"weight": "a"}}, "expected options for gcd"),
        ({"chain": {}}, "chain with {} is refused: .*; the kinds are ab, acre"),
        ({"gcd": {"min_value": -1}}, "gcd with {'min_value': -1} is refused"),
        ({"gcd": {"weight": 0}}, "a weight above 0, got"),
        ({}, "must name at least one kind"),
    ],
)
def test_kinds_that_cannot_be_used_are_named(
    tasks: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        reasoning_gym.prepare({"tasks": tasks}, tmp_path)
    assert not list(tmp_path.iterdir())
