"""What a run reads: model and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bupo.config.errors import one_of, require
from bupo.config.limits import Group, setting


@dataclass
class ModelConfig(Group, prefix="model."):
    path: str | None = None
    """Folder or hub name of a Hugging Face causal LM with its tokenizer; `model=NAME` for short.
    null: the model that the task makes."""
    compute_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Type that the forward pass computes in: float32 (fp32), or bfloat16 (bf16), which runs it
    under autocast."""
    parameter_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Type of parameters and gradients: float32, or bfloat16, which takes half their memory. AdamW
    then updates float32 copies, of which the parameters are rounded values (optimizer.place). Needs
    compute_dtype=bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for about a third more time."""
    attn_implementation: str = "sdpa"
    """Attention of the model, passed to transformers: sdpa, eager, flash_attention_2, ..."""
    shard_ranks: int | None = setting(None, at_least=1)
    """Of several ranks, the number that divide the model among them; each such group of consecutive
    ranks has a copy of it. 8 gathers parameters within a machine of 8 GPUs only; 1 is for a model
    that fits every GPU whole. null: all ranks divide it (docs/scaling.md). A single process does
    without."""

    def __post_init__(self) -> None:
        in_full = {"fp32": "float32", "bf16": "bfloat16"}
        self.compute_dtype = in_full.get(self.compute_dtype, self.compute_dtype)
        self.parameter_dtype = in_full.get(self.parameter_dtype, self.parameter_dtype)
        super().__post_init__()
        require(
            self.parameter_dtype == "float32" or self.compute_dtype == "bfloat16",
            "model.parameter_dtype=bfloat16 needs model.compute_dtype=bfloat16, got "
            f"{self.compute_dtype}",
        )

    def parts(self, world: int) -> int:
        """Returns the number of ranks, of so many, that divide the model."""
        size = (self.shard_ranks or world) if world > 1 else 1
        require(
            world % size == 0,
            f"model.shard_ranks={size}: expected a divisor of the number of ranks, got {world}",
        )
        return size


@dataclass
class LoraConfig(Group, prefix="lora."):
    rank: int | None = setting(None, at_least=1)
    """Rank of LoRA adapters, which are then trained in place of the parameters of the layers (needs
    the package peft); embedding, norms and head stay as they are. null: all parameters are
    trained."""
    alpha: float = setting(32.0, above=0)
    """The product of an adapter's matrices is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get an adapter, for example [q_proj, v_proj]. Empty: all of
    them but the head."""


@dataclass
class DataConfig(Group, prefix="data."):
    train: list[str] = field(default_factory=list)
    """Training data, one name or a list: Parquet or JSONL files in verl's format (prompt,
    reward_model.ground_truth, data_source), folders of such files, folders saved by Hugging Face
    datasets, or data sets on the hub. NAME:SPLIT (on the hub also NAME:CONFIGURATION/SPLIT) takes
    another split than train. A prompt is a list of chat messages, or a plain string, which is used
    as it is."""
    weights: list[float] = setting([], above=0)
    """Share of the prompts that each name in data.train provides, for example [3, 1]. Empty: every
    prompt is used once per epoch."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the columns prompt, answer and data_source in the files, where they differ, for
    example {prompt: question}."""
    system_prompt: str | None = None
    """Turns a plain string into a chat: this system message (none if empty), then the string as the
    user's message. null: plain strings stay plain."""
    max_prompt_tokens: int = setting(1024, at_least=1)
    """Largest number of tokens in a prompt, after the chat template."""
    overlong: str = setting("error", choices=("error", "drop"))
    """What happens to a longer prompt: error ends the command; drop leaves it out and reports the
    number of such prompts."""
    chat_template: str | None = None
    """File with a Jinja chat template; null: the tokenizer's own. octothinker.jinja comes with bupo
    and is the paper's prompt for base models (User: ... Assistant:), with BOS."""
    chat_template_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, for example {enable_thinking: false} for Qwen3."""
    limit: int | None = setting(None, at_least=1)
    """Number of rows that are used of each training file, from the first; null: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.weights) in (0, len(self.train)),
            f"data.weights has {len(self.weights)} values, but data.train has {len(self.train)}",
        )
        for name in self.columns:
            one_of("data.columns' names", name, ("prompt", "answer", "data_source"))
