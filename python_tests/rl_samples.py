"""What the tests of the RL stages share: a small Qwen3, rollouts over its ids, data files.

The models are sharpened: at their usual initialisation every policy is nearly uniform, and a test
that mixes two of them up could pass.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from bupo.tasks import tiny
from bupo.types import Prompt, Rollout

VOCAB, DEPTH = 43, 3
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def small_model(
    tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, depth: int = DEPTH
) -> Any:
    """A Qwen3 with a head of exactly VOCAB rows, in training mode as the trainer's is."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = _sharpened(AutoModelForCausalLM.from_config(config)).to(dtype)
    if dtype == torch.float64:
        _norm_in_float64(model)
    return model.train()


def _norm_in_float64(model: Any) -> None:
    """Qwen3's own norms round to float32, so sums of another order could still differ by that."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Qwen3RMSNorm":
                norm = torch.nn.RMSNorm(len(child.weight), child.variance_epsilon).double()
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)


def tiny_qwen3(cache: Path, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer of bupo.tasks.tiny, loaded as a run loads them; its head is padded."""
    options = {"layers": 2, "width": 32, **options}
    files = tiny.prepare(options, cache)
    tiny.build(options, files.model)
    model = AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float32)
    return _sharpened(model).train(), AutoTokenizer.from_pretrained(files.model)


def tiny_tokenizer(cache: Path) -> Any:
    """The byte-level tokenizer of bupo.tasks.tiny, with its ChatML template."""
    return AutoTokenizer.from_pretrained(tiny.prepare({}, cache).model)


@torch.no_grad()
def _sharpened(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter *= 20 if "embed" in name or "lm_head" in name else 6
        else:  # norms: not all ones, or a norm left out could hide
            parameter *= 1 + 0.3 * torch.randn_like(parameter)
    return model


def prompt(token_ids: list[int], answer: str = "", index: int = 0, source: str = "test") -> Prompt:
    return Prompt(index, source, str(token_ids), token_ids, answer)


def response(
    asked: Prompt,
    token_ids: list[int],
    group: int = 0,
    text: str = "",
    logprobs: Sequence[float] | None = None,
    finish_reason: str = "stop",
) -> Rollout:
    """A response as an engine makes it; its log-probs are 0 unless they are given."""
    logprobs = [0.0] * len(token_ids) if logprobs is None else logprobs
    return Rollout.from_response(asked, group, token_ids, logprobs, finish_reason, text)


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [r.response_ids for r in rollouts]


def rewarded(group: int, reward: float, tokens: int = 1) -> Rollout:
    """A response of which only group, reward and length matter."""
    return replace(response(prompt([1]), [2] * tokens, group), reward=reward)


def random_rollouts(groups: int = 4, samples: int = 3, seed: int = 0) -> list[Rollout]:
    """Prompts of 1 to 8 and responses of 1 to 11 tokens, with an advantage for every token.

    All ids occur, that of padding too, and every third response ends in it.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rollouts = []
    for group in range(groups):
        asked = prompt(rng.choices(range(VOCAB), k=1 + (3 * group + seed) % 8), index=group)
        for _ in range(samples):
            ids = rng.choices(range(VOCAB), k=rng.randint(1, 11))
            if len(rollouts) % 3 == 0:
                ids[-1] = 0
            rollout = replace(response(asked, ids, group), reward=rng.random())
            rollouts.append(rollout.with_stream("advantage", torch.randn(len(ids))))
    return rollouts


def data_file(name: str, folder: Path, source: str = "math_dapo") -> Path:
    """shared/data/NAME.parquet where the project's data lies, in or beside the checkout; otherwise
    a small file of the same format and data source, written to folder."""
    root = Path(__file__).resolve().parents[1]
    for place in (root / "shared", root.parent / "shared"):
        if (place / "data" / f"{name}.parquet").is_file():
            return place / "data" / f"{name}.parquet"
    questions = [
        (f"What is {n} + \\frac{{{n}}}{{2}}? ✓", f"\\frac{{{3 * n}}}{{2}}") for n in range(60)
    ]
    return write_parquet(
        folder / f"{name}.parquet", [verl_row(*each, source) for each in questions]
    )


def verl_row(question: str, answer: str, source: str = "math_dapo") -> dict[str, Any]:
    """A row as the project's data files have it."""
    return {
        "prompt": [
            {"content": SYSTEM, "role": "system"},
            {"content": question, "role": "user"},
        ],
        "data_source": source,
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": -1},
    }


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file
