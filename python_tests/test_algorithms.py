"""Every algorithm in the real program, in both phases: what it logs, what it moves, resuming it."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from run_samples import assert_same_run, rows, run, state
from safetensors.torch import load_file, save_file

from bupo.rl import checkpoint
from bupo.runlog import run_directory

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ["steps=3", "bupo.steps=1", "eval.every=0", "eval.samples=1", "eval.pass_k=[1]"]
SHORT += ["checkpoint.every=1", "checkpoint.keep_last=9", "optimizer.updates_per_step=2"]
SHORT += ["data.limit=null"]
ALGORITHMS = {
    "gspo-k2": [
        "loss.type=gspo", "loss.aggregation=seq_mean", "loss.kl_coef=0.1", "loss.kl_estimator=k2",
        "model.compute_dtype=bfloat16", "model.gradient_checkpointing=true",
    ],
    "gmpo": ["loss.type=gmpo", "loss.clip_low=0.02", "loss.clip_high=0.02"],
    "sapo": ["loss.type=sapo", "loss.kl_coef=0.1"],
    "cispo-k3-entropy": ["loss.type=cispo", "loss.kl_coef=0.1", "loss.entropy_coef=0.01"],
    "dapo": [
        "rollout.refills=2", "reward.overlong_buffer=6", "loss.clip_high=0.28",
        "reward.function=run_samples:often_flat",
    ],
    "filters": [  # with more responses than phase 1 evaluates the final policy on for metrics
        "loss.drop_truncated=true", "loss.max_sequence_gap=1", "rollout.prompts=16",
    ],
    "ppo-gspo-k1": [
        "advantage=ppo", "loss.type=gspo", "loss.kl_coef=0.1", "loss.kl_estimator=k1_reward",
        "critic.gae_lambda=0.9", "critic.gamma=0.99",
        "model.compute_dtype=bfloat16", "model.gradient_checkpointing=true",
    ],
    "reinforce_pp-k1": [
        "advantage=reinforce_pp", "loss.kl_coef=0.1", "loss.kl_estimator=k1_reward",
        "rollout.samples=1", "rollout.prompts=8",
    ],
}  # fmt: skip


def models(out: Path) -> list[dict[str, torch.Tensor]]:
    """Parameters after each step, from first to last."""
    return [load_file(folder / "model.safetensors") for folder in run_directory.checkpoints(out)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_in_both_phases(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(out, *SHORT, *ALGORITHMS[name]) == 0
    metrics = rows(out / "metrics.jsonl")
    assert [m["phase"] for m in metrics] == ["internal", "final", "final"]
    for row in metrics:
        numbers: dict[str, Any] = {k: v for k, v in row.items() if k not in ("phase", "layer")}
        assert all(v is not None and math.isfinite(v) for v in numbers.values()), numbers
        assert row["policy/skipped_updates"] == 0 and numbers["policy/grad_norm"] > 0
    first, second, third = models(out)
    start = load_file(start_of_runs())
    for key in first:
        above = ".layers.1." in key or key == "model.norm.weight"
        assert torch.equal(first[key], start[key]) == above, f"phase 1: {key}"
        assert not torch.equal(first[key], second[key]), f"phase 2: {key}"
        assert not torch.equal(second[key], third[key]), f"phase 2: {key}"


def start_of_runs() -> Path:
    """The task's model."""
    cache = Path(os.environ["BUPO_CACHE"])
    (file,) = cache.glob("arithmetic-qwen3-2-32-4-*-4-0-*/model/model.safetensors")
    return file


KL = ["loss.kl_coef=0.5", "loss.kl_estimator=k2", "checkpoint.every=0"]


def test_a_kl_term_is_against_the_start_also_when_resumed(tmp_path: Path) -> None:
    """Exactly 0 at the first step: reference and policy are the same pi^l."""
    assert run(tmp_path / "whole", *SHORT, *KL) == 0
    kl = [float(str(m["policy/kl"])) for m in rows(tmp_path / "whole/metrics.jsonl")]
    assert kl[0] == 0 and kl[1] > 1e-7 and kl[2] > 1e-7
    out = tmp_path / "stopped"  # in the evaluation at the switch
    assert run(out, *SHORT, *KL, stop=3) == 128 + signal.SIGTERM
    assert run(out, *SHORT, *KL, "resume=auto") == 0
    assert_same_run(tmp_path / "whole", out)


def test_no_reference_without_a_kl_term(tmp_path: Path) -> None:
    assert run(tmp_path / "run", *SHORT, "steps=2") == 0
    assert not (tmp_path / "run/reference.sha256").exists()
    assert all("policy/kl" not in m for m in rows(tmp_path / "run/metrics.jsonl"))


def test_another_model_where_the_reference_was_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(out, *SHORT, *KL, stop=4) == 128 + signal.SIGTERM
    file = start_of_runs()
    before = file.read_bytes()
    other = load_file(file)
    other["model.norm.weight"][0] += 1e-6
    try:
        save_file(other, file, {"format": "pt"})
        assert run(out, *SHORT, *KL, "resume=auto") == 2
    finally:
        file.write_bytes(before)
    assert "no longer holds the weights that the run started with" in capsys.readouterr().err
    assert run(out, *SHORT, *KL, "resume=auto") == 0


REFILLS = ["rollout.refills=2", "reward.function=run_samples:often_flat", "steps=4"]


def test_dynamic_sampling_resumes_at_the_next_prompts(tmp_path: Path) -> None:
    """Which prompts a step takes depends on how many refills there were before."""
    settings = [*SHORT, *REFILLS, "checkpoint.every=0"]
    assert run(tmp_path / "whole", *settings) == 0
    metrics = rows(tmp_path / "whole/metrics.jsonl")
    assert all(m["groups/drawn"] >= 4 for m in metrics)  # type: ignore[operator]
    assert sum(m["groups/discarded"] > 0 for m in metrics) > 1  # type: ignore[operator]
    asked = [
        {row["prompt"] for row in rows(file)}
        for file in sorted((tmp_path / "whole/rollouts").iterdir())
    ]
    assert all(not asked[n] & asked[n + 1] for n in range(3))
    out = tmp_path / "stopped"  # within a step
    assert run(out, *settings, stop=7) == 128 + signal.SIGTERM
    assert checkpoint.load_state(run_directory.checkpoints(out)[-1])["drawn"] > 0
    assert run(out, *settings, "resume=auto") == 0
    assert_same_run(tmp_path / "whole", out)


def test_the_filter_of_truncated_responses_is_at_work(tmp_path: Path) -> None:
    shares = []
    for name, settings in (("a", ["loss.drop_truncated=true"]), ("b", [])):
        assert run(tmp_path / name, *SHORT, "steps=2", "rollout.max_new_tokens=9", *settings) == 0
        row = rows(tmp_path / name / "metrics.jsonl")[0]
        shares.append((row["response/dropped"], row["response/truncated"], row["policy/loss"]))
    assert shares[0][0] == shares[0][1] == shares[1][1] and 0 < float(str(shares[0][1])) < 1
    assert shares[1][0] == 0 and shares[0][2] != shares[1][2]


PPO = ["advantage=ppo", "critic.lr=1e-3", "checkpoint.every=0"]


def test_ppo_resumes_with_its_critic(tmp_path: Path) -> None:
    """Before its first update, and after the switch."""
    assert run(tmp_path / "whole", *SHORT, *PPO) == 0
    first, *_, last = rows(tmp_path / "whole/metrics.jsonl")
    assert float(str(first["critic/loss"])) > 0 == first["critic/skipped_updates"]
    assert first["critic/explained_variance"] == 0, "V = 0 explains nothing"
    assert last["critic/explained_variance"] != 0
    for stop in (2, 4):  # rewards: evaluation, step 1, evaluation at the switch, step 2, 3
        out = tmp_path / str(stop)
        assert run(out, *SHORT, *PPO, stop=stop) == 128 + signal.SIGTERM
        assert run(out, *SHORT, *PPO, "resume=auto") == 0
        assert_same_run(tmp_path / "whole", out)
        assert any(name.startswith("critic/") for name in state(out))


def test_the_critic_does_not_know_the_phase(tmp_path: Path) -> None:
    """After one step it is the same, whichever policy that step has trained."""
    for name, algorithm in (("a", "internal"), ("b", "grpo")):
        assert run(tmp_path / name, *SHORT, *PPO, "steps=1", f"algorithm={algorithm}") == 0
    of_critic = [
        {name: x for name, x in state(tmp_path / run).items() if name.startswith("critic/")}
        for run in ("a", "b")
    ]
    assert of_critic[0] and of_critic[0] == of_critic[1]


EFFECTIVE = {
    "token costs": (
        ["advantage=reinforce_pp", "loss.kl_estimator=k1_reward", "loss.kl_coef=0.01"],
        "loss.kl_coef=9",
    ),
    "gamma": (["advantage=ppo"], "critic.gamma=0.5"),
    "gae_lambda": (["advantage=ppo", "critic.lr=1e-2", "critic.clip=9"], "critic.gae_lambda=0.1"),
    "length": ([], "reward.overlong_buffer=8"),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_settings_of_advantages_reach_them(name: str, tmp_path: Path) -> None:
    """At the first step, or at the second if they need a policy or critic that has moved."""
    base, setting = EFFECTIVE[name]
    seen = []
    for folder, settings in (("a", base), ("b", [*base, setting])):
        assert run(tmp_path / folder, *SHORT, "steps=2", *settings) == 0
        seen.append([row["policy/grad_norm"] for row in rows(tmp_path / folder / "metrics.jsonl")])
    assert seen[0] != seen[1]
