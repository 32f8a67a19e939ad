"""The losses against a slow loop written from the formulas, in float64, for both kinds of policy.

One response at a time, one token at a time, branches by `if`; the program sees micro-batches.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from rl_samples import random_rollouts, small_model
from update_samples import (
    FINAL,
    NO_CHANGE,
    check_gradients,
    gradients_of,
    literal_stats,
    make_trainer,
    moved,
    name_of,
    update,
)

from bupo.config import LossConfig
from bupo.rl.losses import drop, mean_kl, policy_loss
from bupo.samples import Batch, with_streams
from bupo.types import Policy

POLICIES = [Policy(2), FINAL]


pytestmark = pytest.mark.usefixtures("one_thread")


EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=name_of)

SETTINGS = {
    "ppo": {"type": "ppo"},
    "ppo dual clip": {"type": "ppo", "dual_clip": 1.3},
    "cispo": {"type": "cispo", "clip_high": 0.1},
    "gspo": {"type": "gspo", "clip_low": 0.05, "clip_high": 0.1},
    "gspo dual clip": {"type": "gspo", "clip_low": 0.05, "clip_high": 0.1, "dual_clip": 1.2},
    "gspo entropy": {"type": "gspo", "entropy_coef": 0.3},
    "gspo k2": {"type": "gspo", "kl_coef": 0.4, "kl_estimator": "k2"},
    "k1": {"kl_coef": 0.4, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.4, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.4, "kl_estimator": "k3"},
    "cispo k3": {"type": "cispo", "kl_coef": 0.4, "kl_estimator": "k3"},
    "entropy and k2": {"entropy_coef": 0.2, "kl_coef": 0.4, "kl_estimator": "k2"},
}


def pessimistic(ratio, advantage, low, high, dual):
    """-min(r A, clip(r) A), at most -c A for a negative A; a clipped value is a constant."""
    value = ratio.item()
    clipped = min(max(value, low), high) * advantage
    gain = ratio * advantage if value * advantage <= clipped else torch.tensor(clipped)
    if dual is not None and advantage < 0 and gain.item() < dual * advantage:
        gain = torch.tensor(dual * advantage)
    return -gain


def slow_loss(model, rollouts, old, policy, importance=None, aggregation="seq_mean", **loss):
    low, high = 1 - loss.get("clip_low", 0.2), 1 + loss.get("clip_high", 0.2)
    kind, dual = loss.get("type", "ppo"), loss.get("dual_clip")
    kept = [n for n, r in enumerate(rollouts) if not r.dropped]
    tokens = sum(rollouts[n].count for n in kept)
    total = torch.zeros((), dtype=torch.float64)
    for n in kept:
        rollout = rollouts[n]
        logprobs, entropy = literal_stats(model, rollout, policy)
        count = rollout.count
        gaps = [logprobs[t] - float(old[n][t]) for t in range(count)]
        sequence_ratio = torch.exp(sum(gaps) / count)
        for t in range(count):
            advantage, ratio = float(rollout.stream("advantage")[t]), torch.exp(gaps[t])
            if kind == "gspo":
                value = pessimistic(sequence_ratio, advantage, low, high, dual)
            elif kind == "cispo":
                value = -min(ratio.item(), high) * advantage * logprobs[t]
            else:
                value = pessimistic(ratio, advantage, low, high, dual)
            if importance is not None:
                value = value * float(importance[n][t])
            if loss.get("kl_coef"):
                gap = float(rollout.stream("reference")[t]) - logprobs[t]
                if loss["kl_estimator"] == "k1":
                    kl = -gap
                elif loss["kl_estimator"] == "k2":
                    kl = gap * gap / 2
                else:
                    kl = torch.exp(gap) - gap - 1
                value = value + loss["kl_coef"] * kl
            value = value - loss.get("entropy_coef", 0.0) * entropy[t]
            weight = {
                "token_mean": 1 / tokens,
                "seq_mean": 1 / (len(kept) * count),
                "seq_sum": 1 / len(kept),
                "seq_sum_longest": 1 / (len(kept) * 11),
            }[aggregation]
            total = total + weight * value
    return total


def slow_gradients(model, *arguments, **options):
    model = copy.deepcopy(model)
    loss = slow_loss(model, *arguments, **options)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def sample(policy, seed=0):
    """A float64 model, rollouts with reference log-probs, old log-probs at some distance."""
    model, rollouts = small_model(dtype=torch.float64), random_rollouts(seed=seed)
    logprobs = make_trainer(model).forward.token_stats(rollouts, policy).logprobs
    rollouts = with_streams(rollouts, "reference", moved(logprobs, seed=99))
    return model, rollouts, moved(logprobs)


@pytest.mark.parametrize("name", SETTINGS)
@EVERY_POLICY
def test_losses_against_a_slow_loop(policy, name):
    model, rollouts, old = sample(policy)
    options = {"aggregation": "seq_mean"} | SETTINGS[name]
    expected, loss = slow_gradients(model, rollouts, old, policy, **options)
    for micro_batch_tokens in (10**6, 30):
        trainer = make_trainer(
            model, loss=options, lr=NO_CHANGE, micro_batch_tokens=micro_batch_tokens
        )
        (came,), metrics = gradients_of(trainer, rollouts, old, policy, 1)
        check_gradients(came, expected, 1e-6)
        assert metrics["policy/loss"] == pytest.approx(loss, abs=1e-7)


@EVERY_POLICY
def test_every_loss_is_another(policy):
    model, rollouts, old = sample(policy)
    seen = {
        name: round(slow_loss(model, rollouts, old, policy, **options).item(), 6)
        for name, options in SETTINGS.items()
    }
    assert len(set(seen.values())) == len(SETTINGS), seen


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "seq_sum", "seq_sum_longest"])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_aggregations_and_importance_against_a_slow_loop(kind, aggregation):
    model, rollouts, old = sample(FINAL)
    g = torch.Generator().manual_seed(0)
    importance = [torch.rand(r.count, generator=g) for r in rollouts]
    options = {"type": kind, "aggregation": aggregation, "kl_coef": 0.1, "kl_estimator": "k2"}
    trainer = make_trainer(model, loss=options, lr=NO_CHANGE, micro_batch_tokens=40)
    expected, loss = slow_gradients(model, rollouts, old, FINAL, importance, **options)
    (came,), metrics = gradients_of(trainer, rollouts, old, FINAL, 1, importance)
    check_gradients(came, expected, 1e-6)
    assert metrics["policy/loss"] == pytest.approx(loss, abs=1e-6)


def gspo(log_ratios, lengths, advantages, **options):
    """Of given log-ratios, on a vocabulary of two; returns loss, its slope in each log-prob, and
    metrics."""
    log_ratios = torch.tensor(log_ratios, dtype=torch.float64)
    none = torch.zeros(0, dtype=torch.long)
    rows = torch.tensor(
        [n for n, length in enumerate(lengths) for _ in range(length)], dtype=torch.long
    )
    old = torch.full_like(log_ratios, math.log(0.5)) - log_ratios
    advantages = torch.tensor(advantages, dtype=torch.float64)
    streams = {"old": old, "advantage": advantages, "weight": torch.ones_like(advantages)}
    targets = torch.zeros(len(log_ratios), dtype=torch.long)
    batch = Batch(list(range(len(lengths))), lengths, none, none, rows, none, targets, streams)
    settings = LossConfig(**{"type": "gspo", "clip_low": 0.2, "clip_high": 0.28} | options)
    hidden = torch.zeros(len(log_ratios), 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[2.0], [0.0]], dtype=torch.float64)  # d logp / d hidden = 1
    out = policy_loss(hidden, {"weight": weight}, batch, settings)
    (slope,) = torch.autograd.grad(out.loss, hidden)
    return out.loss.item(), slope[:, 0].tolist(), {k: float(v) for k, v in out.metrics.items()}


def test_gspo_has_one_ratio_for_a_response():
    # Two responses, of 3 tokens and of 1: ratios e^0.1 and e^-0.1, though single tokens are far.
    loss, slope, metrics = gspo([1.0, -1.0, 0.3, -0.1], [3, 1], [2.0, 2.0, 2.0, -1.0])
    expected = -math.exp(0.1) * 6 + math.exp(-0.1)
    assert loss == pytest.approx(expected)
    assert slope == pytest.approx([-2 * math.exp(0.1)] * 3 + [math.exp(-0.1)])
    assert metrics["clip_fraction"] == 0 and metrics["live_fraction"] == 1
    assert metrics["ratio_max"] == pytest.approx(math.exp(0.1))


@pytest.mark.parametrize("sign", [1, -1])
def test_gspo_at_the_edges_of_the_clip(sign):
    for edge, inside, live in (
        (1.28, 1 - 1e-9, True), (1.28, 1 + 1e-9, sign < 0),
        (0.8, 1 + 1e-9, True), (0.8, 1 - 1e-9, sign > 0),
    ):  # fmt: skip
        gap = math.log(edge * inside)
        _, slope, metrics = gspo([gap - 0.5, gap + 0.5], [2], [float(sign)] * 2)
        assert all((x != 0) == live for x in slope), (sign, edge, inside)
        assert metrics["clip_fraction"] == (0 if live else 1) == 1 - metrics["live_fraction"]


def test_gspo_dual_clip_bounds_negative_advantages_only():
    far = [math.log(50.0)] * 2
    loss, slope, metrics = gspo(far, [2], [-1.0, -1.0], dual_clip=10.0)
    assert loss == pytest.approx(20) and slope == [0, 0] and metrics["clip_fraction"] == 1
    loss, slope, _ = gspo(far, [2], [-1.0, -1.0])
    assert loss == pytest.approx(100) and all(x > 0 for x in slope)
    assert gspo(far, [2], [1.0, 1.0], dual_clip=10.0)[0] == pytest.approx(-2 * 1.28)


def test_gspo_with_nothing_to_learn_from():
    assert gspo([], [], [])[0] == 0 and gspo([], [0, 0], [])[2]["live_fraction"] == 0
    loss, slope, metrics = gspo([0.3, 800.0], [1, 1], [0.0, 0.0])
    assert loss == 0 and slope == [0, 0] and metrics["live_fraction"] == 0, "0 beats infinity"
    assert math.isnan(gspo([0.3, math.nan], [1, 1], [0.0, 0.0])[0]), "but hides no nan"


def test_mean_kl_is_k3():
    rollouts = random_rollouts()
    old = [torch.randn(r.count) for r in rollouts]
    reference = moved(old)
    pairs = [(float(a), float(b)) for x, y in zip(old, reference) for a, b in zip(x, y)]
    expected = sum(math.exp(b - a) - (b - a) - 1 for a, b in pairs) / len(pairs)
    rollouts = with_streams(with_streams(rollouts, "old", old), "reference", reference)
    assert mean_kl(rollouts) == pytest.approx(expected)
    assert mean_kl(with_streams(rollouts, "old", reference)) == 0


def test_a_kl_to_the_internal_policy_has_no_gradient_above_it():
    model, rollouts, old = sample(Policy(1))
    rollouts = with_streams(rollouts, "advantage", (torch.zeros(r.count) for r in rollouts))
    options = {"kl_coef": 1.0, "kl_estimator": "k2"}
    trainer = make_trainer(model, loss=options, weight_decay=0.1)
    changed = update(trainer, rollouts, old, Policy(1), 1).changed
    assert changed and "model.norm.weight" not in changed
    assert not [n for n in changed if ".layers.1." in n or ".layers.2." in n]


def test_a_kl_term_pulls_towards_the_reference():
    model, reference = small_model(), small_model(seed=1)
    rollouts = random_rollouts()
    rollouts = with_streams(rollouts, "advantage", (torch.zeros(r.count) for r in rollouts))
    stats = make_trainer(reference).forward.token_stats(rollouts, FINAL)
    rollouts = with_streams(rollouts, "reference", stats.logprobs)
    for estimator in ("k2", "k3"):
        trainer = make_trainer(model, loss={"kl_coef": 1.0, "kl_estimator": estimator}, lr=3e-3)

        def distance(trainer=trainer):
            old = trainer.forward.token_stats(rollouts, FINAL).logprobs
            return old, mean_kl(with_streams(rollouts, "old", old))

        old, before = distance()
        for step in range(1, 4):
            update(trainer, rollouts, old, FINAL, step)
        assert distance()[1] < 0.9 * before, estimator


# Responses that have no part


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "seq_sum", "seq_sum_longest"])
def test_dropped_responses_leave_the_denominators_too(aggregation, kind):
    model, rollouts, old = sample(FINAL)
    for n in (0, 4, 5):
        nothing = torch.full((rollouts[n].count,), math.nan)
        rollouts[n] = replace(rollouts[n], dropped=True).with_stream("advantage", nothing)
        old[n] = nothing
    options = {"type": kind, "aggregation": aggregation}
    expected, loss = slow_gradients(model, rollouts, old, FINAL, **options)
    for micro_batch_tokens in (10**6, 1):
        trainer = make_trainer(
            model, loss=options, lr=NO_CHANGE, micro_batch_tokens=micro_batch_tokens
        )
        (came,), metrics = gradients_of(trainer, rollouts, old, FINAL, 1)
        check_gradients(came, expected, 1e-6)
        assert metrics["policy/loss"] == pytest.approx(loss, abs=1e-7)
        assert all(map(math.isfinite, metrics.values()))


def test_a_mini_batch_of_dropped_responses_moves_nothing():
    """Nor do momentum and weight decay, which a gradient of zero would wake."""
    model, rollouts, old = sample(FINAL)
    trainer = make_trainer(model, weight_decay=0.1, updates_per_step=2)
    update(trainer, rollouts, old, FINAL, 1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    none = [replace(r, dropped=True) for r in rollouts]
    updates = update(trainer, none, old, FINAL, 2)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert updates.changed == set() and updates.metrics["policy/skipped_updates"] == 0
    half = [replace(r, dropped=r.group % 2 == 0) for r in rollouts]  # one of two mini-batches
    steps, _ = gradients_of(trainer, half, old, FINAL, 3)
    assert [any(g is not None for g in named.values()) for named in steps] == [False, True]


def test_which_responses_are_dropped():
    rollouts = random_rollouts()
    for n, rollout in enumerate(rollouts):
        signs = torch.tensor([1.0, -1.0] * rollout.count)[: rollout.count]
        final = -1.0 + 0.1 * n * signs  # the mean of the absolute value is 0.1 n
        rollout = rollout.with_stream("engine", torch.full((rollout.count,), -1.0))
        rollout = rollout.with_stream("final", final * math.nan if n == 2 else final)
        rollouts[n] = replace(rollout, finish_reason="length" if n in (1, 7) else "stop")

    def dropped(gap, truncated):
        return [n for n, r in enumerate(drop(rollouts, gap, truncated)) if r.dropped]

    assert dropped(None, False) == []
    assert dropped(None, True) == [1, 7]
    assert dropped(0.85, False) == [2, 9, 10, 11], "nan too"
    assert dropped(0.85, True) == [1, 2, 7, 9, 10, 11]
    assert drop([], 0.1, True) == []
    ungraded = drop([replace(rollouts[0], reward=math.nan)], None, False)
    assert ungraded[0].dropped and not rollouts[0].dropped, "a copy is marked"
