"""What bench_train_step.py trains: a random Qwen3 and its tokenizer, prompts, a reward.

No response ends before its last token: one entry of the hidden states is the same positive number
for every token, and the head's row of the end of sequence alone reads it, so that its logit is far
below all others.
"""

from __future__ import annotations

import dataclasses
import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAD, EOS = 0, 1


@dataclasses.dataclass(frozen=True)
class Size:
    layers: int = 12
    width: int = 256
    vocab: int = 32768
    prompts: int = 4
    samples: int = 8
    prompt_tokens: tuple[int, int] = (24, 48)
    """shortest and longest"""
    new_tokens: int = 32
    updates: int = 2
    """optimiser updates a step"""
    micro_rollouts: int = 8
    """of the longest prompts, a micro-batch"""
    lr: float = 1e-6

    @property
    def rollouts(self) -> int:
        return self.prompts * self.samples

    @property
    def micro_tokens(self) -> int:
        return self.micro_rollouts * (self.prompt_tokens[1] + self.new_tokens)

    @staticmethod
    def read(text: str) -> Size:
        fields = json.loads(text)
        return Size(**fields | {"prompt_tokens": tuple(fields["prompt_tokens"])})

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def prompts(size: Size) -> list[str]:
    rng = random.Random(0)
    short, long = size.prompt_tokens
    lengths = [short + (long - short) * n // max(size.prompts - 1, 1) for n in range(size.prompts)]
    return [" ".join(f"w{rng.randrange(2, size.vocab)}" for _ in range(n)) for n in lengths]


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """0 or 1, as good as random: every group has both, so every token has a gradient."""
    return [float(zlib.crc32(text.encode()) % 2) for text in responses]


def write(size: Size, folder: Path) -> None:
    """Model and tokenizer, and the prompts in bupo's format."""
    _tokenizer(size).save_pretrained(folder)
    _model(size).save_pretrained(folder)
    rows = [
        {"prompt": text, "data_source": "bench", "reward_model": {"ground_truth": ""}}
        for text in prompts(size)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer(size: Size) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{n}" for n in range(2, size.vocab))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def _model(size: Size) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    heads = size.width // 64
    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0.1
        for layer in model.base_model.layers:  # which leave that entry alone
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        head = model.get_output_embeddings().weight
        head[:, 0] = 0
        head[EOS, 0] = -1000
    return model
