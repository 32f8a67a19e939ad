"""What the tests of bupo.analyze share: a tiny model, rows with responses, and what was written."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bupo.tasks import tiny

BUILT_IN = [
    "task=bupo.tasks.arithmetic",
    "task_options={layers: 2, width: 32, warm_steps: 4, eval_problems: 40}",
    "rollout.max_new_tokens=12",
    "prompts=12",
]


def tiny_model(folder: Path, **options: Any) -> str:
    """A random model with byte-level tokenizer and chat template."""
    given = {"layers": 3, "width": 32, **options}
    files = tiny.prepare(given, folder)
    tiny.build(given, files.model)
    return str(files.model)


def chats_file(folder: Path) -> str:
    """Rows in verl's format with a response each; the first two ask the same."""
    file = folder / "chats.jsonl"
    questions = ["What is 1+1?", "What is 1+1?", "Assistant: name a prime.", "Say hi.", "Add."]
    rows = [
        {
            "prompt": [{"role": "user", "content": q}],
            "reward_model": {"ground_truth": "2"},
            "response": f"It is {n}.",
        }
        for n, q in enumerate(questions)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def texts_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]


def tokens_of(out: Path) -> Any:
    return pq.read_table(out / "tokens.parquet")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    return errors[0]
