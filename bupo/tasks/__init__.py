"""Built-in tasks: modules that make a model directory and data files, so that a run needs nothing
else. A task module has two functions, and may have a third one:

    prepare(options, cache) -> TaskFiles     makes configuration, tokenizer and data; fast
    build(options, folder)                   makes the weights of the model directory, unless they
                                             exist already
    reward(responses, answers)               the default of reward.function
"""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bupo import hub
from bupo.config import ConfigError

Item = TypeVar("Item")


def task_options(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the defaults, updated with the given options. Raises ConfigError for an unknown name,
    for a value whose type is not that of the default, and for a number below its minimum: 1 for
    integers, 0 for the seed and for floats."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ConfigError(f"unknown task_options: {unknown}; known: {sorted(defaults)}")
    for name, value in given.items():
        kind = type(defaults[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"task_options.{name} must be of type {kind.__name__}, got {value!r}")
        smallest = 0 if name == "seed" or kind is float else 1
        if kind in (int, float) and not smallest <= value < math.inf:
            raise ConfigError(f"task_options.{name} must be at least {smallest}, got {value}")
    return defaults | given


def hold_out(problems: list[Item], settings: dict[str, Any]) -> tuple[list[Item], list[Item]]:
    """Returns the problems for training and those that are held out, all in random order. Raises
    ConfigError if none would be left for training."""
    number = settings["eval_problems"]
    if number >= len(problems):
        raise ConfigError(
            f"task_options.eval_problems must leave some of {len(problems)} problems for training, "
            f"got {number}"
        )
    random.Random(settings["seed"]).shuffle(problems)
    return problems[number:], problems[:number]


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSONL file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(file)


def save_model(model: Any, folder: Path) -> None:
    """Saves a model with all files of save_pretrained, as vLLM needs the architecture's name in its
    configuration. The weights come last and atomically, so a folder with weights is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    with hub.quiet():
        model.save_pretrained(partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        file.replace(folder / file.name)
    partial.rmdir()


@dataclass(frozen=True)
class TaskFiles:
    """The files of a task, which a run treats like any other files."""

    model: Path | None
    """Hugging Face model directory, or None to use model.path"""
    train: list[Path] | None
    """Training data, or None to use data.train"""
    eval: list[Path] | None
    """Evaluation data, or None to use eval.files"""
