"""What a run hands to whom: a policy in another's place would be silent."""

import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest
import run_samples
import torch
from run_samples import rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from bupo import progress
from bupo.commands.models import check_deterministic
from bupo.commands.training import _model_to_train
from bupo.config import RewardConfig, load
from bupo.rewards.choice import make_reward
from bupo.rl import state_files
from bupo.rl.forward import Forward
from bupo.rl.optimizer import AdamW
from bupo.rl.update import Trainer
from bupo.rl.weight_sync import GapLimit, SyncError, WeightSync
from bupo.rollouts.vllm import VllmEngine
from bupo.runlog.watchdog import Watchdog
from bupo.types import Policy, Rollout

SHORT = ("steps=2", "bupo.steps=1", "eval.every=0", "diagnostics.every=0")


def test_corrections_are_of_the_final_policy_in_both_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hf engine samples from the final policy itself, so its log-probs are the right ones."""
    import bupo.rl.streams as streams

    seen: dict[str, list[float]] = {"drop": [], "with_importance_weights": []}

    def spied(name: str) -> Any:
        right = getattr(streams, name)

        def spy(rollouts: Sequence[Rollout], *more: Any) -> Any:
            gaps = [float((r.stream("final") - r.stream("engine")).abs().max()) for r in rollouts]
            seen[name].append(max(gaps))
            return right(rollouts, *more)

        return spy

    for name in seen:
        monkeypatch.setattr(streams, name, spied(name))
    settings = ("loss.tis_cap=2", "loss.max_sequence_gap=1")
    assert run_samples.run(tmp_path / "run", *SHORT, *settings) == 0
    assert [len(x) for x in seen.values()] == [2, 2]
    assert max(map(max, seen.values())) < 1e-4, seen
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        assert row["response/dropped"] == 0


def test_each_entropy_is_of_its_own_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[tuple[int, int | None], float] = {}
    right, step = Forward.token_stats, 0

    def spy(self: Forward, rollouts: Any, policy: Policy, temperature: Any = None) -> Any:
        stats = right(self, rollouts, policy, temperature)
        if temperature is None:
            found[step, policy.layer] = stats.mean_entropy()
        return stats

    update = Trainer.update

    def next_step(self: Trainer, *args: Any, **more: Any) -> Any:
        nonlocal step
        step += 1
        return update(self, *args, **more)

    monkeypatch.setattr(Forward, "token_stats", spy)
    monkeypatch.setattr(Trainer, "update", next_step)
    assert run_samples.run(tmp_path / "run", *SHORT) == 0
    first, second = rows(tmp_path / "run" / "metrics.jsonl")
    assert (first["policy/entropy"], first["final/entropy"]) == (found[0, 1], found[0, None])
    assert first["policy/entropy"] != first["final/entropy"]
    assert second["policy/entropy"] == second["final/entropy"] == found[1, None]


@pytest.mark.parametrize(("algorithm", "layers"), [("bupo", [1]), ("grpo", 2)])
def test_the_model_is_checked_before_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, layers: object
) -> None:
    """That pi^l is really H^l of this family, and the last layer the model."""
    asked: list[object] = []

    def refuse(model: Any, which: object) -> None:
        asked.append(which)
        raise RuntimeError("this family is served wrongly")

    monkeypatch.setattr("bupo.policy.check_internal_policy", refuse)
    with pytest.raises(RuntimeError, match="served wrongly"):
        run_samples.run(tmp_path / "run", f"algorithm={algorithm}", *SHORT)
    assert asked == [layers] and not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen3", "bloom", "gpt_neox-parallel"])
def test_nothing_is_dropped_out_in_training(family: str, tmp_path: Path) -> None:
    """Rollout and update must be the same policy, whatever the model's configuration says."""
    torch.manual_seed(0)
    model = families.build(family)
    for name in list(vars(model.config)):
        if "drop" in name and isinstance(getattr(model.config, name), float):
            setattr(model.config, name, 0.5)
    model.save_pretrained(tmp_path)
    config = load(None, [f"model.path={tmp_path}", "model.attn_implementation=eager"])
    found = _model_to_train(config, str(tmp_path))
    ids = torch.randint(3, families.VOCAB, (2, 9))
    with torch.no_grad():
        training = found(ids, use_cache=False).logits
        assert found.training
        torch.testing.assert_close(training, found.eval()(ids, use_cache=False).logits)


@pytest.mark.parametrize("jitter", ["router_jitter_noise", "input_jitter_noise"])
def test_routers_do_not_jitter_in_training(jitter: str, tmp_path: Path) -> None:
    """PhiMoE's do while a model trains, so its old and new log-probs would differ by noise."""
    torch.manual_seed(0)
    families.build("phimoe", **{jitter: 0.1}).save_pretrained(tmp_path)
    noisy = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    with pytest.raises(ValueError, match=r"two passes over the same tokens .* differ by"):
        check_deterministic(noisy)
    found = _model_to_train(load(None, [f"model.path={tmp_path}"]), str(tmp_path))
    assert found.training
    check_deterministic(found)


def test_a_random_model_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that draws random numbers in it."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    plain = Qwen3MLP.forward
    monkeypatch.setattr(
        Qwen3MLP, "forward", lambda self, x: plain(self, x + 0.1 * torch.rand_like(x))
    )
    assert run_samples.run(tmp_path / "run", *SHORT) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be trained: two passes over the same tokens in training mode differ" in last


@pytest.mark.parametrize("algorithm", ["bupo", "grpo"])
def test_a_phase_that_starts_out_of_control_is_said(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a real Llama's raw pi^12 does at a usual rate; only of internal policies, only once."""
    wild = (f"algorithm={algorithm}", "optimizer.lr=0.1", "max_bad_steps=9", "bupo.steps=2")
    assert run_samples.run(tmp_path / "run", *SHORT[2:], "steps=3", *wild) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "out of control" in line]
    if algorithm == "grpo":
        assert not said
        return
    assert len(said) == 1 and said[0].startswith("step 1: the phase of layer 1 starts out of con")
    row = rows(tmp_path / "run/metrics.jsonl")[0]
    assert f"the largest is {row['policy/ratio_max']:.3g}, the gradient norm is" in said[0]
    assert run_samples.run(tmp_path / "tame", *SHORT, "optimizer.lr=1e-5") == 0
    assert "out of control" not in capsys.readouterr().err


class Engine:
    """Holds weights of its own, says the stub: log-probs that a test chooses."""

    def __init__(self, *scores: Any) -> None:
        self._scores = iter(scores)

    def load(self, tensors: object) -> None: ...

    def score(self, rollouts: object) -> list[Tensor]:
        return [torch.as_tensor(next(self._scores))]


def synced(
    engine: Engine, *trainer: Any, dtype: str = "float32", limit: float | None = None
) -> Any:
    values = iter(trainer)
    log_probs = lambda probes: [torch.as_tensor(next(values))]  # noqa: E731
    model = torch.nn.Linear(1, 1)
    return WeightSync(engine, model, [], log_probs, GapLimit(dtype, limit))


def test_log_probs_that_are_no_numbers_raise_the_alarm() -> None:
    sync = synced(Engine([-1.0], [math.nan]), [-1.0], [-1.0])
    with pytest.raises(SyncError, match="differ from the trainer's by nan nats"):
        sync(set())
    with pytest.raises(SyncError, match="nan nats"):
        GapLimit("float32", None).check(math.nan, "log-probs")


def test_the_limit_follows_the_gap_before_the_first_update() -> None:
    for dtype, first, allowed, alarm in [
        ("float32", 3e-7, 9e-5, 2e-4),
        ("float32", 1e-4, 9e-4, 2e-3),
        ("bfloat16", 1e-4, 0.9e-3, 1.1e-3),
        ("bfloat16", 1e-2, 0.019, 0.021),
    ]:
        limit = GapLimit(dtype, None)
        limit.check(first, "log-probs")
        limit.check(allowed, "log-probs")
        with pytest.raises(SyncError, match="more than rounding explains"):
            limit.check(alarm, "log-probs")
        with pytest.raises(SyncError):
            GapLimit(dtype, None).check(0.2, "log-probs")  # too far already at the start
    grown = GapLimit("bfloat16", None)
    grown.check(1e-2, "log-probs", rounding=0.5)
    grown.check(0.059, "log-probs", rounding=1.5)  # the policy is sharper, its rounding larger
    with pytest.raises(SyncError):
        grown.check(0.059, "log-probs", rounding=0.5)
    sampled = GapLimit("bfloat16", None, sampled=True)
    sampled.check(1e-2, "log-probs")
    sampled.check(0.029, "log-probs")
    fixed = GapLimit("float32", 0.1)
    fixed.check(0.09, "log-probs")
    with pytest.raises(SyncError, match=r"more than rollout.max_logprob_gap \(0.1\)"):
        fixed.check(0.11, "log-probs")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_an_engine_that_moves_less_than_the_trainer(share: float) -> None:
    """In bfloat16's rounding, which is larger than the difference that is left out."""
    g = torch.Generator().manual_seed(0)

    def rounding() -> Tensor:
        return 0.01 * torch.randn(512, generator=g)

    before, step = -3 * torch.rand(512, generator=g), 0.1 * torch.randn(512, generator=g)
    after = before + share * step + 0.2 * (1 - share) * step.roll(1)
    engine = Engine(before + rounding(), after + rounding())
    sync = synced(engine, before, before + step, dtype="bfloat16", limit=1.0)
    if share == 1:
        sync(set())
    else:
        with pytest.raises(SyncError, match="some of the weights never reach"):
            sync(set())


def test_movement_that_hardly_shows_tells_nothing() -> None:
    before = torch.linspace(-3, 0, 64)
    noise = torch.linspace(-0.01, 0.01, 64)
    synced(Engine(before + noise, before - noise), before, before + noise, limit=1.0)(set())


@pytest.mark.parametrize("in_process", [True, False])
def test_weights_for_other_processes_can_be_sent_to_them(in_process: bool) -> None:
    """vLLM pickles the arguments of a call when the model is in other processes."""
    sent: list[Any] = []

    class Model:
        def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
            sent.append(kwargs["weights_iterator"])

        def reset_prefix_cache(self) -> None: ...

    engine = VllmEngine.__new__(VllmEngine)
    engine._in_process, engine._llm, engine._asleep = in_process, Model(), set()
    engine._log = None
    engine.load((f"layer.{n}", torch.full((2,), float(n))) for n in range(3))
    if not in_process:
        sent = [pickle.loads(pickle.dumps(sent[0]))]
    assert [(name, float(x[0])) for name, x in sent[0]] == [(f"layer.{n}", n) for n in range(3)]


def test_probes_that_are_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """auto_stop compares with them; without it nothing is looked at any more: those of a trained
    policy would be others."""
    out = tmp_path / "run"
    options = ("bupo.auto_stop=100", "bupo.steps=4")
    assert run_samples.run(out, *options, stop=3) == 143
    (out / "probes.jsonl").unlink()
    assert run_samples.run(out, *options, "resume=auto") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "bupo.auto_stop" in error and "probes of this run, is missing" in error
    other = tmp_path / "other"
    assert run_samples.run(other, stop=3) == 143
    (other / "probes.jsonl").unlink()
    looked = (other / "diagnostics.jsonl").read_text()
    assert run_samples.run(other, "resume=auto") == 0
    assert not (other / "probes.jsonl").exists()
    assert (other / "diagnostics.jsonl").read_text() == looked


def test_probes_of_another_run_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/probes.jsonl").write_text('{"prompt": [1], "response": [1, 1, 1]}\n')
    assert run_samples.run(tmp_path / "run", *SHORT[:3]) == 0
    assert run_samples.run(tmp_path / "clean", *SHORT[:3]) == 0
    made = [(tmp_path / name / "probes.jsonl").read_text() for name in ("run", "clean")]
    assert made[0] == made[1]


def test_every_stage_tells_the_watchdog_that_it_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or watchdog.kill would end a healthy run whose critic takes long."""
    stage, told = "", []
    enter, alive = Watchdog.stage, Watchdog.alive

    @contextmanager
    def spy(self: Watchdog, name: str) -> Iterator[None]:
        nonlocal stage
        outer, stage = stage, name.split("stage ")[-1]
        with enter(self, name):
            yield
        stage = outer

    def note(self: Watchdog) -> None:
        told.append(stage)
        alive(self)

    monkeypatch.setattr(Watchdog, "stage", spy)
    monkeypatch.setattr(Watchdog, "alive", note)
    settings = ("advantage=ppo", "loss.kl_coef=0.1", "reward.function=math")
    assert run_samples.run(tmp_path / "run", *SHORT, *settings) == 0
    for name in ("rollout", "reward", "old_logprobs", "update", "critic"):
        assert told.count(name) > 4, f"{name}: at its beginning and its end only"


def test_the_math_reward_says_how_far_it_is() -> None:
    reward = make_reward(RewardConfig(workers=1))
    told: list[float] = []
    try:
        with progress.watched_by(told.append):
            reward.grade([("\\boxed{1}", "1")] * 4)
    finally:
        reward.close()
    assert told == [0.25, 0.5, 0.75, 1]


def test_optimizer_state_of_another_model_is_refused(tmp_path: Path) -> None:
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    settings = load(None, []).optimizer

    def optimizer(model: torch.nn.Module) -> AdamW:
        return AdamW(dict(model.named_parameters()), {}, settings, settings.lr)

    saved = optimizer(one).divided_state()
    state_files.write(tmp_path / "whole", saved)
    with pytest.raises(ValueError, match=r"has shape \[2, 3\], but its parameter \[2, 2\]"):
        state_files.read(tmp_path / "whole", optimizer(other).divided_state())
    del saved[next(iter(saved))]
    state_files.write(tmp_path / "less", saved)
    with pytest.raises(ValueError, match="missing or belong to no parameter"):
        state_files.read(tmp_path / "less", optimizer(one).divided_state())
