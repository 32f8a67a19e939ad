"""Built-in tasks: modules that make a model directory and data files, so that a run needs nothing
else. A task module has

    prepare(options, cache) -> TaskFiles     configuration, tokenizer and data; fast, no weights
    build(options, files)                    the weights, unless they are there already
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo.config import ConfigError


def task_options(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults with what was given; unknown names are errors."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ConfigError(f"unknown task_options: {unknown}; known: {sorted(defaults)}")
    return defaults | given


@dataclass(frozen=True)
class TaskFiles:
    """Where a task put things; the run then treats them like anybody's."""

    model: Path
    """Hugging Face model directory"""
    train: list[Path] | None
    """Training data, None to keep data.train"""
    eval: list[Path] | None
    """Evaluation data, None to keep eval.files"""
