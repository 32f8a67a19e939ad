"""bupo.rl.collect: which prompts a step takes, and what dynamic sampling replaces."""

import math
from dataclasses import replace
from itertools import count

import pytest
from rl_samples import prompt, rewarded

from bupo.data.prompt_order import PromptOrder
from bupo.rl.collect import _flat, collect
from bupo.types import Grades


def order_of(size=20, per_step=4):
    return PromptOrder([prompt([n + 1], index=n) for n in range(size)], per_step, seed=3)


def indices(prompts):
    return [p.index for p in prompts]


def run(order, begin, rewards_of, refills, prompts=4, samples=2):
    """collect() from prompt number `begin` on; rewards_of(index, round) are those of a prompt."""
    calls, rewards = [], []

    def generate(drawn, round_):
        calls.append((round_, indices(drawn)))
        rewards[:] = [x for each in drawn for x in rewards_of(each.index, round_)[:samples]]
        return [
            replace(rewarded(group, 0.0, tokens=1 + round_), prompt=each)
            for group, each in enumerate(drawn)
            for _ in range(samples)
        ]

    def grade(rollouts):
        return Grades(list(rewards), timeouts=len(rollouts), errors=1)

    def take(first, number):
        return order.take(begin + first, number)

    return collect(take, prompts, generate, grade, refills), calls


def test_without_refills_a_step_is_the_orders():
    order = order_of()
    for step in range(11):
        found, calls = run(order, 4 * step, lambda *_: (1.0, 1.0), refills=0)
        expected = indices(order_of().take(4 * step, 4))
        assert calls == [(0, expected)]
        assert indices(r.prompt for r in found.rollouts) == [i for i in expected for _ in "ab"]
        assert found.groups == 4 and found.discarded == 0
        assert (found.grades.timeouts, found.grades.errors) == (8, 1)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_spread_is_that_of_the_rewards_there_are(place):
    """Responses without one neither make a group worth keeping nor worth replacing."""

    def flat(*rewards):
        return _flat([rewarded(0, r) for r in (rewards * 2)[place : place + 3]])

    assert flat(0.5, 0.5, 0.5)
    assert flat(math.nan, 0.5, 0.5)
    assert not flat(math.nan, 0.5, 0.75)
    assert flat(math.nan, math.nan, 0.75), "one reward has no spread"


def test_flat_groups_are_replaced_by_the_next_prompts():
    flat = {}  # round 0: the second and fourth group; round 1: the second again

    def rewards_of(index, round_):
        place = next(flat.setdefault(round_, count()))
        hopeless = (round_ == 0 and place % 4 in (1, 3)) or (round_ == 1 and place == 0)
        return (1.0, 1.0) if hopeless else (0.0, 1.0)

    first, second = indices(order_of().take(0, 4)), indices(order_of().take(4, 4))
    found, calls = run(order_of(), 0, rewards_of, refills=5)
    assert calls == [(0, first), (1, second[:2]), (2, second[2:3])]
    came = [found.rollouts[n].prompt.index for n in (0, 2, 4, 6)]
    assert came == [first[0], second[2], first[2], second[1]]
    assert [r.group for r in found.rollouts] == [0, 0, 1, 1, 2, 2, 3, 3], "places are kept"
    assert found.discarded == 3 and found.groups == 7
    assert found.metrics() == {
        "groups/discarded": 3 / 7,
        "groups/drawn": 7,
        "reward/mean_drawn": pytest.approx((3 * 2 + 4 * 1) / 14),
    }
    assert found.tokens == 8 * 1 + 4 * 2 + 2 * 3
    assert (found.grades.timeouts, found.grades.errors) == (14, 3)


def test_refills_are_bounded_and_the_last_stay():
    found, calls = run(order_of(), 4, lambda *_: (0.5, 0.5), refills=3)
    assert [len(drawn) for _, drawn in calls] == [4] * 4
    assert len(found.rollouts) == 8, "as many as ever"
    assert indices(r.prompt for r in found.rollouts[::2]) == calls[-1][1]
    assert found.discarded == 12 and found.groups == 16
    assert math.isclose(found.metrics()["groups/discarded"], 12 / 16)


@pytest.mark.parametrize("size", [20, 7])
def test_nothing_is_repeated_within_an_epoch(size):
    """Refills move all later steps on; the number taken is all that a resumed run has to know."""
    order, taken = order_of(size, 3), []
    for _ in range(40):
        begin = len(taken)
        _, calls = run(order, begin, lambda i, r: (0.0, float(i % 3 > 0)), refills=2, prompts=3)
        taken += [i for _, drawn in calls for i in drawn]
        assert indices(order_of(size, 3).take(begin, 3)) == taken[begin : begin + 3], "resumed"
    assert len(taken) > 3 * 40 + 20
    for epoch in range(len(taken) // size):
        assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))
