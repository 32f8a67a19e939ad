"""Two-digit addition with written steps: a task that a model of 1M parameters learns in a minute.

The prompt `37+85=` has the response `7+5=12;3+8+1=12#122`: the units, the tens with the carry, the
sum. The warm start imitates demonstrations in which each of the three written results is wrong with
probability NOISE, so the mean reward starts at about 0.4 and reinforcement learning can raise it.
The reward only reads the number after the last `#`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bupo import progress
from bupo.config import ConfigError
from bupo.tasks import TaskFiles, check_width, save_model, task_options

SYMBOLS = "0123456789+=;#"
NOISE = 0.2
PROBLEMS = 90 * 90
DEFAULTS = {
    "layers": 6,
    "width": 128,
    "warm_steps": 300,
    "warm_batch": 64,
    "warm_lr": 3e-3,
    "eval_problems": 128,
    "seed": 0,
}
"""task_options: sizes of the model, of its supervised warm start and of the held-out problems."""


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Returns 1 for each response whose text after the last # is the sum, else 0."""
    return [float(extract(r) == a) for r, a in zip(responses, answers)]


def extract(response: str) -> str | None:
    """Returns the text after the last #, the answer that a majority vote counts."""
    return response.rpartition("#")[2] if "#" in response else None


def solution(a: int, b: int, rng: random.Random, noise: float) -> str:
    """Returns the written steps. Each result is off by 1 to 9 with probability `noise`, and later
    steps use the results as written."""

    def written(value: int) -> int:
        if rng.random() >= noise:
            return value
        return max(0, value + rng.choice([-1, 1]) * rng.randint(1, 9))

    units = written(a % 10 + b % 10)
    carry = units // 10
    tens = written(a // 10 + b // 10 + carry)
    total = written(10 * tens + units % 10)
    carried = f"+{carry}" if carry else ""
    return f"{a % 10}+{b % 10}={units};{a // 10}+{b // 10}{carried}={tens}#{total}"


def _problems(seed: int, held_out: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    return pairs[held_out:], pairs[:held_out]


def _options(options: dict[str, Any]) -> dict[str, Any]:
    settings = task_options(options, DEFAULTS)
    check_width(settings["width"])
    if settings["eval_problems"] >= PROBLEMS:
        raise ConfigError(
            f"task_options.eval_problems must leave some of {PROBLEMS} problems for training, got "
            f"{settings['eval_problems']}"
        )
    return settings


def prepare(options: dict[str, Any], cache: Path) -> TaskFiles:
    """Writes tokenizer, model configuration and data to a folder named after the options."""
    settings = _options(options)
    name = "arithmetic-" + "-".join(str(settings[key]) for key in DEFAULTS)
    folder = cache / name
    files = TaskFiles(folder / "model", [folder / "train.jsonl"], [folder / "eval.jsonl"])
    if (folder / "eval.jsonl").exists():
        return files
    _tokenizer().save_pretrained(files.model)
    _config(settings).save_pretrained(files.model)
    for part, pairs in zip(
        ("train", "eval"), _problems(settings["seed"], settings["eval_problems"])
    ):
        rows = [
            {"prompt": f"{a}+{b}=", "answer": str(a + b), "data_source": "addition"}
            for a, b in pairs
        ]
        partial = folder / f".{part}.jsonl"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(folder / f"{part}.jsonl")
    return files


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *SYMBOLS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def _config(settings: dict[str, Any]) -> Any:
    from transformers import Qwen3Config

    width = settings["width"]
    return Qwen3Config(
        vocab_size=len(SYMBOLS) + 2,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=settings["layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def build(options: dict[str, Any], files: TaskFiles) -> None:
    """Runs the warm start, supervised learning on noisy demonstrations, unless it has been done."""
    if (files.model / "model.safetensors").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM

    settings = _options(options)
    torch.manual_seed(settings["seed"])
    model = AutoModelForCausalLM.from_config(_config(settings)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["warm_lr"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings["warm_lr"], total_steps=settings["warm_steps"], pct_start=0.1
    )
    for step, (ids, labels) in enumerate(_demonstrations(settings), start=1):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.report(step / settings["warm_steps"])
    save_model(model, files.model)


def _demonstrations(settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    import torch

    pairs, _ = _problems(settings["seed"], settings["eval_problems"])
    rng = random.Random(settings["seed"] + 1)
    code = {symbol: i + 2 for i, symbol in enumerate(SYMBOLS)}
    for _ in range(settings["warm_steps"]):
        sequences = []  # ids with labels; the loss ignores the prompt's labels, -100
        for a, b in rng.choices(pairs, k=settings["warm_batch"]):
            prompt = f"{a}+{b}="
            ids = [code[c] for c in prompt + solution(a, b, rng, NOISE)] + [1]
            sequences.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
        width = max(len(ids) for ids, _ in sequences)
        yield (
            torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in sequences]),
            torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in sequences]),
        )
