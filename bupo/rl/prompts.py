"""Data files to tokenised prompts, and the order in which steps take them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from bupo.config import ConfigError, DataConfig
from bupo.rl.types import Prompt


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ConfigError(f"data file not found: {file}")
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are of these
            raise ConfigError(f"{file} is not a parquet file: {error}") from None
        return rows
    if file.suffix == ".jsonl":
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
            return [json.loads(line) for line in lines if line.strip()]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not JSON lines: {error}") from None
    raise ConfigError(f"data file must end in .parquet or .jsonl, got {file}")


def _answer(row: dict[str, Any], where: str) -> str:
    model = row.get("reward_model") or {}
    if not isinstance(model, dict):
        raise ConfigError(
            f"{where}: reward_model must be an object with ground_truth, got {model!r}"
        )
    truth = model.get("ground_truth", row.get("answer"))
    if truth is None:
        raise ConfigError(f"{where} has neither reward_model.ground_truth nor answer")
    return str(truth)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and message.get("content") is not None
    )


def _text(prompt: Any, tokenizer: Any, config: DataConfig, where: str) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        raise ConfigError(
            f"{where}: prompt must be a string or a list of chat messages with role and content"
        )
    template = None
    if config.chat_template is not None:
        template = Path(config.chat_template).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        raise ConfigError(
            f"{where} is a chat, but the model's tokenizer has no chat template; set "
            "data.chat_template=FILE"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            prompt,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=template,
            **config.chat_template_options,
        )
    except (TemplateError, TypeError, ValueError) as error:
        source = config.chat_template or "the tokenizer's chat template"
        raise ConfigError(f"{where}: {source} failed: {error}") from None
    return text


def load_prompts(
    files: Sequence[str], tokenizer: Any, config: DataConfig, limit: int | None = None
) -> tuple[list[Prompt], int]:
    """All prompts of the files, and how many were dropped for their length.

    Raises ConfigError for a missing or malformed file, an empty set, or a prompt over
    data.max_prompt_tokens unless data.overlong=drop.
    """
    prompts: list[Prompt] = []
    longest, overlong = 0, 0
    for name in files:
        file = Path(name)
        for n, row in enumerate(_rows(file)[:limit]):
            where = f"row {n} of {file}"
            if not isinstance(row, dict):
                raise ConfigError(f"{where} is not a JSON object")
            if "prompt" not in row:
                raise ConfigError(f"{where} has no prompt")
            text = _text(row["prompt"], tokenizer, config, where)
            ids = tokenizer(text, add_special_tokens=isinstance(row["prompt"], str))["input_ids"]
            if not ids:
                raise ConfigError(f"{where} has an empty prompt")
            if len(ids) > config.max_prompt_tokens:
                overlong, longest = overlong + 1, max(longest, len(ids))
                continue
            source = str(row.get("data_source") or file.stem)
            prompts.append(Prompt(len(prompts), source, text, list(ids), _answer(row, where)))
    if overlong and config.overlong == "error":
        raise ConfigError(
            f"{overlong} of {overlong + len(prompts)} prompts exceed data.max_prompt_tokens="
            f"{config.max_prompt_tokens} (longest {longest}); raise it or set data.overlong=drop"
        )
    if not prompts:
        names = ", ".join(map(str, files)) or "data.train=[]"
        raise ConfigError(f"no prompts in {names} ({overlong} dropped for their length)")
    return prompts, overlong


class PromptOrder:
    """Shuffled epochs, a pure function of (seed, step): nothing to save for an exact resume."""

    def __init__(self, prompts: list[Prompt], per_step: int, seed: int) -> None:
        if per_step > len(prompts):
            raise ConfigError(
                f"rollout.prompts ({per_step}) exceeds the number of training prompts "
                f"({len(prompts)})"
            )
        self._prompts, self._per_step, self._seed = prompts, per_step, seed
        self._epoch, self._order = -1, list(range(len(prompts)))

    def take(self, step: int) -> list[Prompt]:
        """The prompts of step 1, 2, ...; an epoch's remainder starts the next step."""
        first = (step - 1) * self._per_step
        return [self._at(i) for i in range(first, first + self._per_step)]

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._prompts)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return self._prompts[self._order[place]]
