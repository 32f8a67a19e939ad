"""Turns rows of data into tokenised prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bupo import progress
from bupo.config import ConfigError, DataConfig, first_line, readable, shipped
from bupo.data import data_files
from bupo.types import Prompt


def _column(row: dict[str, Any], name: str, config: DataConfig) -> Any:
    """Returns the value of a column; the name that data.columns gives it takes precedence."""
    other = config.columns.get(name, name)
    return row[other] if other in row else row.get(name)


def _answer(row: dict[str, Any], config: DataConfig, where: str) -> str:
    model = row.get("reward_model") or {}
    if not isinstance(model, dict):
        raise ConfigError(
            f"{where}: reward_model must be an object with ground_truth, got {model!r}"
        )
    truth = row.get(config.columns.get("answer", ""))
    if truth is None:
        truth = model.get("ground_truth", row.get("answer"))
    if truth is None:
        raise ConfigError(
            f"{where} has neither reward_model.ground_truth nor answer (found: {_names(row)}); "
            "data.columns can name another"
        )
    if isinstance(truth, (list, dict)):
        kind = "a list" if isinstance(truth, list) else "an object"
        raise ConfigError(
            f"{where}: the answer must be text or a number, got {kind}: {str(truth)[:80]}"
        )
    return str(truth)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(row) or "nothing"


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and message.get("content") is not None
    )


def _chat(system: str, user: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": user}]


def _text(prompt: Any, tokenizer: Any, config: DataConfig, where: str) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        raise ConfigError(
            f"{where}: prompt must be a string or a list of chat messages with role and content"
        )
    template = None
    if config.chat_template is not None:
        with readable(f"data.chat_template={config.chat_template}"):
            template = shipped(config.chat_template).read_text(encoding="utf-8")
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
    except Exception as error:  # a template is a foreign program that runs in a sandbox
        source = config.chat_template or "the tokenizer's chat template"
        raise ConfigError(f"{where}: {source} failed: {first_line(error)}") from None
    return text


def tokenised(row: Any, tokenizer: Any, config: DataConfig, where: str) -> tuple[str, list[int]]:
    """Returns the prompt of a row after the chat template, and its token ids. Raises ConfigError,
    whose message begins with `where`, for a row without a valid prompt."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is not a JSON object")
    prompt = _column(row, "prompt", config)
    if prompt is None:
        raise ConfigError(
            f"{where} has no prompt (found: {_names(row)}); data.columns can name another"
        )
    if isinstance(prompt, str) and config.system_prompt is not None:
        prompt = _chat(config.system_prompt, prompt)
    text = _text(prompt, tokenizer, config, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: the prompt is not valid text: {error}") from None
    ids = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
    if not ids:
        raise ConfigError(f"{where} has an empty prompt")
    return text, list(ids)


def load_prompts(
    files: Sequence[str],
    tokenizer: Any,
    config: DataConfig,
    limit: int | None = None,
    apart: bool = False,
) -> tuple[list[Prompt], int]:
    """Returns all prompts of the files, and the number of prompts dropped for their length.

    Raises ConfigError for a missing or malformed file, an empty set, or a prompt over
    data.max_prompt_tokens unless data.overlong=drop. With `apart`, as in evaluations, also raises
    it if rows without data_source would join another file's data set whose name is equal by chance.
    """
    prompts: list[Prompt] = []
    named: dict[str, int] = {}
    longest, overlong = 0, 0
    for place, file in enumerate(files):
        rows = data_files.read(file)[:limit]
        for n, row in enumerate(rows):
            progress.report((place + n / len(rows)) / len(files))
            where = f"row {n} of {file}"
            text, ids = tokenised(row, tokenizer, config, where)
            if len(ids) > config.max_prompt_tokens:
                overlong, longest = overlong + 1, max(longest, len(ids))
                continue
            source = str(_column(row, "data_source", config) or "")
            if not source:
                source = data_files.stem(file)
                named.setdefault(source, place)
            answer = _answer(row, config, where)
            prompts.append(Prompt(len(prompts), source, text, ids, answer, place))
    for prompt in prompts if apart else []:
        if (place := named.get(prompt.source, prompt.file)) != prompt.file:
            raise ConfigError(
                f"rows of {files[place]} and {files[prompt.file]} would be one data set, "
                f"{prompt.source}: rows without data_source are named after their file; give them "
                "one, or rename a file"
            )
    if overlong and config.overlong == "error":
        raise ConfigError(
            f"{overlong} of {overlong + len(prompts)} prompts exceed data.max_prompt_tokens="
            f"{config.max_prompt_tokens} (longest {longest}); raise it or set data.overlong=drop"
        )
    if not prompts:
        names = ", ".join(map(str, files)) or "data.train=[]"
        raise ConfigError(f"no prompts in {names} ({overlong} dropped for their length)")
    return prompts, overlong
