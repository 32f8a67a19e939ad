"""What bench_train_step.py trains: a random Qwen3 and its tokenizer, or a real model; prompts and a
reward; and how it measures a step.

No response ends before its last token. In the random model, one entry of the hidden states is the
same positive number for every token, and only the head's row of the end of sequence reads it, so
that its logit is far below all others. The real model is told to end at a token that it never uses.
"""

import dataclasses
import json
import os
import random
import string
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import ResidentMemory
from real_models import random_qwen3
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

PAD, EOS = 0, 1
UNUSED = "<repo_name>"
"""A token of SmolLM2 that marks places in code"""


@dataclasses.dataclass(frozen=True)
class Size:
    layers: int = 12
    width: int = 256
    vocab: int = 32768
    prompts: int = 4
    samples: int = 8
    prompt_tokens: tuple[int, int] = (24, 48)  # shortest and longest
    new_tokens: int = 32
    updates: int = 2  # optimiser updates a step
    micro_rollouts: int = 8  # of the longest prompts, a micro-batch
    lr: float = 1e-6
    model: str = "random Qwen3"
    engine: str = "hf"

    @property
    def rollouts(self) -> int:
        return self.prompts * self.samples

    @property
    def micro_tokens(self) -> int:
        return self.micro_rollouts * (self.prompt_tokens[1] + self.new_tokens)

    @staticmethod
    def read(text: str) -> "Size":
        fields = json.loads(text)
        return Size(**fields | {"prompt_tokens": tuple(fields["prompt_tokens"])})

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def prompts(size: Size) -> list[str]:
    rng = random.Random(0)
    short, long = size.prompt_tokens
    lengths = [short + (long - short) * n // max(size.prompts - 1, 1) for n in range(size.prompts)]
    words = [f"w{n}" for n in range(2, size.vocab)]
    if size.model != Size.model:
        words = list(string.ascii_lowercase)  # a token each
    return [" ".join(rng.choices(words, k=n)) for n in lengths]


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """0 or 1, as good as random, so that groups have both and tokens have a gradient."""
    return [float(zlib.crc32(text.encode()) % 2) for text in responses]


def write(size: Size, folder: Path) -> None:
    """Writes a random model and its tokenizer, and the prompts in bupo's format."""
    words = ["<pad>", "<eos>", *(f"w{n}" for n in range(2, size.vocab))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    _model(size).save_pretrained(folder)
    _write_prompts(size, folder)


def write_real(real: Path, size: Size, folder: Path) -> Size:
    """Writes the same with the SmolLM2 of a folder. Returns its size."""
    os.symlink((real / "model.safetensors").resolve(), folder / "model.safetensors")
    tokenizer, config = AutoTokenizer.from_pretrained(real), AutoConfig.from_pretrained(real)
    tokenizer.eos_token = UNUSED
    config.eos_token_id = tokenizer.eos_token_id
    for part in (tokenizer, config, GenerationConfig.from_model_config(config)):
        part.save_pretrained(folder)
    shape = {"layers": config.num_hidden_layers, "width": config.hidden_size}
    size = dataclasses.replace(size, model=real.name, vocab=config.vocab_size, **shape)
    _write_prompts(size, folder)
    return size


def _write_prompts(size: Size, folder: Path) -> None:
    rows = [
        {"prompt": text, "data_source": "bench", "reward_model": {"ground_truth": ""}}
        for text in prompts(size)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _model(size: Size) -> nn.Module:
    heads = {"num_key_value_heads": max(1, size.width // 128)}
    tokens = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    options = {"max_position_embeddings": 4096, **heads, **tokens}
    model = random_qwen3(size.layers, size.width, size.vocab, **options)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0.1
        for layer in model.base_model.layers:  # none of which changes that entry
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        head = model.get_output_embeddings().weight
        head[:, 0] = 0
        head[EOS, 0] = -1000
    return model


class StepMeter:
    """Time and memory of a step, which it prints as a JSON object. To be made after the model."""

    def __init__(self) -> None:
        self._memory = ResidentMemory()

    def begin(self) -> None:
        self._memory.reset()
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self._ended, self._cpu = time.perf_counter(), time.process_time() - self._cpu

    def report(self, stages: dict[str, float], tokens: float, grad_norm: float) -> None:
        step = self._ended - self._began
        found = {"step": step, "cpu_seconds": self._cpu, **stages}
        found |= {"rest": step - sum(stages.values()), "peak_mib": self._memory.peak_mib()}
        print(json.dumps(found | {"tokens": tokens, "grad_norm": grad_norm}), flush=True)
