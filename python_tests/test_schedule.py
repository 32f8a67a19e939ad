"""bupo.rl.schedule: the phases of a run, what each leaves alone, and resuming across switches."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from rl_samples import DEPTH, random_rollouts, small_model
from run_samples import assert_same_run, rows, run
from update_samples import (
    FINAL,
    gradients_and_updates,
    gradients_of,
    make_trainer,
    moved,
    parameters,
    update,
)

from bupo.config import BupoConfig, Config, ConfigError, PhaseConfig
from bupo.policy import parameter_layers
from bupo.rl import checkpoint
from bupo.rl.schedule import Schedule
from bupo.runlog import run_directory
from bupo.types import Policy, Rates

pytestmark = pytest.mark.usefixtures("one_thread")


def custom(*phases, steps=10, **settings):
    return Schedule(Config(policy="custom", phases=list(phases), steps=steps, **settings))


def test_phases_follow_one_another():
    schedule = custom(
        PhaseConfig(layer=2, steps=2), PhaseConfig(layer=4, steps=3), PhaseConfig(),
        bupo=BupoConfig(final_norm=True),
    )  # fmt: skip
    policies = [schedule.policy(n) for n in range(1, 11)]
    assert [p.layer for p in policies] == [2, 2, 4, 4, 4, None, None, None, None, None]
    assert [p.final_norm for p in policies] == [True] * 5 + [False] * 5
    assert [n for n in range(12) if schedule.switches_after(n)] == [2, 5]
    assert schedule.layers() == [2, 4]
    assert schedule.describe(6) == (
        "steps 1-2 train layer 2 of 6, then layer 4 to step 5, then the final policy to step 10"
    )


def test_shorthands():
    internal = Schedule(Config(policy="internal", bupo=BupoConfig(layer=3), steps=4))
    assert [internal.policy(n) for n in range(1, 5)] == [Policy(3)] * 4
    assert not any(map(internal.switches_after, range(6)))
    assert internal.describe(6) == "layer 3 of 6 for 4 steps"
    grpo = Schedule(Config(policy="final", steps=4))
    assert grpo.policy(4) == FINAL and grpo.layers() == []
    assert grpo.describe(6) == "the final policy for 4 steps"
    bupo = Schedule(Config(bupo=BupoConfig(layer=3, steps=2), steps=4))
    written = custom(PhaseConfig(layer=3, steps=2), PhaseConfig(steps=2), steps=4)
    assert [bupo.policy(n) for n in range(1, 5)] == [written.policy(n) for n in range(1, 5)]


def test_rates_of_a_phase():
    schedule = custom(PhaseConfig(lr={"embedding": 0.5, "1-2": 0.25, "4-": 0.1}))
    factors = [schedule.policy(1).rates.factor(place) for place in (0, 1, 2, 3, 4, 7, None)]
    assert factors == [0.5, 0.25, 0.25, 1, 0.1, 0.1, 1]
    one = custom(PhaseConfig(lr={"3": 1.0, "others": 0.0})).policy(1).rates
    assert [one.factor(place) for place in (0, 1, 2, 3, 4, 7, None)] == [0, 0, 0, 1, 0, 0, 0]
    assert {Rates().factor(place) for place in (0, 2, None)} == {1.0}
    assert schedule.describe(6) == (
        "the final policy for 10 steps (learning rate of embedding x0.5, layers 1-2 x0.25, "
        "layers 4- x0.1)"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(policy="internal", bupo=BupoConfig(layer=7)), r"bupo\.layer=7 .* 1\.\.6"),
        (
            Config(policy="custom", phases=[PhaseConfig(lr={"2-7": 0.0})]),
            r"phases\[0\]\.lr\.2-7 is .* 1\.\.6",
        ),
    ],
)
def test_layers_that_the_model_has_not(config, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(config).check(6, "MODEL")
    Schedule(config).check(7, "MODEL")


def test_a_tied_head_has_no_rate_of_its_own():
    schedule = custom(PhaseConfig(lr={"head": 0.0}))
    schedule.check(6, "MODEL")
    with pytest.raises(ConfigError, match=r"phases\[0\]\.lr\.head: the head of MODEL is its"):
        schedule.check(6, "MODEL", tied=True)


def test_a_head_may_be_trained_alone():
    """Of any policy, if it is no embedding."""
    rates = {"head": 1.0, "others": 0.0}
    schedule = custom(PhaseConfig(layer=2, steps=1, lr=rates), PhaseConfig(lr=rates))
    schedule.check(6, "MODEL")
    for policy in (schedule.policy(1), schedule.policy(2)):
        model, rollouts = small_model(), random_rollouts()
        trainer = make_trainer(model)
        old = trainer.forward.token_stats(rollouts, policy).logprobs
        assert update(trainer, rollouts, old, policy, 1).changed == {"lm_head.weight"}


# What a frozen parameter is

ABOVE_1 = Rates(layers=((2, math.inf, 0.0),))
TO_1 = Rates(embedding=0.0, layers=((1, 1, 0.0),))
TO_THE_LAST = Rates(embedding=0.0, layers=((1, DEPTH, 0.0),))
ONLY_2 = Rates(embedding=0.0, head=0.0, layers=((2, 2, 1.0),), others=0.0)
FREEZING = {
    "above 1": Policy(None, rates=ABOVE_1),
    "to 1": Policy(None, rates=TO_1),
    "to 1, of layer 2": Policy(2, rates=TO_1),
    "above 1, of layer 2": Policy(2, rates=ABOVE_1),
    "to the last": Policy(None, rates=TO_THE_LAST),
    "but 2": Policy(None, rates=ONLY_2),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("policy", FREEZING.values(), ids=list(FREEZING))
def test_frozen_tensors_do_not_move_a_bit(policy, tied):
    """With momentum and weight decay waiting. The others get the gradient that they always had."""
    model, rollouts = small_model(tied=tied), random_rollouts()
    trainer = make_trainer(model, weight_decay=0.1, updates_per_step=2)
    update(trainer, rollouts, trainer.forward.token_stats(rollouts, FINAL).logprobs, FINAL, 1)
    start, places = parameters(model), parameter_layers(model)
    moments = {name: trainer.optimizer.state[p]["exp_avg"].clone()
               for name, p in model.named_parameters()}  # fmt: skip
    assert all(m.any() for m in moments.values())
    old = moved(trainer.forward.token_stats(rollouts, policy).logprobs)
    plain = make_trainer(small_model(tied=tied), updates_per_step=2)
    plain.model.load_state_dict(model.state_dict())
    (expected, *_), _ = gradients_of(plain, rollouts, old, Policy(policy.layer), 2)
    (came, *_), updates = gradients_and_updates(trainer, rollouts, old, policy, 2)
    frozen = {name for name, place in places.items() if policy.rates.factor(place) == 0}
    outside = {name for name in places if expected[name] is None}
    assert frozen and frozen | outside != set(places)
    assert updates.changed == places.keys() - frozen - outside, "what weight sync is told"
    for name, p in model.named_parameters():
        still = name in frozen | outside
        assert torch.equal(p, start[name]) == still, name
        assert torch.equal(trainer.optimizer.state[p]["exp_avg"], moments[name]) == still, name
        assert (came[name] is None) == still
        if not still:
            torch.testing.assert_close(came[name], expected[name], rtol=1e-4, atol=1e-6)
    before = parameters(model)
    update(trainer, rollouts, trainer.forward.token_stats(rollouts, FINAL).logprobs, FINAL, 3)
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters()), "thawed"


def test_a_tied_head_is_the_embedding():
    """One tensor cannot be frozen and trained: below the boundary, whatever the head does."""
    for tied, expected in ((False, {"lm_head.weight"}), (True, set())):
        model, rollouts = small_model(tied=tied), random_rollouts()
        trainer = make_trainer(model)
        policy = Policy(None, rates=TO_THE_LAST)
        old = trainer.forward.token_stats(rollouts, policy).logprobs
        changed = update(trainer, rollouts, old, policy, 1).changed
        assert changed == expected | {"model.norm.weight"}


def test_learning_rate_factors():
    """The first update of Adam moves an entry by its learning rate."""
    model, rollouts = small_model(), random_rollouts()
    trainer, start = make_trainer(model, lr=1e-3), parameters(model)
    rates = Rates(embedding=2.0, layers=((1, 1, 0.5), (2, math.inf, 0.1)))
    policy = Policy(None, rates=rates)
    update(trainer, rollouts, trainer.forward.token_stats(rollouts, policy).logprobs, policy, 1)
    for name, p in model.named_parameters():
        factor = policy.rates.factor(parameter_layers(model)[name])
        largest = float((p.detach() - start[name]).abs().max())
        assert largest == pytest.approx(1e-3 * factor, rel=0.02), name


def test_with_gradient_checkpointing_and_frozen_embeddings():
    model, rollouts = small_model(), random_rollouts()
    trainer, policy = make_trainer(model, lr=1e-30), Policy(None, rates=TO_1)
    old = trainer.forward.token_stats(rollouts, policy).logprobs
    (expected,), _ = gradients_of(trainer, rollouts, old, policy, 1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (came,), _ = gradients_of(trainer, rollouts, old, policy, 1)
    for name, theirs in expected.items():
        assert (theirs is None) == (came[name] is None)
        assert theirs is None or torch.allclose(came[name], theirs, rtol=1e-4, atol=1e-6)


# Runs

PHASES = (
    "phases=[{layer: 1, steps: 2}, {layer: 2, steps: 1, lr: {embedding: 0, 1: 0}}, "
    "{steps: 1, lr: {2-: 0}}, {lr: {2-: 0.1}}]"
)
SETTINGS = ["algorithm=custom", PHASES, "eval.every=0", "checkpoint.every=1", "eval.samples=1"]
SETTINGS += ["eval.pass_k=[1]", "checkpoint.keep_last=9"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phases") / "run"
    assert run(out, *SETTINGS) == 0
    return out


def test_each_phase_of_a_run_moves_what_it_says(whole: Path) -> None:
    assert [m["layer"] for m in rows(whole / "metrics.jsonl")] == [1, 1, 2, None, None, None]
    assert [e["step"] for e in rows(whole / "eval.jsonl")] == [0, 2, 3, 4, 6]
    import safetensors.torch

    states = [
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in run_directory.checkpoints(whole)
    ]
    names = {
        "below": [n for n in states[0] if ".layers.0." in n or "embed" in n],
        "layer 2": [n for n in states[0] if ".layers.1." in n],
        "norm": ["model.norm.weight"],
        "head": ["lm_head.weight"] if "lm_head.weight" in states[0] else [],
    }
    assert sum(map(len, names.values())) == len(states[0])
    for step, moving in (
        (2, {"below", "head"}),
        (3, {"layer 2", "head"}),
        (4, {"below", "head"}),
        (5, set(names)),
    ):
        for part, members in names.items():
            for name in members:
                same = torch.equal(states[step - 2][name], states[step - 1][name])
                assert same == (part not in moving), f"step {step}: {name}"


# Batches of rewards: evaluation, step 1, 2, evaluation, 3, evaluation, 4, evaluation, 5, 6 ...
@pytest.mark.parametrize(("stop", "done"), [(4, 2), (8, 4)])
def test_stopped_at_a_switch_and_continued(
    whole: Path, tmp_path: Path, stop: int, done: int
) -> None:
    out = tmp_path / "run"
    assert run(out, *SETTINGS, stop=stop) == 128 + signal.SIGTERM
    assert checkpoint.load_step(run_directory.checkpoints(out)[-1]) == done
    assert run(out, *SETTINGS, "resume=auto") == 0
    assert_same_run(whole, out)


def test_other_phases_are_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(out, *SETTINGS, stop=3) == 128 + signal.SIGTERM
    other = PHASES.replace("0.1", "0.2")
    assert run(out, *SETTINGS, other, "resume=auto") == 2
    assert "holds a run with different settings (phases: " in capsys.readouterr().err
    assert (
        json.loads((run_directory.checkpoints(out)[-1] / "trainer.json").read_text())["step"] == 1
    )
