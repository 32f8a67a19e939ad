"""nan and infinity: named, skipped, counted; then the end, with everything saved."""

import errno
import json
import math
import resource
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import run_samples
import torch
from rl_samples import random_rollouts, small_model
from run_samples import assert_same_run, rows

from bupo import config
from bupo.rl import checkpoint, state_files
from bupo.rl.loop import Run
from bupo.rl.optimise import Updates
from bupo.rl.update import Trainer
from bupo.run import main
from bupo.runlog import recorder as metrics
from bupo.runlog import run_directory
from bupo.samples import with_streams
from bupo.types import Policy, Rollout

BAD_CALLS: dict[int, float | None] = {}
"""Number of the call of `reward` to the value that its first rewards then have"""
BAD_REWARDS = 1
"""How many"""
RAISES_AT = 0
calls = 0
reported: list[Path] = []
"""Run directories that a report was written to"""


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
    """That of run_samples; evaluations are off, so call n is step n."""
    global calls
    calls += 1
    if calls == RAISES_AT:
        raise KeyError("a fault of the user's function")
    values: list[float | None] = [float(len(set(r)) + n % 3) for n, r in enumerate(responses)]
    if calls in BAD_CALLS:
        values[:BAD_REWARDS] = [BAD_CALLS[calls]] * BAD_REWARDS
    return values


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bupo.rl.loop.write_report", lambda out: reported.append(out))  # slow
    monkeypatch.setattr("test_bad_steps.calls", 0)
    monkeypatch.setattr("test_bad_steps.BAD_CALLS", {})
    monkeypatch.setattr("test_bad_steps.BAD_REWARDS", 1)
    monkeypatch.setattr("test_bad_steps.RAISES_AT", 0)


def run(out: Path, *more: str) -> int:
    settings = ["reward.function=test_bad_steps:reward", "eval.limit=1", "checkpoint.every=0"]
    settings += ["checkpoint.keep=[]"]
    return main(run_samples.arguments(out, *settings, "eval.every=0", *more))


def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bupo.rl.evaluator.Evaluator.after", lambda self, step: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        no_evaluation(patch)
        patch.setattr("bupo.rl.loop.write_report", lambda out: None)
        assert run(out, "checkpoint.every=2") == 0
    return out


@pytest.fixture
def trainer() -> Trainer:
    settings = config.load(None, ["optimizer.updates_per_step=2", "optimizer.lr=0.01"])
    return Trainer(small_model(), settings, 0)


def update(trainer: Trainer, rollouts: list[Rollout], layer: int | None = None) -> Updates:
    policy = Policy(layer)
    old = trainer.forward.token_stats(rollouts, policy).logprobs
    return trainer.update(with_streams(rollouts, "old", old), policy, 1)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_gradient_is_named_by_its_parameter(trainer: Trainer) -> None:
    """The first one in the model's order, before clipping spreads the nan to all of them."""
    named = dict(trainer.model.named_parameters())
    counts = {"model.layers.1.mlp.up_proj.weight": 2, "model.layers.2.self_attn.q_proj.weight": 1}
    for name, count in counts.items():

        def poison(gradient: torch.Tensor, count: int = count) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[:count] = math.nan
            return gradient

        named[name].register_hook(poison)
    before = weights(trainer)
    updates = update(trainer, random_rollouts())
    found = updates.metrics
    assert found["policy/skipped_updates"] == 2 and math.isnan(found["policy/loss"])
    what = "gradient of model.layers.1.mlp.up_proj.weight: 2 of 1536 values are not finite"
    assert updates.skipped == [f"update 1 of 2: {what}", f"update 2 of 2: {what}"]
    assert updates.changed == set()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    # Above the layer that is trained there is no gradient.
    assert update(trainer, random_rollouts(), layer=1).skipped == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["advantages", "old log-probs", "parameter"])
def test_a_loss_is_named_by_what_goes_into_it(trainer: Trainer, what: str, value: float) -> None:
    rollouts = random_rollouts()
    old = trainer.forward.token_stats(rollouts, Policy(None)).logprobs
    expected = what
    if what == "advantages":
        rollouts[0].stream("advantage")[0] = value
    elif what == "old log-probs":
        old[0][0] = math.nan  # an infinite ratio may be clipped
    else:
        expected = "parameter model.layers.2.mlp.down_proj.weight: 1 of 1536"
        dict(trainer.model.named_parameters())[expected.split()[1][:-1]].data.view(-1)[3] = value
    updates = trainer.update(with_streams(rollouts, "old", old), Policy(None), 1)
    skipped = len(updates.skipped)
    assert skipped == (2 if what == "parameter" else 1), "the other mini-batch is not held up"
    assert updates.skipped[0].startswith(f"update 1 of 2: {expected}"), updates.skipped


@pytest.mark.parametrize("advantage", ["grpo", "reinforce_pp", "ppo"])
def test_a_bad_reward_costs_its_response_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    advantage: str,
) -> None:
    """Every step has one, and no update is skipped."""
    no_evaluation(monkeypatch)
    BAD_CALLS.update({1: math.nan, 2: math.inf, 3: None, 4: -math.inf, 5: math.nan, 6: math.nan})
    assert run(tmp_path / "run", "max_bad_steps=1", f"advantage={advantage}") == 0
    found = rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for row in found:
        assert row["policy/skipped_updates"] == 0 and row["policy/grad_norm"] > 0
        assert row["reward/errors"] == 1
        assert row["reward/ungraded"] == row["response/dropped"] == 1 / 16
        assert row["reward/mean"] > 0 and row["reward/std"] > 0, "of those that have one"
    errors = capsys.readouterr().err
    assert (
        "step 2: 0 timeouts and 1 errors of the reward; 1 of 16 responses have no reward "
        "and are left out. The first failure: reward.function=test_bad_steps:reward returned inf"
    ) in errors
    kept = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000002.jsonl").open()]
    assert [row["reward"] is None for row in kept] == [True] + [False] * 15


def test_a_step_that_is_mostly_without_rewards_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, and nothing before it is lost; then the grader works again."""
    no_evaluation(monkeypatch)
    out = tmp_path / "run"
    BAD_CALLS[3] = math.nan
    monkeypatch.setattr("test_bad_steps.BAD_REWARDS", 9)
    assert run(out) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        "bupo.run: step 3: 9 of 16 responses cannot be graded (first failure: reward.function="
        f"test_bad_steps:reward returned nan); the state after step 2 is saved in {out}"
    )
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2]
    assert checkpoint.load_step(run_directory.checkpoints(out)[-1]) == 2
    BAD_CALLS.clear()
    assert run(out, "resume=auto") == 0
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_too_many_bad_steps_end_the_run_with_everything_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run was continued in between: the count is in metrics.jsonl."""
    no_evaluation(monkeypatch)
    out, original, bad = tmp_path / "run", Trainer.update, {2, 3, 4}

    def poisoned(self: Trainer, rollouts: Any, *arguments: Any) -> Any:
        if arguments[1] in bad:
            rollouts[0].stream("advantage")[0] = math.nan
        return original(self, rollouts, *arguments)

    monkeypatch.setattr(Trainer, "update", poisoned)
    assert run(out, "max_bad_steps=2") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "bupo.run: 2 steps in a row with nan or infinity (max_bad_steps), the last: step 3, update "
        "1 of 4: advantages: 1 of "
    )
    assert last.endswith(f"values are not finite; its state is saved in {out}")
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3]
    assert checkpoint.load_step(run_directory.checkpoints(out)[-1]) == 3
    assert out in reported
    assert run(out, "resume=auto", "max_bad_steps=3") == 1, "one more is the third"
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3, 4]
    bad.clear()
    assert run(out, "resume=auto") == 0
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_stage_that_raises_costs_no_step(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_evaluation(monkeypatch)
    monkeypatch.setattr("test_bad_steps.RAISES_AT", 5)
    out = tmp_path / "run"
    with pytest.raises(KeyError, match="a fault of the user's function"):
        run(out)
    assert checkpoint.load_step(run_directory.checkpoints(out)[-1]) == 4
    assert run(out, "resume=auto") == 0
    assert_same_run(whole, out)


def test_a_broken_update_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of an update is the state of no step."""
    no_evaluation(monkeypatch)
    original = Trainer.update

    def broken(self: Trainer, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if arguments[2] == 4:
            raise RuntimeError("in the middle")
        return found

    monkeypatch.setattr(Trainer, "update", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        run(tmp_path / "run", "checkpoint.every=2")
    assert checkpoint.load_step(run_directory.checkpoints(tmp_path / "run")[-1]) == 2


def test_a_model_that_is_not_finite_is_not_saved(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_evaluation(monkeypatch)
    original = Trainer.update

    def poisoned(self: Trainer, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if arguments[2] == 4:
            dict(self.model.named_parameters())["model.norm.weight"].data[1] = math.inf
        return found

    monkeypatch.setattr(Trainer, "update", poisoned)
    out = tmp_path / "run"
    assert run(out, "checkpoint.every=2") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 4 broke the model (model.norm.weight: 1 of 32 values are not" in last
    assert "the one of step 2 is kept" in last
    monkeypatch.undo()
    no_evaluation(monkeypatch)
    assert run(out, "checkpoint.every=2", "resume=auto") == 0
    assert_same_run(whole, out)


@pytest.fixture
def file_size_limit() -> Iterator[Any]:
    """Sets the largest file that this process may write: beyond it, as on a full disk, writes
    fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("thread", ["false", "true"])
def test_a_full_disk_loses_nothing(
    thread: str,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file_size_limit: Any,
) -> None:
    no_evaluation(monkeypatch)
    out, background = tmp_path / "run", f"checkpoint.in_background={thread}"
    original = checkpoint.Writer.save

    def full_at_four(writer: checkpoint.Writer, state: dict[str, int], *more: Any) -> None:
        if state["step"] == 4:
            file_size_limit(20_000)  # less than the model has, more than the other files
        original(writer, state, *more)

    monkeypatch.setattr(checkpoint.Writer, "save", full_at_four)
    assert run(out, "checkpoint.every=2", background) == 1
    file_size_limit(resource.RLIM_INFINITY)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("bupo.run: the checkpoint of step 4 cannot be written to "), last
    assert "File too large" in last and "without it); complete ones there: step_000002;" in last
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_000002"], "no leftovers"
    monkeypatch.setattr(checkpoint.Writer, "save", original)
    assert run(out, "checkpoint.every=2", background, "resume=auto") == 0
    assert_same_run(whole, out)


def test_a_failure_in_the_background_is_told_beside_another_error(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file_size_limit: Any,
) -> None:
    """The checkpoint of step 2 is still being written when step 3 fails."""
    no_evaluation(monkeypatch)
    original, may_write = state_files.write, threading.Event()

    def slow(*given: Any) -> None:
        may_write.wait()
        file_size_limit(20_000)  # less than the optimizer has
        original(*given)

    def broken(*_: Any) -> Any:
        if len(run_samples.rows(tmp_path / "run/metrics.jsonl")) == 2:
            may_write.set()
            raise ValueError("the model is tired")
        return update(*_)

    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", broken)
    monkeypatch.setattr(state_files, "write", slow)
    with pytest.raises(ValueError, match="the model is tired"):
        run(tmp_path / "run", "checkpoint.every=2", "checkpoint.in_background=true", "eval.every=0")
    file_size_limit(resource.RLIM_INFINITY)
    said = capsys.readouterr().err
    assert "the checkpoint of step 2 cannot be written to" in said and "File too large" in said


def test_an_error_between_stages_names_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several ranks, that is where some learn that another one has ended."""

    def broken(run: Run, step: int) -> bool:
        raise ValueError("the clock has stopped")

    no_evaluation(monkeypatch)
    monkeypatch.setattr(Run, "_checkpoint_is_due", broken)
    with pytest.raises(ValueError, match="the clock has stopped") as error:
        run(tmp_path / "run")
    assert error.value.__notes__[0] == "step 2, between stages"


def test_a_disk_that_is_full_when_a_row_is_written(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a line. The step is made again; nothing is there twice."""
    no_evaluation(monkeypatch)
    out = tmp_path / "run"
    original = metrics.append_rows

    def full(file: Path, new: Sequence[dict[str, Any]]) -> None:
        if new[0].get("step") == 4:
            with file.open("a") as lines:
                lines.write('{"step": 4, "pha')
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        original(file, new)

    monkeypatch.setattr(metrics, "append_rows", full)
    assert run(out, "checkpoint.every=2") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in last and last.endswith(
        f"up to the newest checkpoint in {out} is kept; continue with --out {out} resume=auto"
    )
    monkeypatch.setattr(metrics, "append_rows", original)
    assert run(out, "checkpoint.every=2", "resume=auto") == 0
    assert_same_run(whole, out)
