"""Says whether a run fits the memory of a card and, if it does not, which settings make it fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, combinations

from bupo.commands.sizes import GIB, Sizes
from bupo.config import Config, ConfigError

CARDS = {
    "A100-40GB": 39.3,
    "A100-80GB": 79.1,
    "H100-80GB": 79.1,
    "H200": 139.7,
    "B200": 178.0,
    "L40S": 44.4,
    "RTX-4090": 23.6,
    "RTX-5090": 31.3,
}
"""GiB in all, about what torch reports for such cards. On the machine that has the card, what its
own torch reports counts instead"""
OVERHEAD = 2 * GIB
"""Assumed, not measured: what CUDA, its libraries, fragmentation and a sleeping vLLM take"""
WORK_OF_VLLM = GIB
"""Assumed, not measured: what vLLM takes beside weights and cache"""


def _rungs(config: Config, longest: int) -> list[tuple[str, Config]]:
    """Returns settings that take less memory, as they are typed, each with the configuration that
    has them: what costs little time first. longest: tokens of the longest sequence."""
    model, rollout = config.model, config.rollout
    share = min(0.25, rollout.vllm_options(gpu=True).get("gpu_memory_utilization", 0.25))
    return [
        (
            "model.gradient_checkpointing=true",
            replace(config, model=replace(model, gradient_checkpointing=True)),
        ),
        (
            f"optimizer.micro_batch_tokens={longest}",
            replace(config, optimizer=replace(config.optimizer, micro_batch_tokens=longest)),
        ),
        (
            f"'rollout.vllm={{gpu_memory_utilization: {share}}}'",
            replace(
                config,
                rollout=replace(rollout, vllm=rollout.vllm | {"gpu_memory_utilization": share}),
            ),
        ),
        (
            "optimizer.place=host",
            replace(config, optimizer=replace(config.optimizer, place="host")),
        ),
        (
            "model.compute_dtype=bf16 model.parameter_dtype=bf16",
            replace(
                config,
                model=replace(model, compute_dtype="bfloat16", parameter_dtype="bfloat16"),
            ),
        ),
        ("lora.rank=32", replace(config, lora=replace(config.lora, rank=32))),
    ]


def memory_of_card(name: str) -> int:
    """Returns the bytes of a card by its name, or of a size such as 48GiB. Raises ConfigError."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*GiB", name)
    if size is None and name not in CARDS:
        raise ConfigError(f"--for {name}: expected {', '.join(CARDS)}, or a size such as 48GiB")
    return int((float(size[1]) if size else CARDS[name]) * GIB)


def _demands(config: Config, sizes: Sizes, card: int) -> tuple[int, int, int]:
    """Returns the bytes that updates take, those that rollouts take, and how many sequences of full
    length the engine can then hold."""
    engine, sequences, between = sizes.engine, config.rollout.batch_size, 0
    if config.rollout.engine == "vllm":
        options = config.rollout.vllm_options(gpu=True)
        if "kv_cache_memory_bytes" in options:
            cache = int(options["kv_cache_memory_bytes"])
            engine = sizes.engine_weights + WORK_OF_VLLM + cache
        else:
            engine = int(options["gpu_memory_utilization"] * card)
        ranks = int(options.get("tensor_parallel_size", 1))
        free = engine - sizes.engine_weights // ranks - WORK_OF_VLLM
        room = free // (sizes.cache_of_sequence // ranks)
        sequences = min(config.rollout.batch_size, room)
        between = 0 if options.get("enable_sleep_mode") else engine
    update = sum(sizes.memory.values()) + between + OVERHEAD
    return update, sizes.resident + engine + OVERHEAD, sequences


def _fits(config: Config, sizes: Sizes, card: int) -> bool:
    update, rollouts, sequences = _demands(config, sizes, card)
    return max(update, rollouts) <= card and sequences >= 1


def verdict(config: Config, card: int, sizes_of: Callable[[Config], Sizes]) -> str:
    """Returns whether the run fits, in words, and the fewest settings that make it fit if it does
    not. sizes_of: measures the model with other settings."""
    sizes = sizes_of(config)
    update, rollouts, sequences = _demands(config, sizes, card)
    needs = (
        f"of {card / GIB:.1f} GiB, an update takes about {update / GIB:.1f} and rollouts "
        f"{rollouts / GIB:.1f}"
    )
    if config.rollout.engine == "vllm":
        needs += f", with room for {max(sequences, 0)} sequences of full length at once"
    if _fits(config, sizes, card):
        return f"fits: {needs}"
    # The fewest settings, and of those the ones that cost little time; all sizes are cheap to get.
    numbers = range(len(_rungs(config, sizes.longest)))
    for chosen in chain.from_iterable(combinations(numbers, n) for n in range(1, 1 + len(numbers))):
        changed, typed = _with(config, chosen, sizes.longest)
        try:
            enough = _fits(changed, sizes_of(changed), card)
        except ConfigError:  # a family without linear layers has no adapters
            enough = False
        if enough:
            return f"does not fit: {needs}; it fits with {typed}"
    return f"does not fit: {needs}; no setting makes it fit"


def _with(config: Config, rungs: Sequence[int], longest: int) -> tuple[Config, str]:
    """Returns the configuration with these rungs, and how they are typed."""
    typed = []
    for rung in rungs:
        text, config = _rungs(config, longest)[rung]
        typed.append(text)
    return config, " ".join(typed)
