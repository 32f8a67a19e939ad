"""bupo.rl.critic against plain torch: whose state, which loss, what an update moves."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from rl_samples import random_rollouts, small_model
from update_samples import with_empty_response

from bupo.config import Config, CriticConfig, OptimizerConfig, RolloutConfig
from bupo.rl import state_files
from bupo.rl.critic import Critic, explained_variance
from bupo.samples import with_streams

pytestmark = pytest.mark.usefixtures("one_thread")


def make_critic(model=None, *, micro_batch_tokens=10**6, updates=1, clip=0.5, lr=1e-30, **more):
    config = Config(
        advantage="ppo",
        policy="final",
        rollout=RolloutConfig(prompts=4 * updates, samples=3, max_new_tokens=11),
        critic=CriticConfig(lr=lr, clip=clip),
        optimizer=OptimizerConfig(
            updates_per_step=updates, micro_batch_tokens=micro_batch_tokens,
            **{"grad_clip": 1e9, "weight_decay": 0.0} | more,
        ),
    )  # fmt: skip
    return Critic(model or small_model(dtype=torch.float64), config, pad=7)


def with_head(critic, seed=0):
    torch.manual_seed(seed)
    for parameter in critic.head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return critic


def literal_values(critic, rollout):
    """The head on the normed hidden state before each response token; one sequence, no padding."""
    seen = []
    model = critic.forward.model
    with model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out)):
        model(torch.tensor([rollout.token_ids]), use_cache=False)
    first = len(rollout.prompt.token_ids) - 1
    states = seen[0][0][first : first + rollout.count]
    return states @ critic.head.weight[0] + critic.head.bias[0]


def prepared(seed=3):
    """Rollouts with old values and returns that reach both sides of the clip."""
    rollouts, critic = random_rollouts(), with_head(make_critic())
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rollout in critic.evaluate(rollouts):
        noise = torch.randn(2, rollout.count, generator=generator, dtype=torch.float64)
        value = rollout.stream("value")
        rollout = rollout.with_stream("value", value + noise[0])
        found.append(rollout.with_stream("return", value + noise[1]))
    return found


@pytest.mark.parametrize("micro_batch_tokens", [10**6, 1])
def test_values_are_of_the_state_before_the_token(micro_batch_tokens):
    critic = with_head(make_critic(micro_batch_tokens=micro_batch_tokens))
    rollouts = critic.evaluate(with_empty_response(random_rollouts()))
    for rollout in rollouts:
        expected = literal_values(critic, rollout).detach() if rollout.count else []
        came = rollout.stream("value").tolist()
        assert came == pytest.approx([float(x) for x in expected], abs=1e-9)
    first, before = rollouts[0], rollouts[0].stream("value")
    first.token_ids[first.positions[0]] = (first.response_ids[0] + 1) % 40
    after = critic.evaluate([first])[0].stream("value")
    assert after[0] == pytest.approx(float(before[0]), abs=1e-12), "not after the action"
    assert len(after) == 1 or after[1] != before[1]


def test_a_new_critic_says_zero():
    assert not any(r.stream("value").any() for r in make_critic().evaluate(random_rollouts()))


def slow_loss(critic, rollouts, eps):
    kept = [r for r in rollouts if not r.dropped]
    total, clipped = 0.0, 0
    for rollout in kept:
        values = literal_values(critic, rollout)
        for t in range(rollout.count):
            old, target = float(rollout.stream("value")[t]), float(rollout.stream("return")[t])
            free = (values[t] - target) ** 2
            inside = min(max(values[t].item(), old - eps), old + eps)
            bounded = (inside - target) ** 2
            if bounded > free.item():
                clipped += 1
                total = total + bounded / 2
            else:
                total = total + free / 2
    count = sum(r.count for r in kept)
    return total / count, clipped / count


@pytest.mark.parametrize("dropped", [(), (0, 5)])
@pytest.mark.parametrize("micro_batch_tokens", [10**6, 30, 1])
def test_loss_and_gradient_against_a_slow_loop(micro_batch_tokens, dropped):
    rollouts = prepared()
    rollouts = [replace(r, dropped=n in dropped) for n, r in enumerate(rollouts)]
    critic = with_head(make_critic(micro_batch_tokens=micro_batch_tokens), seed=1)
    plain = copy.deepcopy(critic)
    expected, clipped = slow_loss(plain, rollouts, 0.5)
    expected.backward()
    came = {}

    def note(*_):
        came.update({n: p.grad.clone() for n, p in critic.parameters().items()})

    handle = critic.optimizer.register_step_pre_hook(note)
    metrics = critic.update(rollouts, 1).metrics
    handle.remove()
    assert metrics["critic/loss"] == pytest.approx(expected.item(), rel=1e-9)
    assert metrics["critic/clip_fraction"] == pytest.approx(clipped) and 0.1 < clipped < 0.9
    for name, parameter in plain.parameters().items():
        torch.testing.assert_close(came[name], parameter.grad, rtol=1e-6, atol=1e-9)
    assert came["head.weight"].abs().max() > 1e-3


def test_updates_move_the_critic_and_nothing_else():
    rollouts, policy = prepared(), small_model(dtype=torch.float64)
    model = copy.deepcopy(policy)
    critic = make_critic(model, updates=2, lr=1e-3)
    unembedding = model.lm_head.weight.detach().clone()
    start = {name: p.detach().clone() for name, p in critic.parameters().items()}
    critic.update(rollouts, 1)  # the head is zero: the backbone has no gradient yet
    critic.update(rollouts, 2)
    for name, parameter in critic.parameters().items():
        assert not torch.equal(parameter, start[name]), name
        assert critic.optimizer.state[parameter]["step"] == 4, name
    assert torch.equal(model.lm_head.weight, unembedding)
    assert "backbone.lm_head.weight" not in start


def test_it_learns_what_the_returns_are():
    """Here: whether the token before, the last one that V may know, is odd."""
    critic = make_critic(lr=3e-3, updates=2, clip=10.0)
    rollouts = [
        r.with_stream("return", torch.tensor([float(r.token_ids[p - 1] % 2) for p in r.positions]))
        for r in random_rollouts()
    ]
    for step in range(1, 40):
        critic.update(critic.evaluate(rollouts), step)
    assert explained_variance(critic.evaluate(rollouts)) > 0.9


def test_explained_variance():
    rollouts = prepared()
    rollouts[2] = replace(rollouts[2], dropped=True)
    kept = [r for n, r in enumerate(rollouts) if n != 2]
    returns = [float(x) for r in kept for x in r.stream("return")]
    values = [float(x) for r in kept for x in r.stream("value")]
    errors = [x - v for x, v in zip(returns, values)]

    def variance(x):
        return sum((a - sum(x) / len(x)) ** 2 for a in x) / len(x)

    expected = 1 - variance(errors) / variance(returns)
    assert explained_variance(rollouts) == pytest.approx(expected)
    rollouts = with_streams(rollouts, "value", [r.stream("return") for r in rollouts])
    assert explained_variance(rollouts) == pytest.approx(1)
    rollouts = with_streams(rollouts, "return", [torch.ones(r.count) for r in rollouts])
    assert explained_variance(rollouts) == 0 == explained_variance([])


def test_numbers_that_are_not_finite_are_skipped():
    rollouts = prepared()
    rollouts[0].stream("return")[0] = math.nan
    critic = make_critic(updates=2, lr=1e-3)
    updates = critic.update(rollouts, 1)
    metrics = updates.metrics
    (why,) = updates.skipped
    assert why.startswith("critic update 1 of 2: returns: 1 of ") and "are not finite" in why
    assert metrics["critic/skipped_updates"] == 1 and math.isfinite(metrics["critic/loss"])
    assert all(p.isfinite().all() for p in critic.parameters().values())


def test_a_gradient_that_is_not_finite_is_named():
    """And not one that it was spread to by clipping."""
    critic = make_critic(updates=1, lr=1e-3)
    critic.update(prepared(), 1)  # a head of zeros hands no gradient down
    name = "backbone.model.layers.1.mlp.down_proj.weight"
    critic.parameters()[name].register_hook(lambda g: g * math.nan)
    updates = critic.update(prepared(), 2)
    assert updates.metrics["critic/skipped_updates"] == 1
    assert updates.skipped[0].startswith(f"critic update 1 of 1: gradient of {name}: ")


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(tmp_path, tied):
    rollouts = prepared()
    critic = make_critic(small_model(tied=tied), lr=1e-3)
    critic.update(rollouts, 1)
    state_files.write(tmp_path / "critic", critic.divided_state())
    again = make_critic(small_model(tied=tied), lr=1e-3)
    again.load(tmp_path / "critic")
    for step in (2, 3):
        assert critic.update(rollouts, step).metrics == again.update(rollouts, step).metrics
    for (name, a), b in zip(critic.parameters().items(), again.parameters().values()):
        assert torch.equal(a, b), name
    less = critic.divided_state()
    del less["head.bias"]
    state_files.write(tmp_path / "less", less)
    with pytest.raises(ValueError, match=r"missing or belong to no parameter: \['head.bias'\]"):
        again.load(tmp_path / "less")
