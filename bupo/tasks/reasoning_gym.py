"""Problems of the package reasoning-gym, made by rules and graded by its own functions, for SmolLM2
or the model that `model` names:

    python -m bupo.run task=bupo.tasks.reasoning_gym \\
        'task_options={tasks: {chain_sum: {weight: 2, max_terms: 3}, gcd: {}}}'

A response is graded by what it gives as its answer: the text in the last <answer></answer>; without
that, in the last \\boxed{}; without that, the last number, or the last line if the answer is not a
number. It gets 1 for full credit and else 0, as many of the package's functions give some credit
to any text that contains the answer. Grading runs in processes that are killed at a deadline.
Kinds of problems whose grading evaluates the response as Python are refused.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bupo.config import ConfigError
from bupo.rewards import boxed
from bupo.tasks import TaskFiles, smollm2, task_options
from bupo.tasks.small_models import write_rows

KILLABLE = True
DEFAULTS: dict[str, Any] = {
    "tasks": {"chain_sum": {}},
    "train_problems": 1000,
    "eval_problems": 64,
    "system_prompt": "",
    "seed": 0,
}
"""task_options. tasks: for each kind of problem, its options in reasoning-gym and its weight, 1 if
none is given. train_problems: of all kinds together, by their weights. eval_problems: of each kind.
system_prompt: the system's message, for example one that asks for <answer></answer>."""
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
    keys `kind` and `entry`."""
    return [float(_credit(r, **json.loads(a)) == 1) for r, a in zip(responses, answers)]


def extract(response: str) -> str | None:
    """Returns the answer that a majority vote counts."""
    last = response.strip().rpartition("\n")[2]
    return _given(response, number=re.search(NUMBER, last) is not None)


def _credit(response: str, kind: str, entry: dict[str, Any]) -> float:
    number = re.fullmatch(NUMBER, str(entry["answer"])) is not None
    return float(_grader(kind)(_given(response, number), entry))


def _given(response: str, number: bool) -> str | None:
    tagged = re.findall(r"<answer>(.*?)</answer>", response, flags=re.DOTALL)
    if tagged:
        return str(tagged[-1]).strip()
    if (inside := boxed.last_boxed(response)) is not None:
        return inside
    if number:
        found = re.findall(NUMBER, response)
        return found[-1].replace(",", "") if found else None
    return response.strip().rpartition("\n")[2].strip() or None


@lru_cache
def _grader(kind: str) -> Any:
    return _gym().get_score_answer_fn(kind)


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(
            "task=bupo.tasks.reasoning_gym needs reasoning-gym: pip install reasoning-gym"
        ) from None
    return reasoning_gym


def prepare(options: dict[str, Any], cache: Path) -> TaskFiles:
    """Writes the data to a folder named after the options and the version of the package."""
    settings, gym = task_options(options, DEFAULTS), _gym()
    if not settings["tasks"]:
        raise ConfigError("task_options.tasks must name at least one kind of problem")
    text = json.dumps([settings, gym.__version__], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    data = cache / f"reasoning-gym-{'-'.join(settings['tasks'])[:80]}-{name}"
    if not (data / "eval.jsonl").exists():
        train, held_out = _rows(settings)
        write_rows(data / "train.jsonl", train)
        write_rows(data / "eval.jsonl", held_out)
    model = smollm2.folder(cache) if not smollm2.missing() else None
    return TaskFiles(model, [data / "train.jsonl"], [data / "eval.jsonl"])


def _rows(settings: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    kinds = {kind: dict(given) for kind, given in settings["tasks"].items()}
    weights = {kind: float(given.pop("weight", 1)) for kind, given in kinds.items()}
    if min(weights.values()) <= 0:
        raise ConfigError(f"task_options.tasks: weights must be above 0, got {weights}")
    first = 2 * SPAN * settings["seed"]
    train: list[Any] = []
    held_out: list[Any] = []
    for kind, given in kinds.items():
        share = weights[kind] / sum(weights.values())
        asked = max(1, round(settings["train_problems"] * share))
        held = [
            _row(kind, entry, settings["system_prompt"])
            for entry in _entries(kind, given, first + SPAN, settings["eval_problems"])
        ]
        # Of few numbers there are few problems: those that are held out are not trained on.
        known = {row["prompt"][-1]["content"] for row in held}
        rows = [
            _row(kind, entry, settings["system_prompt"])
            for entry in _entries(kind, given, first, asked)
            if entry["question"] not in known
        ]
        if not rows:
            raise ConfigError(
                f"task_options.tasks: all problems of {kind} are held out; make it larger"
            )
        train += rows
        held_out += held
    return train, held_out


def _entries(kind: str, given: dict[str, Any], seed: int, size: int) -> Iterable[dict[str, Any]]:
    """Makes problems. Raises ConfigError for those that cannot be used."""
    gym = _gym()
    try:
        made = gym.create_dataset(kind, size=min(size, SPAN), seed=seed, **given)
    except Exception as error:  # whatever its checks raise
        known = ", ".join(sorted(gym.factory.DATASETS))
        raise ConfigError(
            f"task_options.tasks: {kind} with {given} is refused: {error or type(error).__name__}; "
            f"the kinds are {known}"
        ) from None
    source = inspect.getsource(sys.modules[type(made).__module__])
    if re.search(r"\b(eval|exec|parse_expr|sympify)\((answer|user_answer)\b", source):
        raise ConfigError(
            f"task_options.tasks: {kind} is refused: its grading evaluates the response as Python"
        )
    for n, entry in enumerate(made):
        row = json.loads(json.dumps(entry, default=str))
        if n < 8 and _grader(kind)(row["answer"], row) != 1:
            raise ConfigError(
                f"task_options.tasks: {kind} is refused: its own answer {row['answer']!r} does not "
                "get full credit, once it has been written to a file"
            )
        yield row


def _row(kind: str, entry: dict[str, Any], system: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": entry["question"]})
    answer = json.dumps({"kind": kind, "entry": entry})
    return {"prompt": messages, "answer": answer, "data_source": kind}
