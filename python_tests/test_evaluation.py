"""bupo.evaluation.estimates: Pass@K by enumeration, and errors whose unit is the problem."""

import math
import statistics
from dataclasses import replace
from itertools import combinations

import pytest
from rl_samples import response, rewarded

from bupo import progress
from bupo.config import Config
from bupo.evaluation.estimates import (
    by_dataset,
    evaluate,
    file_name,
    majority,
    pass_at_k,
    problem_rows,
    summarise,
)
from bupo.types import Grades, Prompt


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


def rows_of(rollouts, answers=None):
    return problem_rows(rollouts, [r.reward for r in rollouts], answers)


def summary(rollouts, ks):
    return summarise("set", rows_of(rollouts), ks)


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
    cut = [replace(rewarded(n, 0.0, 4 + n), finish_reason="length") for n in (0, 1, 2)]
    rollouts = [rewarded(3, 0.0, 1), *cut]
    result = summary(rollouts, [1])
    assert (result.length, result.truncated) == (4.0, 0.75)


def test_every_data_source_is_evaluated_apart():
    prompts = [
        Prompt(n, source, "", [n], str(n)) for n, source in enumerate(["b", "a", "b", "a", "a"])
    ]
    assert [[p.index for p in each] for each in by_dataset(prompts).values()] == [[0, 2], [1, 3, 4]]


class OddIsRight:
    """A reward: right where the text is an odd number, its last digit the final answer."""

    def __call__(self, rollouts):
        return Grades([math.nan if r.text == "8" else float(r.text) % 2 for r in rollouts])

    def answers(self, rollouts):
        return [r.text[-1] for r in rollouts]


def test_batches_depend_on_nothing_but_their_place():
    """So the rest of a cut evaluation, and the same evaluation by the other command, are equal."""
    config = Config()
    config.seed, config.eval.samples, config.rollout.batch_size = 5, 3, 7  # two problems a batch
    config.eval.pass_k = [1, 4]
    problems = [Prompt(n, "a/b", "", [n], str(n)) for n in range(5)]
    asked, kept, told = [], [], []

    def generate(batch, samples, seed):
        assert samples == 3
        progress.report(0.5)
        asked.append(([p.index for p in batch], seed))
        return [
            response(p, [1], group, text=str(2 * p.index + k))
            for group, p in enumerate(batch)
            for k in range(3)
        ]

    with progress.watched_by(told.append):
        whole = evaluate("a/b", problems, config, generate, OddIsRight(), kept.extend)
    batches = [([0, 1], "5/eval/a/b/0"), ([2, 3], "5/eval/a/b/2"), ([4], "5/eval/a/b/4")]
    assert asked == batches
    assert told == pytest.approx([0.4 * 0.45, 0.4 + 0.4 * 0.45, 0.8 + 0.2 * 0.45])
    assert [row["answer"] for row in kept] == list("01234")
    assert whole.avg == pytest.approx(1 / 3) and whole.pass_k[4] is None
    assert whole.ungraded == pytest.approx(2 / 15)
    for done, again in ((0, batches), (1, batches), (2, batches[1:]), (3, batches[1:]), (5, [])):
        asked, more = [], []
        result = evaluate("a/b", problems, config, generate, OddIsRight(), more.extend, kept[:done])
        assert asked == again and str(result) == str(whole)
        assert kept[: done - done % 2 if done < 5 else 5] + more == kept


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        ("aab", "xx.", 1),
        ("abb", "x..", 0),
        ("ab", "x.", 0.5),  # a tie
        ("aabbc", "xx..x", 0.5),
        ("abc", "x..", 1 / 3),
        ("-a-", ".x.", 1),  # no answer, no vote
        ("---", "...", 0),
        ("aaa", "xx.", 2 / 3),  # graded unequally, though equal as votes
    ],
)
def test_majority_vote(answers, right, expected):
    votes = [None if a == "-" else a for a in answers]
    assert majority(votes, [c == "x" for c in right]) == pytest.approx(expected)


def test_majority_is_over_problems_and_needs_answers():
    rollouts = results("xx.", "x..", "...")
    rows = rows_of(rollouts, list("aababbabc"))
    result = summarise("set", rows, [1])
    assert result.maj == pytest.approx((1 / 3, statistics.stdev([1, 0, 0]) / math.sqrt(3)))
    row = result.row()
    assert (row["maj"], row["maj_se"]) == result.maj
    assert summary(rollouts, [1]).maj is None and summary(rollouts, [1]).row()["maj"] is None
    assert "maj@3 0.333" in str(result) and "maj" not in str(summary(rollouts, [1]))


def test_what_cannot_be_graded_is_said():
    rollouts = results("x.", "..")
    rollouts[1] = replace(rollouts[1], reward=math.nan)
    assert rows_of(rollouts)[0]["rewards"] == [1.0, None], "JSON knows no nan"
    assert summary(rollouts, []).avg == 0.25
    assert summary(rollouts, []).ungraded == 0.25
    assert str(summary(rollouts, [])).endswith(", 25.0% not graded")


def test_no_two_data_sets_share_a_file():
    names = ["a/b", "a b", "a_b", "x" * 300, "x" * 299, "é", "addition", "../up"]
    files = [file_name(name) for name in names]
    assert len(set(files)) == len(names) and all(len(f) < 120 and "/" not in f for f in files)
    assert file_name("addition") == "addition.jsonl"
