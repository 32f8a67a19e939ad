"""Problems of the package reasoning-gym, made by rules and graded by its own functions, for SmolLM2
or the model that `model.path` names:

    python -m bupo.run task=bupo.tasks.reasoning_gym \\
        'task_options={tasks: {chain_sum: {weight: 2, max_terms: 3}, gcd: {}}}'

A response is graded by what it gives as its answer: the text in the last <answer></answer>; without
that, in the last \\boxed{}; without that, the last number, or the last line if the answer is not a
number. It gets 1 for full credit and else 0, as many of the package's functions give some credit
to any text that contains the answer. Grading runs in processes that are killed at a deadline.
Kinds whose grading evaluates the response as Python, or gives full credit to wrong answers, are
refused.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bupo.config import ConfigError
from bupo.rewards import boxed
from bupo.tasks import TaskFiles, smollm2, task_options, write_rows

KILLABLE = True
DEFAULTS: dict[str, Any] = {
    "tasks": {"chain_sum": {}},
    "train_problems": 1000,
    "eval_problems": 64,
    "system_prompt": "",
    "seed": 0,
}
"""task_options. tasks: for each kind of problem, its options in reasoning-gym and its weight, 1 if
none is given. train_problems: the total, divided among the kinds by weight. eval_problems: of each.
system_prompt: the system's message, for example one that asks for <answer></answer>."""
TESTED = "0.1.25"
"""The version of the package whose graders have been read"""
UNEXPECTED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(SyntaxError, TypeError, ValueError),
)
"""What a grader raises for an answer of another form than it expects, which is a wrong answer. Any
other error is counted as one."""
CHECKED = 16
"""Problems of each kind whose grader is tried"""
SPAN = 1_000_000
"""Distance of seeds for training and evaluation. Problem i of a seed is problem i - 1 of the next
seed, so that close seeds give the same problems."""
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
build = smollm2.build


def load() -> None:
    """Imports the package, which takes seconds."""
    _gym()


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Returns 1 for each response with full credit, else 0. answers: the problems as JSON, with the
    keys `kind`, `options` and `entry`."""
    return [float(_has_credit(r, **json.loads(a))) for r, a in zip(responses, answers)]


def extract(response: str) -> str | None:
    """Returns the answer that a majority vote counts."""
    return _given(response, number=re.search(NUMBER, response) is not None)


def _has_credit(response: str, kind: str, options: dict[str, Any], entry: dict[str, Any]) -> bool:
    given = _given(response, re.fullmatch(NUMBER, str(entry["answer"])) is not None)
    if given is None or re.search(r"\b(nan|inf|infinity)\b", given, flags=re.IGNORECASE):
        return False  # some graders compare these with limits in a way that is always true
    grader = _grader(kind, json.dumps(options))
    try:
        return float(grader(given, entry)) == 1
    except UNEXPECTED:
        return False


def _given(response: str, number: bool) -> str | None:
    """Returns the answer in a response. number: whether it is expected to be one."""
    before, _, rest = response.rpartition("<answer>")
    end = rest.find("</answer>")
    if end < 0:
        before, _, rest = before.rpartition("<answer>")
        end = rest.find("</answer>")
    given = rest[:end].strip() if end >= 0 else boxed.last_boxed(response)
    if given is None and number:
        found = re.findall(NUMBER, response)
        given = found[-1] if found else None
    elif given is None:
        given = response.strip().rpartition("\n")[2].strip() or None
    return given.replace(",", "") if given and re.fullmatch(NUMBER, given) else given


@lru_cache
def _grader(kind: str, options: str) -> Any:
    return _gym().create_dataset(kind, size=1, seed=0, **json.loads(options)).score_answer


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(
            f"task=bupo.tasks.reasoning_gym needs a package: pip install reasoning-gym=={TESTED}"
        ) from None
    if (found := version("reasoning-gym")) != TESTED:
        raise ConfigError(
            f"task=bupo.tasks.reasoning_gym: expected reasoning-gym {TESTED}, whose graders have "
            f"been read, got {found}"
        )
    return reasoning_gym


def prepare(options: dict[str, Any], cache: Path) -> TaskFiles:
    """Writes the data to a folder named after the options and the version of the package."""
    settings = task_options(options, DEFAULTS)
    text = json.dumps([settings, TESTED], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    data = cache / f"reasoning-gym-{'-'.join(settings['tasks'])[:80]}-{name}"
    if not (data / "eval.jsonl").exists():
        train, held_out = _rows(settings)
        write_rows(data / "train.jsonl", train)
        write_rows(data / "eval.jsonl", held_out)
    model = smollm2.folder(cache) if not smollm2.missing() else None
    return TaskFiles(model, [data / "train.jsonl"], [data / "eval.jsonl"])


def _rows(settings: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    kinds, weights = _kinds(settings["tasks"])
    first, system = 2 * SPAN * settings["seed"], settings["system_prompt"]
    train: list[Any] = []
    held_out: list[Any] = []
    for kind, options in kinds.items():
        share = weights[kind] / sum(weights.values())
        asked = max(1, round(settings["train_problems"] * share))
        entries = _entries(kind, options, first + SPAN, settings["eval_problems"])
        held = [_row(kind, options, entry, system) for entry in entries]
        # Of few numbers there are few problems: those that are held out are not trained on.
        known = {row["prompt"][-1]["content"] for row in held}
        entries = _entries(kind, options, first, asked)
        rows = [
            _row(kind, options, entry, system)
            for entry in entries
            if entry["question"] not in known
        ]
        if not rows:
            raise ConfigError(
                f"task_options.tasks: every training problem of {kind} is also held out; choose "
                "options that allow more problems, or fewer eval_problems"
            )
        train += rows
        held_out += held
    return train, held_out


def _kinds(tasks: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Returns the options and the weight of each kind. Raises ConfigError for wrong ones."""
    if not tasks:
        raise ConfigError("task_options.tasks must name at least one kind of problem")
    for kind, given in tasks.items():
        weight = given.get("weight", 1) if isinstance(given, dict) else None
        if not isinstance(weight, int | float) or not weight > 0:
            raise ConfigError(
                f"task_options.tasks: expected options for {kind}, such as {{weight: 2}} with a "
                f"weight above 0, got {given!r}"
            )
    weights = {kind: float(given.get("weight", 1)) for kind, given in tasks.items()}
    options = {k: {o: v for o, v in given.items() if o != "weight"} for k, given in tasks.items()}
    return options, weights


def _entries(kind: str, options: dict[str, Any], seed: int, size: int) -> Iterable[dict[str, Any]]:
    """Makes problems. Raises ConfigError for those that cannot be used."""
    gym = _gym()
    try:
        made = gym.create_dataset(kind, size=min(size, SPAN), seed=seed, **options)
    except Exception as error:  # whatever its checks raise
        known = ", ".join(sorted(gym.factory.DATASETS))
        raise ConfigError(
            f"task_options.tasks: {kind} with {options} is refused: "
            f"{error or type(error).__name__}; the kinds are {known}"
        ) from None
    source = inspect.getsource(sys.modules[type(made).__module__])
    if re.search(r"\b(eval|exec|parse_expr|sympify)\((answer|user_answer)\b", source):
        raise ConfigError(
            f"task_options.tasks: {kind} is refused: its grading evaluates the response as Python"
        )
    for n, entry in enumerate(made):
        row = json.loads(json.dumps(entry, default=str))
        if n < CHECKED:
            _check_grader(kind, options, row)
        yield row


def _check_grader(kind: str, options: dict[str, Any], entry: dict[str, Any]) -> None:
    """Raises ConfigError unless the right answer, and no obviously wrong one, has full credit."""
    right = str(entry["answer"])
    if not _has_credit(f"<answer>{right}</answer>", kind, options, entry):
        raise ConfigError(
            f"task_options.tasks: {kind} is refused: its own answer {right!r} does not get full "
            "credit after a round trip through JSON"
        )
    for wrong in ("banana", "0", "1", "[]", "True", "False"):
        if right.removesuffix(".0") != wrong and _has_credit(
            f"<answer>{wrong}</answer>", kind, options, entry
        ):
            raise ConfigError(
                f"task_options.tasks: {kind} is refused: it gives full credit to the answer "
                f"{wrong!r} where {right!r} is right"
            )


def _row(kind: str, options: dict[str, Any], entry: dict[str, Any], system: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": entry["question"]})
    answer = json.dumps({"kind": kind, "options": options, "entry": entry})
    return {"prompt": messages, "answer": answer, "data_source": kind}
