"""Updates of internal and final policies in turn, updates that are skipped, and the optimizer."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rl_samples import (
    DEPTH,
    random_rollouts,
    small_model,
)
from update_samples import (
    FINAL,
    NO_CHANGE,
    gradients_of,
    literal_loss,
    literal_stats,
    make_trainer,
    name_of,
    parameters,
    update,
)

from bupo.config import BupoConfig, Config
from bupo.rl.schedule import Schedule
from bupo.samples import with_streams
from bupo.types import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


# Ratio, phases


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("policy", [Policy(1), Policy(2, True), FINAL], ids=name_of)
def test_ratio_is_one_at_the_first_update(policy, temperature):
    # Old log-probs come from one pass over everything, the update's from mini- and micro-batches.
    model, rollouts = small_model(), random_rollouts()
    everything = make_trainer(model, temperature=temperature)
    old = everything.forward.token_stats(rollouts, policy).logprobs
    trainer = make_trainer(
        model, temperature=temperature, updates_per_step=2, lr=NO_CHANGE, micro_batch_tokens=40
    )
    metrics = update(trainer, rollouts, old, policy, 1).metrics
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-9)


def test_ratio_shows_a_mix_of_policies():
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, lr=NO_CHANGE)
    for old, new in ((FINAL, Policy(2)), (Policy(2), FINAL), (Policy(1), Policy(2))):
        old_logprobs = trainer.forward.token_stats(rollouts, old).logprobs
        metrics = update(trainer, rollouts, old_logprobs, new, 1).metrics
        assert metrics["policy/ratio_max"] > 2 and metrics["policy/clip_fraction"] > 0.1


def test_second_update_has_moved():
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, updates_per_step=2, lr=1e-2)
    rollouts = [replace(r, group=r.group % 2) for r in rollouts]  # one group in each mini-batch
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    metrics = update(trainer, rollouts, old, FINAL, 1).metrics
    assert metrics["policy/ratio_max"] > 1.01 and metrics["policy/approx_kl"] > 1e-5


def test_schedule():
    schedule = Schedule(Config(bupo=BupoConfig(layer=2, steps=3, final_norm=True), steps=5))
    assert [schedule.policy(n).layer for n in range(1, 6)] == [2, 2, 2, None, None]
    assert [schedule.policy(n).phase for n in (3, 4)] == ["internal", "final"]
    assert schedule.policy(3).final_norm and not schedule.policy(4).final_norm
    assert [n for n in range(6) if schedule.switches_after(n)] == [3]
    for config in (Config(bupo=BupoConfig(steps=0)), Config(policy="final")):
        schedule = Schedule(config)
        assert schedule.policy(1) == FINAL and not any(map(schedule.switches_after, range(40)))


def test_ratio_is_one_on_both_sides_of_the_switch():
    model, rollouts = small_model(), random_rollouts()
    schedule = Schedule(Config(bupo=BupoConfig(layer=2, steps=2), steps=4))
    trainer = make_trainer(model, lr=1e-2)
    for step in (1, 2, 3, 4):
        policy = schedule.policy(step)
        old = trainer.forward.token_stats(rollouts, policy).logprobs
        metrics = update(trainer, rollouts, old, policy, step).metrics
        assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-5), f"step {step}"
        assert metrics["policy/clip_fraction"] == 0


def is_above(name, layer):
    """Whether a parameter is no part of the internal policy of that layer, without norm."""
    if name == "model.norm.weight":
        return True
    return name.startswith("model.layers.") and int(name.split(".")[2]) >= layer


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("layer", [1, 2, DEPTH])
def test_phase_1_leaves_everything_above_alone(layer, entropy_coef):
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(
        model, weight_decay=0.1, updates_per_step=3, loss={"entropy_coef": entropy_coef}
    )
    start = parameters(model)
    old = trainer.forward.token_stats(rollouts, Policy(layer)).logprobs
    assert update(trainer, rollouts, old, Policy(layer), 1).metrics["policy/skipped_updates"] == 0
    for name, p in model.named_parameters():
        if is_above(name, layer):
            assert torch.equal(p, start[name]), name
            assert not any(x.any() for x in trainer.optimizer.state[p].values()), name
        else:
            assert not torch.equal(p, start[name]), name
            assert trainer.optimizer.state[p]["step"] == 3, name
    assert any(is_above(name, layer) for name in start)


def test_phase_1_with_the_norm_trains_the_norm():
    model, rollouts = small_model(), random_rollouts()
    trainer, start, policy = (
        make_trainer(model, weight_decay=0.1),
        parameters(model),
        Policy(1, True),
    )
    update(trainer, rollouts, trainer.forward.token_stats(rollouts, policy).logprobs, policy, 1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {n for n in start if n == "model.norm.weight" or not is_above(n, 1)}


def test_optimizer_state_of_the_final_policy_does_not_move_what_is_above():
    # A run that resumes in phase 1 may hold state for all parameters; momentum must not act.
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, weight_decay=0.1)
    start = parameters(model)
    update(trainer, rollouts, trainer.forward.token_stats(rollouts, FINAL).logprobs, FINAL, 1)
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters())
    between = parameters(model)
    policy = Policy(1)
    update(trainer, rollouts, trainer.forward.token_stats(rollouts, policy).logprobs, policy, 2)
    for name, p in model.named_parameters():
        assert torch.equal(p, between[name]) == is_above(name, 1), name


# Numbers that are not finite


def check_skipped(trainer, model, start, metrics, old_state):
    assert metrics["policy/skipped_updates"] == 1
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters()), "nothing is left for the next update"
    assert str(trainer.optimizer.state_dict()["state"]) == old_state
    assert math.isnan(metrics["policy/loss"]) and math.isnan(metrics["policy/grad_norm"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro_batch_tokens", [10**6, 1])
def test_a_loss_that_is_not_finite_skips_the_update(value, micro_batch_tokens):
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, micro_batch_tokens=micro_batch_tokens, weight_decay=0.1)
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    update(trainer, rollouts, old, FINAL, 1)
    start, state = parameters(model), str(trainer.optimizer.state_dict()["state"])
    rollouts[4].stream("advantage")[0] = value
    check_skipped(trainer, model, start, update(trainer, rollouts, old, FINAL, 2).metrics, state)


def test_a_gradient_that_is_not_finite_skips_the_update():
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, weight_decay=0.1)
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    start, state = parameters(model), str(trainer.optimizer.state_dict()["state"])
    handle = model.model.layers[0].mlp.up_proj.weight.register_hook(lambda g: g * math.inf)
    check_skipped(trainer, model, start, update(trainer, rollouts, old, FINAL, 1).metrics, state)
    handle.remove()
    assert update(trainer, rollouts, old, FINAL, 1).metrics["policy/skipped_updates"] == 0


def test_only_the_update_with_the_bad_number_is_skipped():
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, updates_per_step=2)
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    rollouts[0].stream("advantage")[0] = math.nan
    steps, metrics = gradients_of(trainer, rollouts, old, FINAL, 1)
    assert len(steps) == metrics["policy/skipped_updates"] == 1
    assert math.isfinite(metrics["policy/loss"]) and math.isfinite(metrics["policy/grad_norm"])
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# The optimizer


@pytest.mark.parametrize("policy", [Policy(2), FINAL], ids=name_of)
def test_two_updates_in_plain_torch(policy):
    # All of it: the gradient, its clipping, AdamW with its moments and decay; float64 as above.
    rollouts = random_rollouts()
    model, plain = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    trainer = make_trainer(
        model, lr=1e-2, betas=(0.7, 0.9), weight_decay=0.3, grad_clip=0.5, warmup_steps=2,
        loss={"aggregation": "seq_mean"},
    )  # fmt: skip
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.7, 0.9), weight_decay=0.3)
    for step in (1, 2):
        stats = trainer.forward.token_stats(rollouts, policy)
        assert stats.mean_entropy() > 0.5
        update(trainer, rollouts, stats.logprobs, policy, step)
        optimizer.zero_grad()
        with torch.no_grad():
            old = [literal_stats(plain, r, policy)[0] for r in rollouts]
        literal_loss(plain, rollouts, old, policy).backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5) > 0.5
        optimizer.param_groups[0]["lr"] = 1e-2 * step / 2
        optimizer.step()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
            assert (ours - theirs).abs().max().item() < 1e-6, f"step {step}: {name}"


def test_learning_rate_warms_up_and_stays():
    model, rollouts = small_model(), random_rollouts()
    old = make_trainer(model).forward.token_stats(rollouts, FINAL).logprobs
    for step, expected in ((1, 2.5e-4), (2, 5e-4), (4, 1e-3), (5, 1e-3), (100, 1e-3)):
        model.load_state_dict(small_model().state_dict())
        trainer = make_trainer(model, lr=1e-3, warmup_steps=4)
        start = parameters(model)
        metrics = update(trainer, rollouts, old, FINAL, step).metrics
        assert metrics["policy/lr"] == pytest.approx(expected)
        # The first update of Adam moves every entry by lr, or less where the gradient is tiny.
        moves = [float((p.detach() - start[n]).abs().max()) for n, p in model.named_parameters()]
        largest = max(moves)
        assert largest == pytest.approx(expected, rel=1e-2), f"step {step}"
    trainer = make_trainer(model, lr=1e-3)
    assert update(trainer, rollouts, old, FINAL, 1).metrics["policy/lr"] == 1e-3


def test_linear_schedule():
    model, rollouts = small_model(), random_rollouts(groups=1)
    trainer = make_trainer(model, lr=0.6, warmup_steps=2, schedule="linear", steps=8)
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    rates = []
    for step in range(1, 9):
        model.load_state_dict(small_model().state_dict())
        rates.append(update(trainer, rollouts, old, FINAL, step).metrics["policy/lr"])
    assert rates[:2] == pytest.approx([0.3, 0.6])
    falls = [a - b for a, b in pairwise(rates[2:])]
    assert falls == pytest.approx([falls[0]] * 5) and falls[0] > 0, "in equal steps"
    assert 0.6 - falls[0] - 1e-9 <= rates[2] <= 0.6 and -1e-9 <= rates[-1] <= falls[0] + 1e-9


@pytest.mark.parametrize("policy", [Policy(1), FINAL], ids=name_of)
def test_gradient_norm_is_clipped_as_a_whole(policy):
    model, rollouts = small_model(), random_rollouts()
    old = make_trainer(model).forward.token_stats(rollouts, policy).logprobs
    (whole,), before = gradients_of(make_trainer(model, lr=NO_CHANGE), rollouts, old, policy, 1)
    trainer = make_trainer(model, lr=NO_CHANGE, grad_clip=0.01)
    (clipped,), after = gradients_of(trainer, rollouts, old, policy, 1)
    norm = before["policy/grad_norm"]
    assert norm > 0.02 and after["policy/grad_norm"] == pytest.approx(norm), "the norm before"
    shrunk = {n: None if g is None else g * (0.01 / norm) for n, g in whole.items()}
    for name, g in clipped.items():
        assert (g is None) == (shrunk[name] is None)
        if g is not None:
            torch.testing.assert_close(g, shrunk[name], rtol=1e-3, atol=1e-8)


def test_an_update_does_what_the_advantages_say():
    model, rollouts = small_model(), random_rollouts()
    wanted = (torch.full((r.count,), 1.0 if n % 2 else -1.0) for n, r in enumerate(rollouts))
    rollouts = with_streams(rollouts, "advantage", wanted)
    trainer = make_trainer(model, lr=1e-3)
    before = trainer.forward.token_stats(rollouts, FINAL)
    for step in range(1, 4):
        update(trainer, rollouts, before.logprobs, FINAL, step)
    after = trainer.forward.token_stats(rollouts, FINAL)
    change = [float((b - a).sum()) for a, b in zip(before.logprobs, after.logprobs)]
    assert sum(change[1::2]) > 0.1 and sum(change[::2]) < -0.1
