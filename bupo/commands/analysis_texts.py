"""Turns data into the texts that an analysis measures, as token ids with the measured part's start.

Prompt and response are tokenised separately, so the start is the number of prompt tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bupo.config import AnalysisConfig, ConfigError
from bupo.data import data_files
from bupo.data.prompts import tokenised
from bupo.internal import Sample
from bupo.rollouts.engine import seed_of
from bupo.types import Prompt


@dataclass(frozen=True)
class Row:
    """A row of data or a text of a .txt file, not yet tokenised."""

    where: str
    """Position in the data, for messages"""
    content: Any
    """A row with a prompt, or the text of a .txt file"""
    response: str | None
    """The row's own response, if that is measured"""


@dataclass(frozen=True)
class Measured:
    """A text to measure, with its prompt and its response."""

    where: str
    prompt: str
    """The prompt after the chat template; empty if the whole text is measured"""
    response: str
    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def text(self) -> Sample:
        """The token ids with the measured part marked. The first token of all cannot be measured,
        because no token predicts it."""
        ids = [*self.prompt_ids, *self.response_ids]
        start = max(len(self.prompt_ids), 1)
        return Sample.of(ids[:start], ids[start:])

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def cut(self, tokens: int | None) -> Measured:
        rest = None if tokens is None else max(tokens - len(self.prompt_ids), 0)
        return replace(self, response_ids=self.response_ids[:rest])


def choose_rows(config: AnalysisConfig, files: Sequence[str]) -> tuple[list[Row], str, int]:
    """Returns `prompts` rows of different prompts, in the order of the data; the source of their
    responses (generate, column or none); and the number of all rows. Raises ConfigError, one line.
    """
    kinds = {Path(name).suffix == ".txt" for name in files}
    if kinds == {True, False}:
        raise ConfigError("data.train: .txt files and rows with prompts cannot be mixed")
    if kinds == {True}:
        if config.responses == "column":
            raise ConfigError("responses=column: a .txt file has no columns")
        read_rows = (_of_text_file(name, config.whole_files) for name in files)
        rows = [row for of_file in read_rows for row in of_file[: config.data.limit]]
        how = "none" if config.responses == "auto" else config.responses
    else:
        read = [
            (f"row {n} of {name}", row)
            for name in files
            for n, row in enumerate(data_files.read(name)[: config.data.limit])
        ]
        how = _how(config, read)
        rows = [
            Row(where, row, _response(row, config.response, where) if how == "column" else None)
            for where, row in read
        ]
    if not rows:
        raise ConfigError(f"no texts in {', '.join(files)}")
    return _drawn(rows, config), how, len(rows)


def _of_text_file(name: str, whole: bool) -> list[Row]:
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from None
    if whole:
        return [Row(name, text, None)] if text.strip() else []
    return [
        Row(f"line {n} of {name}", line, None)
        for n, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]


def _how(config: AnalysisConfig, rows: list[tuple[str, Any]]) -> str:
    if config.responses != "auto":
        return config.responses
    there = bool(rows) and all(isinstance(r, dict) and config.response in r for _, r in rows)
    return "column" if there else "generate"


def _response(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(
            f"{where} has no text in column {column} (found: {names}); response=NAME names another"
        )
    return str(row[column])


def _drawn(rows: list[Row], config: AnalysisConfig) -> list[Row]:
    """Draws one row for each prompt, so that standard errors over texts are over prompts."""
    order = list(range(len(rows)))
    random.Random(f"{config.seed}/texts").shuffle(order)
    key = config.data.columns.get("prompt", "prompt")
    kept: dict[str, int] = {}
    for place in order:
        content = rows[place].content
        prompt = content.get(key, content.get("prompt")) if isinstance(content, dict) else content
        kept.setdefault(str(prompt), place)
        if len(kept) == config.prompts:
            break
    return [rows[place] for place in sorted(kept.values())]


def tokenise(rows: Sequence[Row], config: AnalysisConfig, tokenizer: Any, how: str) -> list[Any]:
    """Returns Measured texts, or Prompts if responses are generated. Raises ConfigError for a
    malformed row, and for a prompt over data.max_prompt_tokens unless data.overlong=drop."""
    found: list[Any] = []
    lengths = []
    limit = config.data.max_prompt_tokens
    for row in rows:
        if isinstance(row.content, str):
            text, ids = row.content, list(tokenizer(row.content)["input_ids"])
        else:
            text, ids = tokenised(row.content, tokenizer, config.data, row.where)
        ids = _one_beginning(ids, tokenizer)
        if how == "none":
            found.append(Measured(row.where, "", text, [], ids).cut(config.max_tokens))
            continue
        if len(ids) > limit:
            lengths.append(len(ids))
            continue
        if how == "generate":
            found.append(Prompt(len(found), row.where, text, ids, ""))
            continue
        assert row.response is not None
        response = list(tokenizer(row.response, add_special_tokens=False)["input_ids"])
        measured = Measured(row.where, text, row.response, ids, response)
        found.append(measured.cut(config.max_tokens))
    if lengths and config.data.overlong == "error":
        raise ConfigError(
            f"{len(lengths)} of {len(rows)} prompts exceed data.max_prompt_tokens={limit} (longest "
            f"{max(lengths)}); raise it or set data.overlong=drop"
        )
    if not found:
        raise ConfigError(f"all {len(rows)} prompts exceed data.max_prompt_tokens={limit}")
    return found


def _one_beginning(ids: list[int], tokenizer: Any) -> list[int]:
    """Removes a duplicate beginning-of-sequence token. A prompt recorded after the chat template
    already begins with one, and the tokenizer adds a second."""
    begin = tokenizer.bos_token_id
    return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


def generate(prompts: Sequence[Prompt], config: AnalysisConfig, engine: Any) -> list[Measured]:
    """Generates one response to each prompt."""
    seed = str(seed_of(config.seed, "analyze"))
    rollouts = engine.generate(prompts, 1, seed, lambda: False)
    return [
        Measured(r.prompt.source, r.prompt.text, r.text, r.prompt.token_ids, r.response_ids).cut(
            config.max_tokens
        )
        for r in rollouts
    ]


def again(
    texts: Sequence[Measured], rows: Sequence[Row], config: AnalysisConfig, other: Any
) -> list[Measured]:
    """Tokenises the same texts with another tokenizer and its chat template. The responses are the
    text of those that were measured."""
    responses = {m.where: m.response for m in texts}
    how = "column" if any(m.prompt for m in texts) else "none"
    chosen = [replace(r, response=responses[r.where]) for r in rows if r.where in responses]
    found: list[Measured] = tokenise(chosen, config, other, how)
    return found


def measurable(texts: Sequence[Measured], positions: int | None) -> list[Measured]:
    """Keeps the texts that have a token to measure with a token before it. Raises ConfigError if
    none is left, or if a text is longer than the model's number of positions."""
    for m in texts:
        if positions is not None and m.length > positions:
            raise ConfigError(
                f"{m.where} has {m.length} tokens, but the model has only {positions} positions; "
                "cut the texts with max_tokens=N, or choose others"
            )
    kept = [m for m in texts if m.response_ids and m.length >= 2]
    if not kept:
        raise ConfigError("no text has a token to measure: all responses are empty or cut off")
    return kept
