"""Small models of real families, and what the tasks that write single characters share: the
tokenizer, the files, and a warm start, which imitates demonstrations."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo import progress
from bupo.config import ConfigError
from bupo.tasks import TaskFiles, save_model, task_options, write_rows

DEFAULTS: dict[str, Any] = {
    "family": "qwen3",
    "layers": 6,
    "width": 128,
    "warm_steps": 300,
    "warm_batch": 64,
    "warm_lr": 3e-3,
    "eval_problems": 128,
    "seed": 0,
}
"""task_options of the tasks that write characters. family: qwen3 or llama. layers, width: the size
of the model. warm_steps, warm_batch, warm_lr: updates of the warm start, demonstrations in each,
and its learning rate. eval_problems: number of problems that are held out. seed: of the weights,
the demonstrations and the choice of held-out problems."""


def family_config(
    settings: dict[str, Any], rows: int, tied: bool, positions: int, pad: int, eos: int
) -> Any:
    """Returns the configuration of a model with 4 attention heads. rows: of embedding and head."""
    from transformers import LlamaConfig, Qwen3Config

    width, kind = settings["width"], {"qwen3": Qwen3Config, "llama": LlamaConfig}
    return kind[settings["family"]](
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=settings["layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
    )


def checked(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the defaults, updated with the given options. Raises ConfigError for an option that
    is wrong, such as a width that 4 heads with a rotary embedding, which rotates pairs, cannot
    have."""
    settings = task_options(options, defaults)
    if settings["width"] % 8:
        raise ConfigError(f"task_options.width must be a multiple of 8, got {settings['width']}")
    if settings["family"] not in ("qwen3", "llama"):
        raise ConfigError(f"task_options.family must be qwen3 or llama, got {settings['family']}")
    return settings


# ---- tasks that write characters ---------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    source: str
    """data_source of the problem: evaluations report each on its own"""


@dataclass(frozen=True)
class Characters:
    """A task whose prompts and responses consist of single characters."""

    name: str
    symbols: str
    defaults: dict[str, Any]
    problems: Callable[[dict[str, Any]], tuple[Sequence[Problem], Sequence[Problem]]]
    """Makes the problems for training and those that are held out"""
    demonstration: Callable[[Problem, random.Random], str]
    """Writes a response, which need not be right"""

    def prepare(self, options: dict[str, Any], cache: Path) -> TaskFiles:
        """Writes tokenizer, model configuration and data to a folder named after the options and
        a digest of its held-out problems with their demonstrations."""
        settings = checked(options, self.defaults)
        parts = self.problems(settings)
        rng = random.Random(0)
        written = [self.demonstration(one, rng) for one in parts[1]]
        digest = hashlib.sha256(repr([self.symbols, parts[1], written]).encode()).hexdigest()[:8]
        named = [self.name, *(str(settings[key]) for key in self.defaults), digest]
        folder = cache / "-".join(named)
        files = TaskFiles(folder / "model", [folder / "train.jsonl"], [folder / "eval.jsonl"])
        if not (folder / "eval.jsonl").exists():
            self._tokenizer().save_pretrained(files.model)
            self._config(settings).save_pretrained(files.model)
            for part, problems in zip(("train", "eval"), parts):
                rows = [
                    {"prompt": one.prompt, "answer": one.answer, "data_source": one.source}
                    for one in problems
                ]
                write_rows(folder / f"{part}.jsonl", rows)
        return files

    def build(self, options: dict[str, Any], folder: Path) -> None:
        """Runs the warm start, supervised learning on demonstrations, unless it has been done."""
        if (folder / "model.safetensors").exists():
            return
        import torch
        from transformers import AutoModelForCausalLM

        settings = checked(options, self.defaults)
        torch.manual_seed(settings["seed"])
        model = AutoModelForCausalLM.from_config(self._config(settings)).train()
        steps = settings["warm_steps"]
        imitate(model, self._demonstrations(settings), steps, settings["warm_lr"])
        save_model(model, folder)

    def _tokenizer(self) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *self.symbols])}
        core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        core.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")

    def _config(self, settings: dict[str, Any]) -> Any:
        return family_config(settings, len(self.symbols) + 2, False, 256, 0, 1)

    def _demonstrations(self, settings: dict[str, Any]) -> Iterable[list[tuple[list[int], int]]]:
        problems, _ = self.problems(settings)
        rng = random.Random(settings["seed"] + 1)
        code = {symbol: i + 2 for i, symbol in enumerate(self.symbols)}
        for _ in range(settings["warm_steps"]):
            batch = []
            for one in rng.choices(problems, k=settings["warm_batch"]):
                ids = [code[c] for c in one.prompt + self.demonstration(one, rng)]
                batch.append(([*ids, 1], len(one.prompt)))
            yield batch


def imitate(
    model: Any, batches: Iterable[list[tuple[list[int], int]]], steps: int, lr: float
) -> None:
    """Trains a model to predict the tokens of demonstrations. batches: of each demonstration the
    token ids and the length of the prompt, whose tokens are not predicted."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step, batch in enumerate(batches, start=1):
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        labels = torch.full_like(ids, -100)  # ignored
        for row, (tokens, prompt) in enumerate(batch):
            labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.report(step / steps)
