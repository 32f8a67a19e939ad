"""bupo.rl.update and bupo.rl.schedule against plain torch: whose log-probs, whose gradient.

The literal side sees one unpadded sequence at a time, all logits, and hidden states taken from the
decoder layers by hooks.
"""

import copy
import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rl_samples import (
    DEPTH,
    VOCAB,
    prompt,
    random_rollouts,
    response,
    rewarded,
    small_model,
)

from bupo import ops
from bupo.config import BupoConfig, Config, LossConfig, ModelConfig, OptimizerConfig, RolloutConfig
from bupo.config.objective import AGGREGATIONS
from bupo.rl.losses import with_importance_weights, with_weights
from bupo.rl.schedule import Schedule
from bupo.rl.update import Trainer
from bupo.samples import with_streams
from bupo.types import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
FINAL = Policy(None)
POLICIES = [Policy(1), Policy(2), Policy(2, True), Policy(DEPTH), Policy(DEPTH, True), FINAL]
NO_CHANGE = 1e-30
"""A learning rate that is positive, and moves no float32 parameter."""


def name_of(policy):
    return f"layer-{policy.layer}{'-norm' * policy.final_norm}" if policy.layer else "final"


each_policy = pytest.mark.parametrize("policy", POLICIES, ids=name_of)


def make_trainer(
    model,
    *,
    pad=0,
    temperature=1.0,
    loss=None,
    dtype="float32",
    updates_per_step=1,
    micro_batch_tokens=10**6,
    steps=300,
    **optimizer,
):
    optimizer = {"lr": 1e-3, "weight_decay": 0.0, "grad_clip": 1e9} | optimizer
    config = Config(
        policy="final",
        steps=steps,
        model=ModelConfig(compute_dtype=dtype),
        rollout=RolloutConfig(
            prompts=4 * updates_per_step, samples=3, temperature=temperature, max_new_tokens=11
        ),
        loss=LossConfig(**loss or {}),
        optimizer=OptimizerConfig(
            updates_per_step=updates_per_step, micro_batch_tokens=micro_batch_tokens, **optimizer
        ),
    )
    return Trainer(model, config, pad)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def update(trainer, rollouts, old, policy, step, importance=None):
    """An update against old log-probs, with importance weights where they are given."""
    rollouts = with_streams(rollouts, "old", old)
    if importance is not None:
        rollouts = with_streams(rollouts, "importance", importance)
    return trainer.update(rollouts, policy, step)


def gradients_of(trainer, *arguments):
    """The gradients that every optimiser step of an update saw, None where there is none; and its
    metrics."""
    seen, updates = gradients_and_updates(trainer, *arguments)
    return seen, updates.metrics


def gradients_and_updates(trainer, *arguments):
    seen = []

    def note(*_):
        named = trainer.model.named_parameters()
        seen.append({name: None if p.grad is None else p.grad.clone() for name, p in named})

    handle = trainer.optimizer.register_step_pre_hook(note)
    updates = update(trainer, *arguments)
    handle.remove()
    return seen, updates


def literal_logits(model, ids, policy, temperature=1.0):
    """[L, V] of one sequence under a policy."""
    streams = []

    def note(module, args, out):
        streams.append(out[0] if isinstance(out, tuple) else out)

    with model.model.layers[(policy.layer or DEPTH) - 1].register_forward_hook(note):
        logits = model(torch.tensor([ids]), use_cache=False).logits
    if policy.layer is not None:
        hidden = streams[0]
        if policy.final_norm:
            hidden = model.model.norm(hidden)
        logits = hidden @ model.get_output_embeddings().weight.T
    return logits[0] / temperature


def literal_stats(model, rollout, policy, temperature=1.0):
    """Log-prob and entropy of each response token: the logits before it predict it."""
    asked, answered = rollout.prompt.token_ids, rollout.response_ids
    logp = literal_logits(model, [*asked, *answered], policy, temperature).log_softmax(-1)
    logp = logp[len(asked) - 1 : len(asked) - 1 + len(answered)]
    chosen = logp.gather(-1, torch.tensor(answered, dtype=torch.long)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def literal_loss(model, rollouts, old, policy, temperature=1.0, aggregation="seq_mean", **loss):
    """-J_IPA = -E[1/G sum_i 1/|o_i| sum_t min(rho A, clip(rho) A)], and what LossConfig offers."""
    low, high = 1 - loss.get("clip_low", 0.2), 1 + loss.get("clip_high", 0.2)
    tokens = sum(r.count for r in rollouts)
    total = 0.0
    for rollout, old_logprobs in zip(rollouts, old):
        logp, entropy = literal_stats(model, rollout, policy, temperature)
        advantages = rollout.stream("advantage")
        ratio = (logp - old_logprobs).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        if loss.get("type") == "cispo":
            gain = ratio.detach().clamp(max=high) * advantages * logp
        elif loss.get("dual_clip"):
            bound = loss["dual_clip"] * advantages
            gain = torch.where(advantages < 0, torch.maximum(gain, bound), gain)
        gain = gain + loss.get("entropy_coef", 0.0) * entropy
        weight = {
            "seq_mean": 1 / (len(rollouts) * max(rollout.count, 1)),
            "seq_sum": 1 / len(rollouts),
            "token_mean": 1 / tokens,
        }[aggregation]
        total = total - weight * gain.sum()
    return total


def literal_gradients(model, *arguments, **options):
    model = copy.deepcopy(model)
    loss = literal_loss(model, *arguments, **options)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def moved(logprobs, spread=0.4, seed=1234):
    """Log-probs of an older policy: the ratio leaves the clip range on both sides."""
    generator = torch.Generator().manual_seed(seed)
    return [x + spread * torch.randn(x.shape, generator=generator) for x in logprobs]


def check_gradients(came, expected, tolerance=1e-5):
    """Every parameter's, relative to the largest of all."""
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert largest > 1e-3, "the gradient is not trivially small"
    for name, theirs in expected.items():
        ours = came[name]
        if theirs is None or ours is None:
            rest = ours if theirs is None else theirs
            assert rest is None or not rest.any(), f"{name}: {ours is None=}, {theirs is None=}"
            continue
        off = float((ours - theirs).abs().max()) / largest
        assert off < tolerance, f"{name}: {off:.2e} of the largest gradient off"


# Statistics of tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@each_policy
def test_token_stats(policy, temperature):
    model, rollouts = small_model(), random_rollouts()
    stats = make_trainer(model, temperature=temperature).forward.token_stats(rollouts, policy)
    for n, rollout in enumerate(rollouts):
        with torch.no_grad():
            logprobs, entropy = literal_stats(model, rollout, policy, temperature)
        torch.testing.assert_close(stats.logprobs[n], logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.entropy[n], entropy, rtol=1e-5, atol=1e-5)
    everything = torch.cat(stats.entropy)
    assert stats.mean_entropy() == pytest.approx(float(everything.mean()))
    assert everything.min() < 0.8 * math.log(VOCAB), "no near-uniform policy, which hides mistakes"


def test_the_policies_of_this_file_differ():
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model)
    stats = [torch.cat(trainer.forward.token_stats(rollouts, p).logprobs) for p in POLICIES]
    for i in range(len(POLICIES)):
        for j in range(i):
            gap = float((stats[i] - stats[j]).abs().max())
            same = {name_of(POLICIES[i]), name_of(POLICIES[j])} == {"final", f"layer-{DEPTH}-norm"}
            assert (gap < 1e-5) if same else (gap > 0.1), (POLICIES[i], POLICIES[j], gap)


@pytest.mark.parametrize("micro_batch_tokens", [1, 40])
@pytest.mark.parametrize("policy", [Policy(2), FINAL], ids=name_of)
def test_token_stats_do_not_depend_on_the_batch(policy, micro_batch_tokens):
    model, rollouts = small_model(), random_rollouts()
    expected = make_trainer(model).forward.token_stats(rollouts, policy)
    trainer = make_trainer(model, pad=7, micro_batch_tokens=micro_batch_tokens)
    order = list(range(len(rollouts)))
    random.Random(1).shuffle(order)
    stats = trainer.forward.token_stats([rollouts[i] for i in order], policy)
    for place, i in enumerate(order):
        torch.testing.assert_close(stats.logprobs[place], expected.logprobs[i])
        torch.testing.assert_close(stats.entropy[place], expected.entropy[i])


def test_token_stats_leave_the_model_alone():
    model, rollouts = small_model(), random_rollouts()
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    stats = make_trainer(model).forward.token_stats(rollouts, Policy(1))
    assert not any(x.requires_grad for x in stats.logprobs + stats.entropy)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(ids).logits, before), "outside, it is the final policy again"
    assert model.training


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
    trainer = make_trainer(model, lr=1e-3, warmup_steps=4)
    old = trainer.forward.token_stats(rollouts, FINAL).logprobs
    for step, expected in ((1, 2.5e-4), (2, 5e-4), (4, 1e-3), (5, 1e-3), (100, 1e-3)):
        model.load_state_dict(small_model().state_dict())
        trainer.optimizer.state.clear()
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


# Edges


def with_empty_response(rollouts):
    empty = response(prompt([5, 6]), [], 1).with_stream("advantage", torch.zeros(0))
    return [*rollouts[:4], empty, *rollouts[4:]]


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


def test_logits_are_never_held(monkeypatch):
    # The LM-head op gets the hidden states of response tokens only, and the model no head.
    model, rollouts = small_model(), random_rollouts()
    seen = []
    real = ops.lm_head_logprobs

    def spy(hidden, weight, targets, **kw):
        seen.append(tuple(hidden.shape))
        return real(hidden, weight, targets, **kw)

    monkeypatch.setattr(ops, "lm_head_logprobs", spy)
    make_trainer(model).forward.token_stats(rollouts, FINAL)
    assert seen == [(sum(r.count for r in rollouts), model.config.hidden_size)]


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
