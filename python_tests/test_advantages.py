"""bupo.rl.advantages against the formula, written as a loop."""

import math
import random

import pytest
import torch
from rl_samples import rewarded

from bupo.rl.advantages import TOLERANCE, by_group, grpo


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
    assert grpo([r for group in rollouts.values() for r in group]) == 0
    for n, rewards in groups.items():
        values = [float(r.advantages[0]) for r in rollouts[n]]
        assert values == pytest.approx(literal(rewards), rel=1e-6, abs=1e-7), f"group {n}"
    binary = [float(r.advantages[0]) for r in rollouts[5]]
    assert max(map(abs, binary)) > 0.1, "the sample has spread"


def test_groups_are_by_number_not_by_place():
    groups = random_groups()
    rollouts = [rewarded(n, r) for n, rewards in groups.items() for r in rewards]
    random.Random(1).shuffle(rollouts)
    grpo(rollouts)
    for n in groups:
        group = [r for r in rollouts if r.group == n]
        expected = literal([r.reward for r in group])
        assert [float(r.advantages[0]) for r in group] == pytest.approx(expected, rel=1e-6)
    assert {r.group: len(g) for g in by_group(rollouts) for r in g} == {
        n: len(rewards) for n, rewards in groups.items()
    }


@pytest.mark.parametrize("rewards", [[0.0] * 8, [1.0] * 8, [0.1] * 7, [1 / 3] * 5, [1e6 / 7] * 6])
def test_equal_rewards_give_exactly_zero(rewards):
    # 0.1 seven times has mean 0.09999999999999999 and a std of 1.5e-17: noise, not signal.
    rollouts = [rewarded(0, r, tokens=3) for r in rewards]
    assert grpo(rollouts) == 1.0
    assert all(r.advantages.tolist() == [0.0] * 3 for r in rollouts)


def test_spread_within_the_tolerance_is_noise():
    below = [rewarded(0, 0.0), rewarded(0, 0.5 * TOLERANCE)]
    above = [rewarded(1, 0.0), rewarded(1, 3 * TOLERANCE)]
    assert grpo(below + above) == 0.5
    assert all(r.advantages.tolist() == [0.0] for r in below)
    assert above[0].advantages.item() < -0.3 and above[1].advantages.item() > 0.3


def test_share_of_flat_groups():
    def rollouts(*groups):
        return [rewarded(n, r) for n, rewards in enumerate(groups) for r in rewards]

    assert grpo(rollouts([0, 1], [1, 1], [0, 0], [1, 0])) == 0.5
    assert grpo(rollouts([0, 1], [1, 0], [0, 2])) == 0.0
    assert grpo(rollouts([0, 0], [1, 1, 1])) == 1.0
    assert grpo([]) == 0.0


def test_one_response_has_no_group_to_compare_with():
    alone = rewarded(0, 1.0, tokens=4)
    pair = [rewarded(1, 0.0), rewarded(1, 1.0)]
    assert grpo([alone, *pair]) == 0.5
    assert alone.advantages.tolist() == [0.0] * 4, "not nan, which the std of one reward is"


def test_every_token_has_the_advantage_of_its_response():
    rollouts = [rewarded(0, reward, tokens) for reward, tokens in ((0.0, 1), (1.0, 5), (0.5, 0))]
    grpo(rollouts)
    for rollout, value in zip(rollouts, literal([0.0, 1.0, 0.5])):
        assert rollout.advantages.shape == (len(rollout.token_ids),)
        assert rollout.advantages.dtype == torch.float32
        assert rollout.advantages.tolist() == pytest.approx([value] * len(rollout.token_ids))
