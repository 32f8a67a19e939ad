"""bupo.rl.evaluation: Pass@K by enumeration, and errors whose unit is the problem."""

import math
import statistics
from itertools import combinations

import pytest
from rl_samples import rewarded

from bupo.rl.evaluation import Graded, by_dataset, by_problem, evaluate, pass_at_k, summarise
from bupo.rl.types import Prompt, Rollout


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for correct in range(n + 1):
        right = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(right, k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, correct, k) == pytest.approx(share, abs=1e-12), (n, correct, k)


def test_pass_at_k_does_not_jump_to_one_at_c_equal_k():
    # The paper's code returns 1.0 here.
    assert pass_at_k(256, 4, 4) == pytest.approx(0.0612, abs=5e-4)
    assert pass_at_k(256, 256, 4) == 1.0
    assert pass_at_k(256, 0, 256) == 0.0
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5), "no overflow of C(n, k)"


def test_pass_at_k_of_more_samples_than_there_are_is_undefined():
    assert math.isnan(pass_at_k(4, 4, 5))
    assert math.isnan(pass_at_k(1, 0, 2))


def results(*problems):
    """Rollouts of problems, each a string of right (x) and wrong (.) samples."""
    return [rewarded(n, float(c == "x")) for n, marks in enumerate(problems) for c in marks]


def summary(rollouts, ks):
    return summarise("set", [Graded.of(g) for g in by_problem(rollouts)], ks)


def test_average_and_its_error_by_problem():
    problems = ["xxxx", "....", "xx..", "x..."]
    result = summary(results(*problems), [1, 2, 4, 8])
    shares = [1.0, 0.0, 0.5, 0.25]
    assert (result.dataset, result.problems, result.samples) == ("set", 4, 4)
    assert result.avg == pytest.approx(statistics.fmean(shares))
    # Sixteen independent samples would claim sqrt(p (1 - p) / 16) = 0.12; the samples of a problem
    # are not independent.
    assert result.avg_se == pytest.approx(statistics.stdev(shares) / math.sqrt(4))
    assert result.avg_se > 0.2
    pairs = [1.0, 0.0, 5 / 6, 0.5]
    estimate, error = result.pass_k[2]
    assert estimate == pytest.approx(statistics.fmean(pairs))
    assert error == pytest.approx(statistics.stdev(pairs) / math.sqrt(4))
    assert result.pass_k[1] == pytest.approx((result.avg, result.avg_se))
    assert result.pass_k[4][0] == 0.75
    assert result.pass_k[8] is None


def test_problems_are_by_group_number():
    rollouts = results("xx", "..", "x.")
    mixed = rollouts[::2] + rollouts[1::2]
    assert summary(mixed, [1, 2]) == summary(rollouts, [1, 2])


def test_one_problem_has_no_error():
    result = summary(results("x."), [1])
    assert result.avg == 0.5 and math.isnan(result.avg_se) and math.isnan(result.pass_k[1][1])


def test_a_response_is_right_above_one_half():
    rollouts = [rewarded(0, r) for r in (0.5, 0.51, 1.0, -1.0)]
    assert summary(rollouts, []).avg == 0.5


def test_length_and_truncated_share():
    rollouts = [rewarded(n, 0.0, tokens) for n, tokens in enumerate((1, 4, 4, 7))]
    rollouts[1].finish_reason = rollouts[3].finish_reason = rollouts[2].finish_reason = "length"
    result = summary(rollouts, [1])
    assert (result.length, result.truncated) == (4.0, 0.75)


def test_every_data_source_is_evaluated_apart():
    prompts = [
        Prompt(n, source, "", [n], str(n)) for n, source in enumerate(["b", "a", "b", "a", "a"])
    ]
    assert [[p.index for p in each] for each in by_dataset(prompts).values()] == [[0, 2], [1, 3, 4]]
    asked = []

    def generate(problems):
        asked.append([p.index for p in problems])
        return [
            Rollout(p, group, [1], [0.0], "stop", str(p.index))
            for group, p in enumerate(problems)
            for _ in range(2)
        ]

    def grade(rollouts):
        for n, rollout in enumerate(rollouts):
            rollout.reward = float(rollout.prompt.source == "a" and n % 2)

    b, a = evaluate(generate, grade, prompts, [1, 2])
    assert asked == [[0, 2], [1, 3, 4]]
    assert (b.dataset, b.problems, b.avg, b.pass_k[2]) == ("b", 2, 0.0, (0.0, 0.0))
    assert (a.dataset, a.problems, a.avg, a.pass_k[2][0]) == ("a", 3, 0.5, 1.0)
    row = a.row()
    assert (row["n"], row["k_samples"], row["avg"], row["pass@2"]) == (3, 2, 0.5, 1.0)
