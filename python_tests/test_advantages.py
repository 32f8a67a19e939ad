"""bupo.rl.advantages against the formula, written as a loop."""

import math
import random
from dataclasses import replace

import pytest
import torch
from rl_samples import rewarded

from bupo.config import ADVANTAGES
from bupo.rl.advantages import ESTIMATORS, by_group, estimate, flat_groups, gae, penalise_length
from bupo.samples import with_streams
from bupo.types import REWARD_TOLERANCE


def grpo(rollouts):
    return estimate(rollouts, "grpo")


def values(rollouts, name="advantage"):
    return [r.stream(name).tolist() for r in rollouts]


def literal(rewards):
    """(r_i - mean) / (std + 1e-6), std unbiased."""
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
    return [(r - mean) / (math.sqrt(variance) + 1e-6) for r in rewards]


def random_groups():
    """group: rewards. Binary and continuous, of different sizes."""
    rng = random.Random(0)
    groups = {n: [float(rng.random() < 0.5) for _ in range(8)] for n in (5, 3, 8)}
    groups |= {n: [rng.gauss(0, 3) for _ in range(2 + n)] for n in (0, 1, 2)}
    groups[9] = [0.5, 0.5 + 1e-3]  # little spread, but more than noise
    return groups


def test_formula():
    groups = random_groups()
    rollouts = {n: [rewarded(n, r) for r in rewards] for n, rewards in groups.items()}
    everything = [r for group in rollouts.values() for r in group]
    assert flat_groups(everything) == 0
    found = grpo(everything)
    for n, rewards in groups.items():
        came = [float(r.stream("advantage")[0]) for r in found if r.group == n]
        assert came == pytest.approx(literal(rewards), rel=1e-6, abs=1e-7), f"group {n}"
    binary = [float(r.stream("advantage")[0]) for r in found if r.group == 5]
    assert max(map(abs, binary)) > 0.1, "the sample has spread"


def test_groups_are_by_number_not_by_place():
    groups = random_groups()
    rollouts = [rewarded(n, r) for n, rewards in groups.items() for r in rewards]
    random.Random(1).shuffle(rollouts)
    rollouts = grpo(rollouts)
    for n in groups:
        group = [r for r in rollouts if r.group == n]
        expected = literal([r.reward for r in group])
        assert [float(r.stream("advantage")[0]) for r in group] == pytest.approx(expected, rel=1e-6)
    assert {rollouts[i].group: len(g) for g in by_group(rollouts) for i in g} == {
        n: len(rewards) for n, rewards in groups.items()
    }


@pytest.mark.parametrize("rewards", [[0.0] * 8, [1.0] * 8, [0.1] * 7, [1 / 3] * 5, [1e6 / 7] * 6])
def test_equal_rewards_give_exactly_zero(rewards):
    # 0.1 seven times has mean 0.09999999999999999 and a std of 1.5e-17: noise, not signal.
    rollouts = [rewarded(0, r, tokens=3) for r in rewards]
    assert flat_groups(rollouts) == 1.0
    assert values(grpo(rollouts)) == [[0.0] * 3] * len(rewards)


def test_spread_within_the_tolerance_is_noise():
    below = [rewarded(0, 0.0), rewarded(0, 0.5 * REWARD_TOLERANCE)]
    above = [rewarded(1, 0.0), rewarded(1, 3 * REWARD_TOLERANCE)]
    assert flat_groups(below + above) == 0.5
    *flat, (low,), (high,) = values(grpo(below + above))
    assert flat == [[0.0], [0.0]] and low < -0.3 and high > 0.3


def test_share_of_flat_groups():
    def rollouts(*groups):
        return [rewarded(n, r) for n, rewards in enumerate(groups) for r in rewards]

    assert flat_groups(rollouts([0, 1], [1, 1], [0, 0], [1, 0])) == 0.5
    assert flat_groups(rollouts([0, 1], [1, 0], [0, 2])) == 0.0
    assert flat_groups(rollouts([0, 0], [1, 1, 1])) == 1.0
    assert flat_groups([]) == 0.0


def test_one_response_has_no_group_to_compare_with():
    alone = rewarded(0, 1.0, tokens=4)
    pair = [rewarded(1, 0.0), rewarded(1, 1.0)]
    assert flat_groups([alone, *pair]) == 0.5
    assert values(grpo([alone, *pair]))[0] == [0.0] * 4, "not nan, which the std of one reward is"


def test_every_token_has_the_advantage_of_its_response():
    rollouts = [rewarded(0, reward, tokens) for reward, tokens in ((0.0, 1), (1.0, 5), (0.5, 0))]
    for rollout, value in zip(grpo(rollouts), literal([0.0, 1.0, 0.5])):
        assert rollout.stream("advantage").shape == (rollout.count,)
        assert rollout.stream("advantage").dtype == torch.float32
        assert rollout.stream("advantage").tolist() == pytest.approx([value] * rollout.count)


def literal_value(name, rewards, i):
    mean = sum(rewards) / len(rewards)
    others = [x for j, x in enumerate(rewards) if j != i]
    if name == "grpo":
        return literal(rewards)[i]
    if name == "rloo":
        return rewards[i] - sum(others) / len(others)
    return rewards[i] if name in ("reinforce_pp", "ppo") else rewards[i] - mean


def literal_of(name, groups):
    """[group][response][token] advantages, straight from the formulas."""
    values = [
        [[literal_value(name, rewards, i)] * lengths[i] for i in range(len(rewards))]
        for rewards, lengths in groups
    ]
    if name.startswith("reinforce") or name == "ppo":
        tokens = [x for row in values for response in row for x in response]
        mean = sum(tokens) / len(tokens)
        std = math.sqrt(sum((x - mean) ** 2 for x in tokens) / len(tokens))
        values = [[[(x - mean) / (std + 1e-8) for x in t] for t in row] for row in values]
    return values


def without_values(rollouts):
    """A critic that has learnt nothing: PPO, with gamma and lambda of 1, is then REINFORCE++."""
    return with_streams(rollouts, "value", (torch.zeros(r.count) for r in rollouts))


def test_the_configuration_knows_every_estimator():
    assert tuple(ESTIMATORS) == ADVANTAGES


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_against_literal_loops(name):
    rng = random.Random(2)
    groups = [
        ([rng.gauss(n, 2) for _ in range(size)], [rng.randint(1, 6) for _ in range(size)])
        for n, size in enumerate((4, 2, 5))
    ]
    rollouts = [
        [rewarded(n, r, tokens=t) for r, t in zip(*group)] for n, group in enumerate(groups)
    ]
    came = values(estimate(without_values([r for group in rollouts for r in group]), name))
    expected = [tokens for group in literal_of(name, groups) for tokens in group]
    for found, tokens in zip(came, expected, strict=True):
        assert found == pytest.approx(tokens, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_signal_is_exactly_zero(name):
    """Equal rewards everywhere: also after whitening, whose std would be noise."""
    rollouts = [rewarded(n, 0.1, tokens=3) for n in range(3) for _ in range(7)]
    assert values(estimate(without_values(rollouts), name)) == [[0.0] * 3] * 21
    assert estimate([], name) == []


def test_whitening_is_over_tokens_not_responses():
    """A long response counts as often as it has tokens."""
    rollouts = [rewarded(0, 1.0, tokens=9), rewarded(0, 0.0, tokens=1)]
    long, short = values(estimate(rollouts, "reinforce_pp"))
    assert sum(long) + sum(short) == pytest.approx(0, abs=1e-5)
    assert short[0] == pytest.approx(-3.0, rel=1e-5)


def test_token_costs_are_taken_from_the_reward_to_go():
    """REINFORCE++: sum over s >= t of (1[s last] r - beta k1_s), then whitened."""
    rng = random.Random(3)
    rollouts = [rewarded(n % 3, rng.gauss(0, 1), tokens=rng.randint(1, 5)) for n in range(6)]
    costs = [torch.tensor([rng.gauss(0, 0.5) for _ in r.response_ids]) for r in rollouts]
    rollouts = estimate(with_streams(rollouts, "cost", costs), "reinforce_pp")
    to_go = []
    for rollout, cost in zip(rollouts, costs):
        last = rollout.count - 1
        to_go.append([
            sum((s == last) * rollout.reward - float(cost[s]) for s in range(t, last + 1))
            for t in range(last + 1)
        ])  # fmt: skip
    tokens = [x for response in to_go for x in response]
    mean = sum(tokens) / len(tokens)
    std = math.sqrt(sum((x - mean) ** 2 for x in tokens) / len(tokens))
    for rollout, expected in zip(rollouts, to_go):
        came = rollout.stream("advantage").tolist()
        assert came == pytest.approx([(x - mean) / (std + 1e-8) for x in expected], rel=1e-5)


def test_equal_rewards_with_costs_are_a_signal():
    def advantages(costs):
        rollouts = with_streams([rewarded(0, 1.0, tokens=2) for _ in costs], "cost", costs)
        assert flat_groups(rollouts) == 1
        return values(estimate(rollouts, "reinforce_pp"))

    equal = advantages([torch.tensor([0.0, 0.1])] * 3)
    assert equal == [[0.0, 0.0]] * 3
    first, second, third = advantages([torch.tensor([0.0, 0.1 * n]) for n in range(3)])
    assert first[0] > 0.5 > second[0] > third[0] and third[0] < -0.5


def test_soft_penalty_for_length():
    """DAPO, eq. 13, with L_max = 10 and L_cache = 4."""
    rollouts = [rewarded(0, 1.0, tokens=n) for n in (0, 5, 6, 7, 9, 10)]
    penalised = penalise_length(rollouts, longest=10, buffer=4)
    assert [r.penalty for r in penalised] == [0, 0, 0, 0.25, 0.75, 1]
    expected = literal([1 - r.penalty for r in penalised])
    for found, value in zip(values(grpo(penalised))[1:], expected[1:]):
        assert found[0] == pytest.approx(value, rel=1e-5)
    assert [r.reward for r in penalised] == [1.0] * 6, "what is logged stays the reward"
    token_wise = values(estimate(penalised, "reinforce_pp"))
    assert token_wise[-1][0] < token_wise[1][0]
    assert [r.penalty for r in penalise_length(penalised, longest=10, buffer=0)] == [0] * 6


def test_whitening_is_over_the_tokens_that_are_kept():
    rollouts = [rewarded(0, r, tokens=2) for r in (0.0, 1.0, 50.0)]
    rollouts[2] = replace(rollouts[2], dropped=True)
    first, second, dropped = values(estimate(rollouts, "reinforce_pp"))
    assert first == pytest.approx([-1, -1], rel=1e-5)
    assert second == pytest.approx([1, 1], rel=1e-5)
    assert all(map(math.isfinite, dropped))


def literal_gae(rewards, values, gamma, gae_lambda):
    """A_t = sum over k >= t of (gamma lambda)^(k - t) d_k, the sum written out."""
    last = len(rewards) - 1
    following = [*values[1:], 0.0]
    steps = [rewards[t] + gamma * following[t] - values[t] for t in range(last + 1)]
    return [
        sum((gamma * gae_lambda) ** (k - t) * steps[k] for k in range(t, last + 1))
        for t in range(last + 1)
    ]


@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.95), (0.5, 1.0), (0.0, 0.5)]
)
def test_gae_against_the_sum(gamma, gae_lambda):
    rng = random.Random(4)
    sizes = (3, 1, 0, 7, 2)
    rewards, values = ([[rng.gauss(0, 1) for _ in range(n)] for n in sizes] for _ in "rv")
    double = [[torch.tensor(x, dtype=torch.float64) for x in each] for each in (rewards, values)]
    came = gae(*double, gamma, gae_lambda)
    for found, reward, value in zip(came, rewards, values, strict=True):
        expected = literal_gae(reward, value, gamma, gae_lambda)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert gae([], [], gamma, gae_lambda) == []
    assert [len(x) for x in gae([double[0][2]], [double[1][2]], gamma, gae_lambda)] == [0]


def test_ppo_whitens_advantages_and_not_returns():
    rng = random.Random(5)
    rollouts = [rewarded(n, rng.gauss(0, 1), tokens=1 + n) for n in range(4)]
    costs = [torch.tensor([rng.gauss(0, 0.3) for _ in r.response_ids]) for r in rollouts]
    state_values = [torch.tensor([rng.gauss(0, 1) for _ in r.response_ids]) for r in rollouts]
    rollouts[3] = replace(rollouts[3], dropped=True)
    rollouts = with_streams(with_streams(rollouts, "cost", costs), "value", state_values)
    rollouts = estimate(rollouts, "ppo", 0.9, 0.8)
    raw = []
    for rollout, cost in zip(rollouts, costs):
        rewards = [-float(c) for c in cost]
        rewards[-1] += rollout.reward
        raw.append(literal_gae(rewards, rollout.stream("value").tolist(), 0.9, 0.8))
        returns = [a + float(v) for a, v in zip(raw[-1], rollout.stream("value"))]
        assert rollout.stream("return").tolist() == pytest.approx(returns, rel=1e-5, abs=1e-6)
    kept = [a for response in raw[:3] for a in response]
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((a - mean) ** 2 for a in kept) / len(kept))
    for rollout, advantages in zip(rollouts, raw):
        white = [(a - mean) / (std + 1e-8) for a in advantages]
        assert rollout.stream("advantage").tolist() == pytest.approx(white, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_response_without_a_reward_changes_nothing_for_the_others(name):
    """As if it had never been sampled; and it has no advantage itself."""

    def responses(rewards):
        found = [rewarded(n // 3, reward, 2 + n) for n, reward in enumerate(rewards)]
        ramps = (torch.linspace(0, 1, r.count) for r in found)
        return [replace(r, dropped=r.ungraded) for r in with_streams(found, "value", ramps)]

    rewards = [1.0, 0.0, math.nan, math.nan, 0.5, 0.25, math.nan, math.nan, math.nan]
    some = responses(rewards)
    kept = [r for r in some if not r.ungraded]
    assert flat_groups(some) == flat_groups(kept) == 0, "a group that has no rewards is no group"
    found = estimate(some, name)
    for a, b in zip([r for r in found if not r.ungraded], estimate(kept, name), strict=True):
        assert torch.equal(a.stream("advantage"), b.stream("advantage"))
    assert all(torch.isfinite(r.stream("advantage")).all() for r in found)
