"""bupo.rewards.boxed: where the last box is, and answers that are compared as strings."""

import time

import pytest

from bupo.config import RewardConfig
from bupo.rewards.boxed import last_boxed, normal_form, strict
from bupo.rewards.choice import make_reward


@pytest.mark.parametrize(
    ("response", "content"),
    [
        ("no box", None),
        ("", None),
        ("\\boxed{3}", "3"),
        ("\\boxed{3} or rather \\boxed{4}", "4"),
        ("\\boxed{\\frac{\\sqrt{2}}{3}}", "\\frac{\\sqrt{2}}{3}"),
        ("\\boxed{\\{1, \\{2\\}\\}} }", "\\{1, \\{2\\}\\}"),
        ("\\boxed{3", None),
        ("\\boxed{4}, no, \\boxed{\\frac{1}{2", "4"),
        ("\\fbox{7}", "7"),
        ("\\boxed{1} \\fbox{2}", "2"),
        ("\\boxed {5}", "5"),
        ("\\boxed 5", None),
        ("\\boxed", None),
        ("\\boxed{}", ""),
        ("\\boxed{ a\nb }", "a\nb"),
        ("\\boxedtext{5}", None),
        ("\\boxed{\\boxed{5}}", "5"),
    ],
)
def test_last_boxed(response, content):
    assert last_boxed(response) == content


STRICTLY_EQUAL = [
    ("5", "5"),
    (" 5 ", "5"),
    ("\\dfrac{3}{4}", "\\tfrac{3}{4}"),
    ("\\frac12", "\\frac{1}{2}"),
    ("\\frac1{72}", "\\frac{1}{72}"),
    ("1/2", "\\frac{1}{2}"),
    ("-3/4", "\\frac{-3}{4}"),
    ("0.5", "\\frac{1}{2}"),
    (".5", "1/2"),
    ("\\sqrt3", "\\sqrt{3}"),
    ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\frac{\\pi}{2})"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90"),
    ("50\\%", "50"),
    ("\\$12", "12"),
    ("10\\text{ cm}", "10"),
    ("x = 7", "7"),
    ("k=7", "7"),
    ("1\\!000", "1000"),
    ("Yes", "Yes"),
    ("\\leftarrow", "\\leftarrow"),
]


STRICTLY_DIFFERENT = [
    ("5", "6"),
    ("2/4", "1/2"),
    ("0.50", "0.5"),
    ("1,000", "1000"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("\\text{Yes}", "Yes"),
    ("yes", "Yes"),
    ("(2,1)", "(1,2)"),
    ("\\{2,1\\}", "\\{1,2\\}"),
    ("abc=7", "7"),
    ("x=y=7", "7"),
    ("+\\infty", "\\infty"),
    ("", "5"),
]


@pytest.mark.parametrize(("given", "answer"), STRICTLY_EQUAL)
def test_strict_accepts_spellings(given, answer):
    assert strict([f"so \\boxed{{{given}}}."], [answer]) == [1.0], normal_form(given)
    assert normal_form(normal_form(given)) == normal_form(given)


@pytest.mark.parametrize(("given", "answer"), STRICTLY_DIFFERENT)
def test_strict_computes_nothing(given, answer):
    """Among them pairs that Math-Verify accepts: that is what the paper's reward misses."""
    assert strict([f"so \\boxed{{{given}}}."], [answer]) == [0.0], normal_form(given)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("\\boxed{3} no, \\boxed{4}", 1.0),
        ("\\boxed{4} no, \\boxed{3}", 0.0),
        ("\\boxed{4}, or \\boxed{\\frac{1}{2", 0.0),  # the last one never closes
        ("the answer is 4", 0.0),
        ("\\fbox{4}", 1.0),
        ("\\boxed{3}, see \\fbox{4}", 0.0),  # a frame is looked at where there is no box
        ("$\\boxed 4$ it is", 1.0),
        ("\\boxed {4}", 1.0),
        ("\\boxed{}", 0.0),
        ("", 0.0),
    ],
)
def test_strict_reads_the_last_box(response, reward):
    assert make_reward(RewardConfig(function="strict"))._rewards([response], ["4"]) == [reward]


def test_strict_of_long_texts_is_fast():
    texts = [
        "\\boxed{" * 20_000,
        "{" * 200_000 + "\\boxed{5}",
        "\\frac" * 50_000,
        "\\sqrt" * 50_000,
    ]
    begin = time.monotonic()
    strict(texts, texts)
    assert time.monotonic() - begin < 2
