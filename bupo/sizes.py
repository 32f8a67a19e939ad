"""How large a model is and about how much memory its training takes, from its configuration alone:
the model is built on torch's meta device, without weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bupo import hub
from bupo.config import Config, ConfigError, first_line

GIB = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes."""

    family: str
    layers: int
    width: int
    vocabulary: int
    tied: bool
    parameters: int
    internal: int
    """Parameters of the internal policy: embedding, layers 1..l, head; 0 where none is trained"""
    memory: dict[str, int]
    """Bytes of the trainer, by what they hold; an estimate, most of all of the activations"""
    engine: int
    """Bytes of the rollout engine; 0 where the memory is the caller's to grant"""
    checkpoint: int
    """Bytes on disk"""

    def model_line(self) -> str:
        head = "tied head" if self.tied else "head of its own"
        return (
            f"{self.family}, {_count(self.parameters)} parameters: {self.layers} layers of width "
            f"{self.width}, vocabulary {self.vocabulary}, {head}"
        )

    def memory_line(self) -> str:
        parts = ", ".join(f"{name} {_size(x)}" for name, x in self.memory.items())
        return f"about {_size(sum(self.memory.values()))}: {parts}"

    def engine_line(self, config: Config) -> str:
        if self.engine:
            return f"about {_size(self.engine)} for {config.rollout.engine}"
        options = config.rollout.vllm_options(gpu=True)
        if "kv_cache_memory_bytes" in options:  # vLLM then looks at nothing else
            cache = _size(options["kv_cache_memory_bytes"])
            return f"weights and {cache} of cache for vllm (rollout.vllm.kv_cache_memory_bytes)"
        share = options["gpu_memory_utilization"]
        return f"{share:.0%} of the GPU for vllm (rollout.vllm.gpu_memory_utilization)"

    def disk_line(self, config: Config) -> str:
        settings = config.checkpoint
        named = {"switch": "the last of each phase", "best": "the best"}
        kept = [f"the newest {settings.keep_last}", *(named[kind] for kind in settings.keep)]
        each = _size(self.checkpoint)
        return f"{each} a checkpoint; kept: {', '.join(kept)}; one more while it is written"


def _count(n: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return str(n)


def _size(n: int) -> str:
    return f"{n / GIB:.1f} GiB" if n >= GIB // 10 else f"{n / (1 << 20):.1f} MiB"


def measure(
    config: Config, source: str, longest_prompt: int, internal_layer: int | None = None
) -> Sizes:
    """source: folder or hub name of the model; longest_prompt in tokens; internal_layer: the
    highest internal policy that is trained, counted from 1, if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with hub.quiet():
        shape = AutoConfig.from_pretrained(source)
    try:
        with torch.device("meta"), hub.quiet():
            model: Any = AutoModelForCausalLM.from_config(shape)
    except Exception as error:  # of as many kinds as there are families
        raise ConfigError(
            f"{source} cannot be made from its config.json: {first_line(error)}"
        ) from None
    text = shape.get_text_config(decoder=True)
    counts = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(counts.values())
    layer = internal_layer or 0
    internal = sum(n for name, n in counts.items() if _layer(name) < layer)
    head = model.get_output_embeddings().weight
    gpu = torch.cuda.is_available()
    return Sizes(
        family=str(text.model_type),
        layers=text.num_hidden_layers,
        width=head.shape[1],
        vocabulary=head.shape[0],
        tied=model.get_input_embeddings().weight is head,
        parameters=total,
        internal=internal if layer else 0,
        memory=_memory(config, text, total, head.shape, longest_prompt, gpu),
        engine=_engine(config, text, total, longest_prompt, gpu),
        checkpoint=(24 if config.advantage == "ppo" else 12) * total,
    )


def _layer(parameter: str) -> int:
    """0-based layer of a parameter, -1 for one outside the stack: the first number in its name."""
    found = re.search(r"\.(\d+)\.", parameter)
    return int(found[1]) if found else -1


def _memory(
    config: Config, text: Any, total: int, head: tuple[int, int], prompt: int, gpu: bool
) -> dict[str, int]:
    """At its peak, an update of the final policy. Phase 1 has gradients and moments of fewer
    parameters."""
    element = 2 if config.model.compute_dtype == "bfloat16" else 4
    longest = prompt + config.rollout.max_new_tokens
    responses = config.rollout.prompts * config.rollout.samples
    update = responses // config.optimizer.updates_per_step * longest
    tokens = max(min(config.optimizer.micro_batch_tokens, update), longest)
    vocabulary, width = head
    layers, inner = text.num_hidden_layers, getattr(text, "intermediate_size", 4 * width)
    # Of a token in a layer: two norms and two residuals, queries, keys and values before and after
    # their rotation, the attention's output, and four tensors of the feed-forward network.
    of_layer = 4 * width + 4 * inner + 2 * (_attention_width(text) + 2 * _cache_width(text)) + width
    whole = 1 if config.model.gradient_checkpointing else layers
    kept = layers * width if config.model.gradient_checkpointing else 0
    block = min(max((64 << 20) // (4 * vocabulary), 128), 2048) * 4 * vocabulary
    workspace = (1 << 30) if gpu else block
    memory = {
        "weights": 4 * total,
        "gradients": 4 * total,
        "AdamW": 8 * total,
        "activations": tokens * element * (whole * of_layer + kept),
        "LM head": 4 * vocabulary * width + workspace,
    }
    if element == 2:
        memory["bfloat16 weights"] = 2 * total
    if config.loss.kl_coef:
        memory["reference"] = 4 * total
    if config.advantage == "ppo":
        memory["critic"] = 16 * total
    return memory


def _attention_width(text: Any) -> int:
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_attention_heads * size)


def _cache_width(text: Any) -> int:
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return _attention_width(text) // int(text.num_attention_heads) * int(heads)


def _engine(config: Config, text: Any, total: int, prompt: int, gpu: bool) -> int:
    rollout = config.rollout
    if rollout.engine == "vllm":
        element = 2 if config.model.compute_dtype == "bfloat16" else 4
        options = rollout.vllm_options(gpu)
        ranks = int(options.get("tensor_parallel_size", 1))
        return 0 if gpu else element * total + ranks * int(options["kv_cache_memory_bytes"])
    responses = min(rollout.batch_size, rollout.prompts * rollout.samples)
    of_token = 2 * text.num_hidden_layers * _cache_width(text) * 4
    return responses * (prompt + rollout.max_new_tokens) * of_token
