"""What a run reads: model and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bupo.config.errors import one_of, require


@dataclass
class ModelConfig:
    path: str | None = None
    """Folder (or hub name) of a Hugging Face causal LM and its tokenizer; a task may set it."""
    compute_dtype: str = "float32"
    """float32, or bfloat16: parameters stay float32, the forward runs under autocast."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    attn_implementation: str = "sdpa"
    """Passed to transformers: sdpa, eager, flash_attention_2, ..."""

    def __post_init__(self) -> None:
        one_of("model.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))


@dataclass
class DataConfig:
    train: list[str] = field(default_factory=list)
    """Parquet or JSONL files in verl's format (prompt, reward_model.ground_truth, data_source);
    folders of such files or saved by Hugging Face datasets; names on the hub. NAME:SPLIT (on the
    hub also NAME:CONFIGURATION/SPLIT) takes another split than train. A prompt is a list of chat
    messages, or a plain string that is used as it is."""
    weights: list[float] = field(default_factory=list)
    """One for each of data.train: its share of the prompts, e.g. [3, 1]. Empty: every prompt once
    an epoch."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other names of the columns prompt, answer and data_source, e.g. {prompt: question}."""
    system_prompt: str | None = None
    """Makes a chat of a plain string: this system message (none if empty), then the string."""
    max_prompt_tokens: int = 1024
    """Longest prompt after the chat template."""
    overlong: str = "error"
    """What a longer prompt does: error, or drop (counted and printed)."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own. octothinker.jinja comes
    with bupo: the paper's prompt for base models (User: ... Assistant:), with BOS."""
    chat_template_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false} for Qwen3."""
    limit: int | None = None
    """Use only the first rows of each training file."""

    def __post_init__(self) -> None:
        one_of("data.overlong", self.overlong, ("error", "drop"))
        require(self.max_prompt_tokens > 0, "data.max_prompt_tokens must be positive")
        require(self.limit is None or self.limit > 0, "data.limit must be positive or null")
        require(all(w > 0 for w in self.weights), "data.weights must be positive")
        require(
            len(self.weights) in (0, len(self.train)),
            f"data.weights has {len(self.weights)} values for {len(self.train)} data.train",
        )
        for name in self.columns:
            one_of("data.columns' names", name, ("prompt", "answer", "data_source"))
