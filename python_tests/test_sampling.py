"""bupo.rl.collect: which prompts a step takes, and what dynamic sampling replaces."""

import math
from itertools import count

import pytest
from rl_samples import prompt, rewarded

from bupo.data.prompts import PromptOrder
from bupo.rl.collect import PromptStream, _flat, collect
from bupo.types import RewardReport


def stream_of(size=20, per_step=4, drawn=0):
    prompts = [prompt([n + 1], index=n) for n in range(size)]
    return PromptStream(PromptOrder(prompts, per_step, seed=3).take, per_step, drawn)


def indices(prompts):
    return [p.index for p in prompts]


def run(stream, step, rewards_of, refills, prompts=4, samples=2):
    """collect(), of an engine whose rewards are rewards_of(prompt index, round)."""
    calls = []

    def generate(drawn, round_):
        calls.append((round_, indices(drawn)))
        rollouts = []
        for group, each in enumerate(drawn):
            for n in range(samples):
                rollout = rewarded(group, 0.0, tokens=1 + round_)
                rollout.prompt, rollout.reward = each, rewards_of(each.index, round_)[n]
                rollouts.append(rollout)
        return rollouts

    sample = collect(stream, step, prompts, generate, lambda r: RewardReport(len(r), 1), refills)
    return sample, calls


def test_without_refills_a_step_is_the_orders():
    stream, plain = stream_of(), stream_of()
    for step in range(1, 12):
        sample, calls = run(stream, step, lambda *_: (1.0, 1.0), refills=0)
        expected = indices(plain.at(step, 0, 4))
        assert calls == [(0, expected)]
        assert indices(r.prompt for r in sample.rollouts) == [i for i in expected for _ in "ab"]
        assert sample.drawn == sample.discarded == 0
        assert sample.report == RewardReport(8, 1)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_spread_is_that_of_the_rewards_there_are(place):
    """Responses without one neither make a group worth keeping nor worth replacing."""
    group = [rewarded(0, 0.5) for _ in range(3)]
    assert _flat(group)
    group[place].reward = math.nan
    assert _flat(group)
    group[place - 1].reward = 0.75
    assert not _flat(group)
    group[place - 2].reward = math.nan
    assert _flat(group), "one reward has no spread"


def test_flat_groups_are_replaced_by_the_next_prompts():
    flat = {}  # round 0: the second and fourth group; round 1: the second again

    def rewards_of(index, round_):
        flat.setdefault(round_, count())
        place = next(flat[round_]) // 2
        hopeless = (round_ == 0 and place % 4 in (1, 3)) or (round_ == 1 and place == 0)
        return (1.0, 1.0) if hopeless else (0.0, 1.0)

    stream = stream_of()
    first, second = indices(stream.at(1, 0, 4)), indices(stream.at(1, 4, 4))
    sample, calls = run(stream, 1, rewards_of, refills=5)
    assert calls == [(0, first), (1, second[:2]), (2, second[2:3])]
    came = [sample.rollouts[n].prompt.index for n in (0, 2, 4, 6)]
    assert came == [first[0], second[2], first[2], second[1]]
    assert [r.group for r in sample.rollouts] == [0, 0, 1, 1, 2, 2, 3, 3], "places are kept"
    assert sample.drawn == sample.discarded == 3 and sample.groups == 7
    assert sample.metrics() == {
        "groups/discarded": 3 / 7,
        "groups/drawn": 7,
        "reward/mean_drawn": pytest.approx((3 * 2 + 4 * 1) / 14),
    }
    assert sample.tokens == 8 * 1 + 4 * 2 + 2 * 3
    assert sample.report == RewardReport(14, 3)


def test_refills_are_bounded_and_the_last_stay():
    stream = stream_of()
    sample, calls = run(stream, 2, lambda *_: (0.5, 0.5), refills=3)
    assert [len(drawn) for _, drawn in calls] == [4] * 4
    assert len(sample.rollouts) == 8, "as many as ever"
    assert indices(r.prompt for r in sample.rollouts[::2]) == calls[-1][1]
    assert sample.discarded == sample.drawn == 12
    assert math.isclose(sample.metrics()["groups/discarded"], 12 / 16)


@pytest.mark.parametrize("size", [20, 7])
def test_nothing_is_repeated_within_an_epoch(size):
    """Refills move all later steps on; the number drawn is all that a resumed run has to know."""
    stream, taken, drawn_at = stream_of(size, 3), [], []
    for step in range(1, 40):
        drawn_at.append(stream.drawn)
        sample, calls = run(
            stream, step, lambda i, r: (0.0, float(i % 3 > 0)), refills=2, prompts=3
        )
        taken += [i for _, drawn in calls for i in drawn]
        stream.drawn += sample.drawn
    for epoch in range(len(taken) // size):
        assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert stream.drawn > 20
    for step in (2, 17, 39):
        resumed = stream_of(size, 3, drawn_at[step - 1])
        place = (step - 1) * 3 + drawn_at[step - 1]
        assert indices(resumed.at(step, 0, 3)) == taken[place : place + 3]
