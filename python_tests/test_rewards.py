"""bupo.rewards: Math-Verify, and functions of the user's."""

import math

import pytest
from rl_samples import prompt, response

from bupo.config import ConfigError, RewardConfig
from bupo.rewards import killable
from bupo.rewards.choice import check_sources, make_reward
from bupo.rewards.mathematics import grade
from bupo.types import Grades


@pytest.fixture(scope="module")
def grader():
    reward = make_reward(RewardConfig(timeout=30, workers=2))
    yield reward
    reward.close()


def one(grader, response, answer):
    grades = grader.grade([(response, answer)])
    assert grades == Grades(grades.rewards)
    return grades.rewards[0]


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("\\frac{1}{2}", "0.5"),
        ("\\dfrac{3}{4}", "\\frac{3}{4}"),
        ("\\frac12", "1/2"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("1,000", "1000"),
        ("x=5", "5"),
        ("\\{2,1\\}", "\\{1,2\\}"),
        ("90^\\circ", "90"),
        ("\\text{Yes}", "Yes"),
        ("\\left(3,\\frac{\\pi}{2}\\right)", "(3, \\pi/2)"),
        ("+\\infty", "\\infty"),
    ],
)
def test_equal_answers_that_differ_as_strings(grader, given, answer):
    assert "".join(given.split()) != "".join(answer.split())
    assert one(grader, f"Therefore \\boxed{{{given}}}.", answer) == 1.0


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("5", "6"),
        ("No", "Yes"),
        ("0.33", "\\frac{1}{3}"),
        ("(2,1)", "(1,2)"),
        ("[0,1)", "(0,1)"),
        ("-3", "3"),
        ("x^2", "x^3"),
        ("", "5"),
    ],
)
def test_different_answers(grader, given, answer):
    assert one(grader, f"Therefore \\boxed{{{given}}}.", answer) == 0.0


def test_the_last_box_decides(grader):
    assert one(grader, "\\boxed{3}, wait: \\boxed{4}", "4") == 1.0
    assert one(grader, "\\boxed{4}, wait: \\boxed{3}", "4") == 0.0
    assert one(grader, "the answer is 4", "4") == 0.0
    assert one(grader, "\\boxed{4", "4") == 0.0
    assert one(grader, "so \\boxed{\\frac{\\frac{1}{2}}{3}}", "1/6") == 1.0


def test_yes_is_an_answer_as_a_string():
    # 682 of the paper's 5,000 answers. Math-Verify is not asked.
    assert grade("\\boxed{Yes}", "Yes") == 1.0
    assert grade("\\boxed{ Yes }", "Yes") == 1.0
    assert grade("Yes", "Yes") == 0.0


def test_any_text_reaches_the_worker(grader):
    strange = "é ✓ \u2028 \x85 \x00 \ud800 \r\n\t \\boxed{5}"
    long = "x" * 300_000 + "\\boxed{5}"  # more than a pipe holds
    pairs = [(strange, "5"), (long, "5"), (strange, "6"), ("\\boxed{é}", "é"), ("", "")]
    assert grader.grade(pairs) == Grades([1.0, 1.0, 0.0, 1.0, 0.0])


def test_many_items_keep_their_order(grader):
    pairs = [(f"\\boxed{{{n}}}", str(n if n % 3 else n + 1)) for n in range(60)]
    assert grader.grade(pairs) == Grades([float(n % 3 > 0) for n in range(60)])
    assert grader.grade([]) == Grades([])


def test_reward_is_of_the_response_to_its_prompt(grader):
    rollouts = [
        response(prompt([1], answer=str(n)), [2], n, text=f"\\boxed{{{n % 2}}}") for n in range(4)
    ]
    assert grader(rollouts) == Grades([1.0, 1.0, 0.0, 0.0])


def test_an_exception_counts_as_an_error(grader):
    # The answer is no string, so the worker's grade() raises; the process lives on.
    before = [w.process for w in grader._workers]
    grades = grader.grade([("\\boxed{1}", "1"), ("\\boxed{1}", 1), ("\\boxed{2}", "2")])
    assert str(grades.rewards) == "[1.0, nan, 1.0]"
    assert (grades.timeouts, grades.errors) == (0, 1)
    assert [w.process for w in grader._workers] == before


def three():
    texts = ("a", "bb", "ccc")
    return [response(prompt([1], answer=str(n)), [2], n, text=text) for n, text in enumerate(texts)]


def test_custom_function_sees_texts_and_answers(custom):
    name = custom("assert type(responses) is type(answers) is list\n"
                  "return [len(r) + 10 * int(a) for r, a in zip(responses, answers)]")  # fmt: skip
    reward, rollouts = make_reward(RewardConfig(function=name)), three()
    grades = reward(rollouts)
    assert grades == Grades([1.0, 12.0, 23.0])
    assert all(type(x) is float for x in grades.rewards)
    reward.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0, 1.0]", "returned 2 rewards for 3 responses"),
        ("return [1.0] * 4", "returned 4 rewards for 3 responses"),
    ],
)
def test_custom_function_that_answers_wrongly(custom, body, message):
    name = custom(body)
    with pytest.raises(ValueError, match=f"reward.function={name}.* {message}"):
        make_reward(RewardConfig(function=name))(three())


@pytest.mark.parametrize(
    ("given", "value"),
    [("float('nan')", "nan"), ("float('-inf')", "-inf"), ("None", "None"), ("'no'", "'no'")],
)
def test_a_reward_that_is_no_number_is_named_and_counted(custom, given, value):
    name = custom(f"return [0.0, {given}, 1.0]")
    grades = make_reward(RewardConfig(function=name))(three())
    assert (grades.timeouts, grades.errors) == (0, 1)
    assert grades.first_failure == f"reward.function={name} returned {value}"
    assert [math.isfinite(x) for x in grades.rewards] == [True, False, True]
    assert grades.rewards[::2] == [0.0, 1.0]


def test_custom_function_that_raises_is_not_reward_zero(custom):
    with pytest.raises(KeyError, match="lost"):
        make_reward(RewardConfig(function=custom("raise KeyError('lost')")))(three())


@pytest.mark.parametrize("what", ["no_such_module_anywhere:score", "math:no_such_function"])
def test_custom_function_that_cannot_be_imported(what):
    with pytest.raises(ConfigError, match=f"reward.function={what} cannot be loaded"):
        make_reward(RewardConfig(function=what))


def of_sources(*names):
    return [
        response(prompt([1], "1/2", source=name), [2], n, text="\\boxed{2/4}")
        for n, name in enumerate(names)
    ]


def test_every_source_has_its_reward(custom):
    sources = {"a": "strict", "b": "math", "c": custom("return [7] * len(answers)"), "d": "strict"}
    reward = make_reward(RewardConfig(by_source=sources, timeout=60, workers=1))
    rollouts = of_sources("a", "b", "c", "b", "d")
    assert reward(rollouts) == Grades([0.0, 1.0, 7.0, 1.0, 0.0])
    assert reward(rollouts[:1]) == Grades([0.0]), "a batch need not hold every source"
    workers = [w.process for w in reward._rewards["b"]._workers]
    reward.close()
    assert all(p.poll() is not None for p in workers)


def test_reports_of_sources_add_up(custom):
    bad, worse = custom("return [float('nan')] * 2"), custom("return [float('inf')]")
    reward = make_reward(RewardConfig(by_source={"a": bad, "b": worse}))
    grades = reward(of_sources("a", "b", "a"))
    assert grades.errors == 3 and grades.first_failure.endswith("returned nan")


def test_a_source_without_a_reward_is_an_error():
    prompts = [r.prompt for r in of_sources("a", "x", "x", "b")]
    check_sources(RewardConfig(), prompts)
    message = r"no reward for data source x \(2 prompts\): reward.by_source has a, b$"
    with pytest.raises(ConfigError, match=message):
        check_sources(RewardConfig(by_source={"a": "strict", "b": "math"}), prompts)


def test_by_source_closes_what_it_made(monkeypatch):
    closed = []
    monkeypatch.setattr(killable.KillableReward, "close", lambda self: closed.append(1))
    sources = {"a": "math", "b": "no_such_module:f"}
    with pytest.raises(ConfigError, match="no_such_module:f cannot be loaded"):
        make_reward(RewardConfig(by_source=sources, timeout=60, workers=1))
    assert closed == [1]
