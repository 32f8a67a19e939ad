"""Built-in tasks: modules that make a model directory and data files, so that a run needs nothing
else. A task module has

    prepare(options, cache) -> TaskFiles     configuration, tokenizer and data; fast, no weights
    build(options, files)                    the weights, unless they are there already
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo import hub
from bupo.config import ConfigError


def task_options(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults with what was given. Unknown names are errors, and values of another type than
    the default's; so are numbers below 1, or below 0 for a seed or a number that is no integer."""
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


def check_width(width: int) -> None:
    """Of a model with 4 heads, whose rotary embedding turns pairs."""
    if width % 8:
        raise ConfigError(f"task_options.width must be a multiple of 8, got {width}")


def save_model(model: Any, folder: Path) -> None:
    """All that save_pretrained writes (a configuration that names the architecture, which vLLM
    reads), the weights last and whole: a folder that has them is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    with hub.quiet():
        model.save_pretrained(partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        file.replace(folder / file.name)
    partial.rmdir()


@dataclass(frozen=True)
class TaskFiles:
    """Where a task put things; the run then treats them like anybody's."""

    model: Path
    """Hugging Face model directory"""
    train: list[Path] | None
    """Training data, None to keep data.train"""
    eval: list[Path] | None
    """Evaluation data, None to keep eval.files"""
