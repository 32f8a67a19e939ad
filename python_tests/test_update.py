"""bupo.rl.update against plain torch: whose gradient, and what must not change it."""

import copy
import math
import random

import pytest
import torch
from rl_samples import (
    random_rollouts,
    rewarded,
    small_model,
)
from update_samples import (
    FINAL,
    NO_CHANGE,
    check_gradients,
    each_policy,
    gradients_of,
    literal_gradients,
    make_trainer,
    moved,
    name_of,
    parameters,
    update,
    with_empty_response,
)

from bupo.config.objective import AGGREGATIONS
from bupo.rl.losses import with_importance_weights, with_weights
from bupo.samples import with_streams
from bupo.types import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


# Weights of tokens


def test_token_weights():
    def weights(lengths, *how):
        rollouts = with_weights([rewarded(0, 1.0, n) for n in lengths], *how)
        assert all(len(set(r.stream("weight").tolist())) <= 1 for r in rollouts)
        return [float(r.stream("weight")[0]) if r.count else None for r in rollouts]

    lengths = [4, 1, 0, 5]
    assert weights(lengths, "token_mean") == pytest.approx([1 / 10, 1 / 10, None, 1 / 10])
    assert weights(lengths, "seq_mean") == pytest.approx([1 / 16, 1 / 4, None, 1 / 20])
    assert weights(lengths, "seq_sum") == pytest.approx([1 / 4, 1 / 4, None, 1 / 4])
    assert weights(lengths, "seq_sum_longest", 8) == pytest.approx([1 / 32, 1 / 32, None, 1 / 32])
    for aggregation in AGGREGATIONS:
        assert weights([0, 0], aggregation, 8) == [None, None]


# The gradient of one update


@each_policy
def test_gradient_is_that_of_the_objective(policy):
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, loss={"aggregation": "seq_mean"}, lr=NO_CHANGE)
    old = moved(trainer.forward.token_stats(rollouts, policy).logprobs)
    expected, loss = literal_gradients(model, rollouts, old, policy)
    (came,), metrics = gradients_of(trainer, rollouts, old, policy, 1)
    check_gradients(came, expected)
    assert metrics["policy/loss"] == pytest.approx(loss, abs=1e-5)
    assert 0.1 < metrics["policy/clip_fraction"] < 0.9, "both branches of the minimum occur"
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values() if g is not None))
    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)


OPTIONS = {
    "token_mean": {"aggregation": "token_mean"},
    "seq_sum": {"aggregation": "seq_sum"},
    "asymmetric clip": {"aggregation": "seq_mean", "clip_low": 0.1, "clip_high": 0.4},
    "dual clip": {"aggregation": "seq_mean", "dual_clip": 1.3},
    "cispo": {"aggregation": "seq_mean", "type": "cispo"},
    "entropy": {"aggregation": "seq_mean", "entropy_coef": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("policy", [Policy(2), FINAL], ids=name_of)
def test_gradient_with_the_options_of_the_loss(policy, options):
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, loss=options, temperature=0.7, lr=NO_CHANGE)
    old = moved(trainer.forward.token_stats(rollouts, policy).logprobs)
    expected, loss = literal_gradients(model, rollouts, old, policy, 0.7, **options)
    plain, _ = literal_gradients(model, rollouts, old, policy, 0.7)
    (came,), metrics = gradients_of(trainer, rollouts, old, policy, 1)
    check_gradients(came, expected)
    assert metrics["policy/loss"] == pytest.approx(loss, abs=1e-4)
    with pytest.raises(AssertionError):  # the option makes a difference
        check_gradients(came, plain, 1e-2)


@pytest.mark.parametrize("policy", [Policy(1), FINAL], ids=name_of)
def test_tied_embeddings_get_both_gradients(policy):
    model, rollouts = small_model(tied=True), random_rollouts()
    trainer = make_trainer(model, loss={"aggregation": "seq_mean"}, lr=NO_CHANGE)
    old = trainer.forward.token_stats(rollouts, policy).logprobs
    expected, _ = literal_gradients(model, rollouts, old, policy)
    (came,), _ = gradients_of(trainer, rollouts, old, policy, 1)
    check_gradients(came, expected)
    assert came["model.embed_tokens.weight"].any(dim=-1).all()


@pytest.mark.parametrize("policy", [Policy(2), FINAL], ids=name_of)
def test_gradient_checkpointing_changes_nothing(policy):
    # Its second forward runs in backward, outside the context of the internal policy.
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, lr=NO_CHANGE)
    old = moved(trainer.forward.token_stats(rollouts, policy).logprobs)
    (expected,), _ = gradients_of(trainer, rollouts, old, policy, 1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (came,), _ = gradients_of(trainer, rollouts, old, policy, 1)
    check_gradients(came, expected)


# What must not change the result


def updated(rollouts, old, policy, aggregation, **settings):
    """Parameters after two optimiser updates in float64, and the metrics.

    float64, because the first Adam update is lr times the sign of the gradient: in float32 an
    entry whose gradient is rounding noise moves by up to 2 lr.
    """
    model = small_model(dtype=torch.float64)
    trainer = make_trainer(
        model, loss={"aggregation": aggregation}, updates_per_step=2, weight_decay=0.1, **settings
    )
    metrics = update(trainer, rollouts, old, policy, 1).metrics
    return parameters(model), metrics


@pytest.fixture(params=[Policy(2), FINAL], ids=name_of)
def reference(request):
    """A policy, rollouts and old log-probs."""
    rollouts = random_rollouts()
    trainer = make_trainer(small_model(dtype=torch.float64))
    old = moved(trainer.forward.token_stats(rollouts, request.param).logprobs)
    return request.param, rollouts, old


def check_same(came, expected):
    start = parameters(small_model(dtype=torch.float64))
    for name, theirs in expected[0].items():
        assert float((came[0][name] - theirs).abs().max()) < 1e-6, name
    assert max(float((expected[0][name] - start[name]).abs().max()) for name in start) > 1e-3
    assert came[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "seq_sum"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 33])
def test_micro_batches_do_not_change_the_update(reference, aggregation, micro_batch_tokens):
    policy, rollouts, old = reference
    expected = updated(rollouts, old, policy, aggregation)
    came = updated(rollouts, old, policy, aggregation, micro_batch_tokens=micro_batch_tokens)
    check_same(came, expected)


def test_padding_does_not_change_the_update(reference):
    policy, rollouts, old = reference
    expected = updated(rollouts, old, policy, "token_mean")
    check_same(updated(rollouts, old, policy, "token_mean", pad=7), expected)


def test_order_of_rollouts_does_not_change_the_update(reference):
    policy, rollouts, old = reference
    order = list(range(len(rollouts)))
    random.Random(2).shuffle(order)
    expected = updated(rollouts, old, policy, "seq_mean")
    came = updated([rollouts[i] for i in order], [old[i] for i in order], policy, "seq_mean")
    check_same(came, expected)


@pytest.mark.parametrize("policy", [Policy(2), FINAL], ids=name_of)
def test_float32_gradients_do_not_depend_on_micro_batches(policy):
    """Three-way: one rollout a micro-batch errs at most twice as much as all at once, both against
    float64. Dependence on the split would be of the order of the gradient itself."""
    model, rollouts = small_model(), random_rollouts()
    old = moved(make_trainer(model).forward.token_stats(rollouts, policy).logprobs)

    def gradients(in_model, **settings):
        trainer = make_trainer(in_model, lr=NO_CHANGE, **settings)
        (named,), _ = gradients_of(trainer, rollouts, old, policy, 1)
        return {name: g.double() for name, g in named.items() if g is not None}

    truth = gradients(copy.deepcopy(model).double())
    whole, split = gradients(model), gradients(model, micro_batch_tokens=1)
    assert truth.keys() == whole.keys() == split.keys()

    def worst(named):
        return max(float((named[n] - g).abs().max() / g.abs().max()) for n, g in truth.items())

    assert 0 < worst(whole) < 1e-4
    assert worst(split) <= 2 * worst(whole), (worst(split), worst(whole))


def test_mini_batches_are_whole_groups():
    # Only one group has advantages: exactly one of the updates has a gradient, that of all of it.
    model = small_model()
    rollouts = random_rollouts(groups=8)
    random.Random(3).shuffle(rollouts)
    trainer = make_trainer(model, updates_per_step=4, lr=NO_CHANGE, loss={"aggregation": "seq_sum"})
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    update_of = {}
    for group in range(8):
        wanted = (torch.full((r.count,), float(r.group == group)) for r in rollouts)
        chosen = with_streams(rollouts, "advantage", wanted)
        steps, _ = gradients_of(trainer, chosen, old, FINAL, 1)
        assert len(steps) == 4
        live = [n for n, named in enumerate(steps) if any(g.any() for g in named.values())]
        (update_of[group],) = live
        members = [i for i, r in enumerate(rollouts) if r.group == group]
        expected, _ = literal_gradients(
            model, [chosen[i] for i in members], [old[i] for i in members], FINAL,
            aggregation="seq_sum",
        )  # fmt: skip
        # seq_sum divides by the responses of the mini-batch, two groups of three.
        check_gradients(steps[live[0]], {name: g / 2 for name, g in expected.items()})
    assert sorted(update_of.values()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_fewer_groups_than_updates():
    model, rollouts = small_model(), random_rollouts(groups=2)
    trainer = make_trainer(model, updates_per_step=4)
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    steps, metrics = gradients_of(trainer, rollouts, old, FINAL, 1)
    assert len(steps) == 2 and metrics["policy/skipped_updates"] == 0


def test_importance_weights_are_truncated():
    rollout = random_rollouts()[0]
    final, engine = torch.linspace(-4, 1, rollout.count), torch.full((rollout.count,), -2.0)
    rollout = rollout.with_stream("engine", engine).with_stream("final", final)
    (found,) = with_importance_weights([rollout], cap=1.5)
    expected = [min(math.exp(float(x) + 2), 1.5) for x in final]
    assert found.stream("importance").tolist() == pytest.approx(expected)
    assert min(expected) < 1 < max(expected) == 1.5


def test_importance_weights_scale_each_tokens_loss():
    """Truncated importance sampling: a factor of the ratio loss, token by token."""
    rollouts = random_rollouts()
    g = torch.Generator().manual_seed(0)
    factors = [torch.rand(r.count, generator=g) for r in rollouts]
    scaled = [
        r.with_stream("advantage", r.stream("advantage") * f) for r, f in zip(rollouts, factors)
    ]
    results = []
    for members, importance in ((rollouts, factors), (scaled, None), (rollouts, None)):
        model = small_model()
        trainer = make_trainer(model)
        old = trainer.forward.token_stats(members, FINAL).logprobs
        _, metrics = gradients_of(trainer, members, old, FINAL, 1, importance)
        results.append((metrics["policy/loss"], metrics["policy/grad_norm"]))
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-7)
    assert results[0] != pytest.approx(results[2], rel=1e-2)


def test_no_rollouts_is_no_update():
    model = small_model()
    start = {name: p.clone() for name, p in model.named_parameters()}
    metrics = update(make_trainer(model), [], [], FINAL, 1).metrics
    assert metrics["policy/skipped_updates"] == 0 and metrics["policy/live_fraction"] == 0
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


# Edges


@pytest.mark.parametrize("micro_batch_tokens", [10**6, 1])
@pytest.mark.parametrize("policy", [Policy(2), FINAL], ids=name_of)
def test_a_response_without_tokens(policy, micro_batch_tokens):
    # It is in the denominator of seq_mean, and nowhere else; alone in a micro-batch too.
    model, rollouts = small_model(), with_empty_response(random_rollouts())
    trainer = make_trainer(
        model,
        micro_batch_tokens=micro_batch_tokens,
        lr=NO_CHANGE,
        loss={"aggregation": "seq_mean"},
    )
    stats = trainer.forward.token_stats(rollouts, policy)
    assert [len(x) for x in stats.logprobs] == [r.count for r in rollouts]
    assert math.isfinite(stats.mean_entropy())
    expected, _ = literal_gradients(model, rollouts, stats.logprobs, policy)
    (came,), metrics = gradients_of(trainer, rollouts, stats.logprobs, policy, 1)
    check_gradients(came, expected)
    assert all(map(math.isfinite, metrics.values()))


def test_a_mini_batch_without_tokens_changes_nothing():
    model, rollouts = small_model(), with_empty_response([])
    trainer, start = make_trainer(model), parameters(model)
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    update(trainer, rollouts, old, FINAL, 1)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_flat_groups_change_nothing():
    model, rollouts = small_model(), random_rollouts()
    for r in rollouts:
        r.stream("advantage").zero_()
    trainer, start = make_trainer(model), parameters(model)
    old = moved(trainer.forward.token_stats(rollouts, FINAL).logprobs)
    metrics = update(trainer, rollouts, old, FINAL, 1).metrics
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert metrics["policy/grad_norm"] == 0 and metrics["policy/live_fraction"] == 0


def test_metrics_are_means_over_tokens():
    # Not over micro-batches: one with a single long response counts by its tokens. The largest
    # ratio is that of a short response, so not of the last micro-batch.
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model, lr=NO_CHANGE, micro_batch_tokens=1)
    stats = trainer.forward.token_stats(rollouts, FINAL)
    old = moved(stats.logprobs)
    sizes = [len(r.prompt.token_ids) + r.count for r in rollouts]
    shortest = sizes.index(sorted(sizes)[1])
    old[shortest] = old[shortest] - 2
    metrics = update(trainer, rollouts, old, FINAL, 1).metrics
    log_ratio = torch.cat(stats.logprobs) - torch.cat(old)
    ratio, advantages = log_ratio.exp(), torch.cat([r.stream("advantage") for r in rollouts])
    clipped = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    expected = {
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_max": ratio.max(),
        "policy/approx_kl": (ratio - 1 - log_ratio).mean(),
        "policy/clip_fraction": clipped.float().mean(),
        "policy/live_fraction": 1 - clipped.float().mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize("policy", [Policy(2), FINAL], ids=name_of)
def test_bfloat16_stays_close(policy):
    model, rollouts = small_model(), random_rollouts()
    exact = make_trainer(model, lr=NO_CHANGE)
    half = make_trainer(model, lr=NO_CHANGE, dtype="bfloat16", micro_batch_tokens=40)
    stats, rounded = (each.forward.token_stats(rollouts, policy) for each in (exact, half))
    gap = (torch.cat(rounded.logprobs) - torch.cat(stats.logprobs)).abs()
    assert 1e-5 < gap.mean() < 0.03 and gap.max() < 0.3, "rounded, and not by much"
    assert rounded.mean_entropy() == pytest.approx(stats.mean_entropy(), abs=0.02)
    (expected,), _ = gradients_of(exact, rollouts, stats.logprobs, policy, 1)
    (came,), metrics = gradients_of(half, rollouts, rounded.logprobs, policy, 1)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=0.02)
    assert metrics["policy/clip_fraction"] == 0
    assert {name for name, g in came.items() if g is None} == {
        name for name, g in expected.items() if g is None
    }
    ours, theirs = (
        torch.cat([g.flatten() for g in each.values() if g is not None])
        for each in (came, expected)
    )
    assert ours.dtype == torch.float32
    off = float((ours - theirs).norm() / theirs.norm())
    assert 1e-5 < off < 0.1, f"gradient off by {off:.3f} of its norm"
    update(half, rollouts, rounded.logprobs, policy, 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_head_in_bfloat16_is_that_of_the_newest_weights():
    """It is cast once after each change; AdamW's fused kernel does not tell torch of one."""
    trainer, rollouts = make_trainer(small_model(), dtype="bfloat16"), random_rollouts()
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    before = trainer.forward.head()["weight"].clone()
    update(trainer, rollouts, old, FINAL, 1)
    now = trainer.forward.head()["weight"]
    assert torch.equal(now, trainer.model.get_output_embeddings().weight.bfloat16())
    assert not torch.equal(now, before)


def test_epochs_are_passes_over_the_same_mini_batches():
    """Two epochs of two updates are the two updates twice, against the same old log-probs."""
    rollouts, policy = random_rollouts(), Policy(2)
    once = make_trainer(small_model(), updates_per_step=2)
    old = once.forward.token_stats(rollouts, policy).logprobs
    for _ in range(2):
        update(once, rollouts, old, policy, 1)
    both = make_trainer(small_model(), updates_per_step=2, epochs=2)
    metrics = update(both, rollouts, old, policy, 1).metrics
    moved = parameters(small_model())
    for (name, a), b in zip(parameters(once.model).items(), both.model.parameters()):
        assert torch.equal(a, b), name
    assert any(not torch.equal(moved[name], p) for name, p in both.model.named_parameters())
    assert metrics["policy/skipped_updates"] == 0
    assert metrics["policy/ratio_max"] > 1.0001, "the second epoch sees moved weights"
