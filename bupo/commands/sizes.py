"""Estimates a model's size and the memory that its training takes, from its configuration alone:
the model is built from tensors without data and run over some tokens."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bupo import hub
from bupo.config import GPU_WORKSPACE, Config, ConfigError, first_line

GIB = 1 << 30
TEMPORARY = (
    *("gradients", "activations", "LM head", "bfloat16 weights", "critic's gradients"),
    "gathered",
)
"""Contents of the trainer's memory that an update needs and rollouts do not"""
DIVIDED = ("weights", "gradients", "AdamW", "reference", "critic", "critic's gradients")
"""Contents of which each rank has its part"""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters and bytes."""

    family: str
    layers: int
    width: int
    vocabulary: int
    tied: bool
    parameters: int
    internal: int
    """Parameters of the internal policy: embedding, layers 1..l, head; 0 if none is trained"""
    memory: dict[str, int]
    """Bytes of the trainer on the device of a rank, by content; temporary ones last for an update
    only"""
    host: int
    """Bytes on the host: those of the optimizer with optimizer.place=host, and a sleeping vLLM"""
    engine: int
    """Bytes of the rollout engine; 0 if a setting reserves its memory"""
    engine_weights: int
    longest: int
    """Tokens of the longest sequence: prompt and response"""
    cache_of_sequence: int
    """Bytes of the keys and values of a sequence of full length"""
    checkpoint: int
    """Bytes on disk"""
    ranks: str
    """How several ranks divide the model; empty for one process"""

    @property
    def resident(self) -> int:
        """Bytes of the trainer between updates."""
        return sum(size for name, size in self.memory.items() if name not in TEMPORARY)

    def model_line(self) -> str:
        head = "tied head" if self.tied else "untied head"
        return (
            f"{self.family}, {_count(self.parameters)} parameters: {self.layers} layers of width "
            f"{self.width}, vocabulary {self.vocabulary}, {head}"
        )

    def memory_line(self) -> str:
        parts = ", ".join(
            f"{name} {_size(x) if x else 'not known for this family'}"
            for name, x in self.memory.items()
            if x or name == "activations"
        )
        host = f"; on the host {_size(self.host)}" if self.host else ""
        return f"about {_size(sum(self.memory.values()))}: {parts}{host}"

    def engine_line(self, config: Config) -> str:
        if config.rollout.engine == "vllm_server":
            servers = ", ".join(config.rollout.servers)
            return f"vLLM servers {servers}" if servers else "a vLLM server beside the trainer"
        if self.engine:
            return f"about {_size(self.engine)} for {config.rollout.engine}"
        options = config.rollout.vllm_options(gpu=True)
        if "kv_cache_memory_bytes" in options:  # vLLM then ignores the other memory settings
            cache = _size(options["kv_cache_memory_bytes"])
            return f"weights and {cache} of cache for vllm (rollout.vllm.kv_cache_memory_bytes)"
        share = options["gpu_memory_utilization"]
        return f"{share:.0%} of the GPU for vllm (rollout.vllm.gpu_memory_utilization)"

    def disk_line(self, config: Config) -> str:
        settings = config.checkpoint
        named = {"switch": "the last of each phase", "best": "the best"}
        kept = [f"the newest {settings.keep_last}", *(named[kind] for kind in settings.keep)]
        each = _size(self.checkpoint)
        return f"{each} per checkpoint; kept: {', '.join(kept)}; and one more while it is written"


def _count(n: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return str(n)


def _size(n: int) -> str:
    return f"{n / GIB:.1f} GiB" if n >= GIB // 10 else f"{n / (1 << 20):.1f} MiB"


def measure(
    config: Config,
    source: str,
    longest_prompt: int,
    internal_layer: int | None = None,
    gpu: bool = False,
    world: int = 1,
) -> Sizes:
    """Measures a model without loading weights. Raises ConfigError if the model cannot be built, or
    if it does not have a layer that lora.targets names.

    source: folder or hub name of the model. longest_prompt: in tokens. internal_layer: the highest
    layer whose internal policy is trained, counted from 1, or None. gpu: whether it is trained on a
    GPU. world: number of ranks.
    """
    settings = config.model
    shapes = _shapes(source, settings.compute_dtype, settings.gradient_checkpointing)
    text, counts = shapes.text, shapes.counts
    total, layer = sum(counts.values()), internal_layer or 0
    internal = sum(n for name, n in counts.items() if _layer(name) < layer)
    adapters = _adapters(config, shapes)
    memory, host = _memory(config, shapes, adapters, longest_prompt, gpu)
    if (parts := settings.parts(world)) > 1:
        memory, host = _of_rank(config, memory, shapes.counts, parts), host // parts
    longest = longest_prompt + config.rollout.max_new_tokens
    element = 2 if settings.compute_dtype == "bfloat16" else 4
    cache = 2 * text.num_hidden_layers * _cache_width(text) * element * longest
    vllm = config.rollout.engine == "vllm"
    if vllm and gpu and config.rollout.vllm_options(gpu).get("enable_sleep_mode"):
        # Where its weights sleep
        host += element * total // config.rollout.ranks_together(world)
    engine = _engine(config, element * total, cache, math.prod(shapes.head), gpu)
    if parts > 1 and config.rollout.engine == "hf":  # the whole model, while a rank generates
        engine += (2 if settings.parameter_dtype == "bfloat16" else 4) * total
    extra = 2 * total if settings.parameter_dtype == "bfloat16" else 0
    checkpoint = 12 * adapters or 12 * total + extra
    if config.advantage == "ppo":
        checkpoint += 12 * total + extra
    if config.checkpoint.in_background:  # rank 0 has a copy of the whole model
        weights = 4 * adapters or memory["weights"] * parts
        host += weights + (checkpoint - weights) // parts
    return Sizes(
        family=str(text.model_type),
        layers=text.num_hidden_layers,
        width=shapes.head[1],
        vocabulary=shapes.head[0],
        tied=shapes.tied,
        parameters=total,
        internal=internal if layer else 0,
        memory=memory,
        host=host,
        engine=engine,
        engine_weights=element * total,
        longest=longest,
        cache_of_sequence=cache,
        checkpoint=checkpoint,
        ranks=_ranks(config, shapes.head, longest, world, parts) if world > 1 else "",
    )


@dataclass(frozen=True)
class _Shapes:
    """The facts about a model that need it built, without data."""

    text: Any
    """The configuration of its decoder"""
    counts: dict[str, int]
    """Numbers of values by parameter"""
    linear: dict[str, tuple[int, int]]
    """Outputs and inputs of each linear layer but the head, by name"""
    head: tuple[int, int]
    tied: bool
    saved: tuple[float, float]
    """As _saved returns it"""


@lru_cache(maxsize=4)  # to find what fits, the same model is measured with many settings
def _shapes(source: str, compute_dtype: str, checkpointing: bool) -> _Shapes:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    with hub.quiet():
        shape = AutoConfig.from_pretrained(hub.base_of(source) or source)
    without_data = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with without_data, hub.quiet():
            model: Any = AutoModelForCausalLM.from_config(shape).train()
    except Exception as error:  # each family raises its own kinds
        raise ConfigError(
            f"{source} cannot be built from its config.json: {first_line(error)}"
        ) from None
    half = compute_dtype == "bfloat16"
    saved = _saved(model, without_data, half, checkpointing)
    if not any(saved):  # without data, grouped products of experts only run in bfloat16
        with without_data, hub.quiet():
            in_half: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).train()
        of_token, of_pair = _saved(in_half, without_data, half, checkpointing)
        saved = 2 * of_token, 2 * of_pair  # an upper bound
    head = model.get_output_embeddings()
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return _Shapes(
        text=shape.get_text_config(decoder=True),
        counts={name: p.numel() for name, p in model.named_parameters()},
        linear={n: (m.out_features, m.in_features) for n, m in modules if m is not head},
        head=tuple(head.weight.shape),
        tied=model.get_input_embeddings().weight is head.weight,
        saved=saved,
    )


def _adapters(config: Config, shapes: _Shapes) -> int:
    """Returns the number of values in the LoRA adapters."""
    rank, targets = config.lora.rank, config.lora.targets
    if rank is None:
        return 0
    names = sorted({name.rpartition(".")[2] for name in shapes.linear})
    if not names:
        raise ConfigError(
            f"lora.rank: expected a model with linear layers, got {shapes.text.model_type}, which "
            "has none but the head; lora.rank=null trains all parameters"
        )
    for target in targets:
        if target not in names:
            raise ConfigError(
                f"lora.targets: expected linear layers of the model ({', '.join(names)}), got "
                f"{target}"
            )
    sizes = [sum(x) for n, x in shapes.linear.items() if n.rpartition(".")[2] in (targets or names)]
    return rank * sum(sizes)


def _layer(parameter: str) -> int:
    """Returns a parameter's layer from 0, the first number in its name, or -1 outside the stack."""
    found = re.search(r"\.(\d+)\.", parameter)
    return int(found[1]) if found else -1


def _saved(model: Any, without_data: Any, half: bool, checkpointing: bool) -> tuple[float, float]:
    """Returns the bytes that a forward keeps for its backward for each token, and for each pair of
    tokens of one sequence (the mask of a padded batch, the probabilities of eager attention).

    They are fitted to runs without data at three lengths. With gradient checkpointing they include
    one recomputed layer. Both are zero for a family that cannot run without data.
    """
    import torch

    from bupo.policy import hidden_states, num_layers

    def saved(tokens: int) -> int:
        seen: dict[int, int] = {}  # by storage, because views share one
        alive = []  # keeps the tensors alive, so that no address is reused

        def note(x: torch.Tensor) -> torch.Tensor:
            alive.append(x)
            seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
        with without_data, hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            ids = torch.zeros(1, tokens, dtype=torch.long)
            hidden_states(model, ids, torch.ones_like(ids))
        return sum(seen.values())

    def coefficients() -> tuple[float, float]:
        first, second, third = (saved(n * 32) for n in (1, 2, 3))  # a + b n + c n^2
        of_pair = (third - 2 * second + first) / (2 * 32**2)
        return (second - first) / 32 - 96 * of_pair, of_pair

    errors = logging.getLogger("torch._subclasses.fake_tensor")
    level = errors.level
    errors.setLevel(logging.CRITICAL)
    try:
        of_token, of_pair = coefficients()
        if checkpointing:
            layers = num_layers(model)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            token, pair = coefficients()
            of_token, of_pair = token + of_token / layers, max(pair, of_pair / layers)
        return of_token, of_pair
    except Exception:  # each family raises its own kinds
        return 0.0, 0.0
    finally:
        errors.setLevel(level)


def _memory(
    config: Config, shapes: _Shapes, adapters: int, prompt: int, gpu: bool
) -> tuple[dict[str, int], int]:
    """Returns the peak memory of an update of the final policy, in bytes by content, and the bytes
    of its optimizer on the host. Phase 1 takes less, since fewer parameters have gradients and
    moments."""
    # A micro-batch holds at most the tokens of an update, and at least one longest response.
    longest = prompt + config.rollout.max_new_tokens
    responses = config.rollout.prompts * config.rollout.samples
    update = responses // config.optimizer.updates_per_step * longest
    tokens = max(min(config.optimizer.micro_batch_tokens, update), longest)
    vocabulary, width = shapes.head
    # On the CPU the LM head holds a block of logits of about 64 MiB, 128 to 2048 tokens.
    block = min(max((64 << 20) // (4 * vocabulary), 128), 2048) * 4 * vocabulary
    workspace = GPU_WORKSPACE if gpu else block
    total, of_token, of_pair = sum(shapes.counts.values()), *shapes.saved
    element = 2 if config.model.parameter_dtype == "bfloat16" else 4
    on_host = config.optimizer.place == "host" and gpu
    # Bytes of each trained value: moments and, for a less exact parameter, its float32 copy
    kept = 8 if element == 4 or adapters else 12
    policy, critic = adapters or total, total if config.advantage == "ppo" else 0
    of_critic = 12 if element == 2 else 8
    memory = {
        "weights": element * total + 4 * adapters,
        "gradients": 4 * adapters or element * total,
        "AdamW": 0 if on_host else kept * policy,
        "activations": int(tokens * (of_token + of_pair * longest)),
        "LM head": (0 if adapters else 4 * vocabulary * width) + workspace,
    }
    if config.model.compute_dtype == "bfloat16" and element == 4:
        memory["bfloat16 weights"] = 2 * total
    if config.loss.kl_coef and not adapters:
        memory["reference"] = element * total
    if critic:
        memory["critic"] = element * critic + (0 if on_host else of_critic * critic)
        memory["critic's gradients"] = element * critic
    # On the host: moments, and a copy in pinned memory, whose blocks are powers of two
    sizes = [4 * n for n in shapes.counts.values()]
    pinned = sum(1 << (size - 1).bit_length() for size in sizes)
    host = 8 * (policy + critic) + (8 * adapters or pinned) + (pinned if critic else 0)
    return memory, host if on_host else 0


def _of_rank(
    config: Config, memory: dict[str, int], counts: dict[str, int], parts: int
) -> dict[str, int]:
    """Returns the bytes on one of so many ranks that divide a model. Gathered are what is outside
    of the layers and two layers, of which one comes while the other computes, with their
    gradients."""
    layers: dict[int, int] = {}
    for name, n in counts.items():
        layers[_layer(name)] = layers.get(_layer(name), 0) + n
    outside = layers.pop(-1, 0)
    element = 2 if config.model.parameter_dtype == "bfloat16" else 4
    found = {name: size // parts if name in DIVIDED else size for name, size in memory.items()}
    found["gathered"] = 2 * element * (outside + 2 * max(layers.values(), default=0))
    if config.model.gradient_checkpointing:  # else each layer's cast is kept for its backward
        found.pop("bfloat16 weights", None)
    return found


def _ranks(config: Config, head: tuple[int, int], longest: int, world: int, parts: int) -> str:
    """Says how ranks divide the model, and what its head costs them (docs/scaling.md)."""
    if parts == 1:
        return f"{world}, each with a copy of the model"
    copies = f", with {world // parts} copies" if parts < world else ""
    element = 2 if config.model.parameter_dtype == "bfloat16" else 4
    vocabulary, width = head
    rollout = config.rollout
    tokens = rollout.prompts * rollout.samples // config.optimizer.updates_per_step * longest
    ways = 1 if config.lora.rank is not None else 2  # parameters, and gradients
    gathered, divided = ways * element * vocabulary * width, 6 * width * tokens * parts // world
    than = "less" if gathered <= divided else "more"
    return (
        f"{world}, of which {parts} divide the model{copies}. The head is gathered, which moves "
        f"{_size(gathered)} an update; if it stayed divided, hidden states of full length would "
        f"move {_size(divided)}, so gathering moves {than}"
    )


def _attention_width(text: Any) -> int:
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_attention_heads * size)


def _cache_width(text: Any) -> int:
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return _attention_width(text) // int(text.num_attention_heads) * int(heads)


def _engine(config: Config, weights: int, cache: int, head: int, gpu: bool) -> int:
    """Returns the bytes of the rollout engine, or 0 if a setting reserves its memory or it is
    on other devices. weights, cache: those of the model, and of a sequence of full length. head:
    its number of values, which the hf engine holds in float32 to sum bfloat16 products exactly."""
    rollout = config.rollout
    if rollout.engine == "vllm_server" and (gpu or rollout.servers):  # on devices of its own
        return 0
    if rollout.engine != "hf":
        options = rollout.vllm_options(gpu)
        ranks = int(options.get("tensor_parallel_size", 1))
        return 0 if gpu else weights + ranks * int(options["kv_cache_memory_bytes"])
    responses = min(rollout.batch_size, rollout.prompts * rollout.samples) * cache
    return responses + (4 * head if config.model.compute_dtype == "bfloat16" else 0)
