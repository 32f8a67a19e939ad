"""How responses are sampled and graded: rollouts, rewards, evaluation."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from bupo.config.errors import ConfigError, require
from bupo.config.limits import Group, setting

OWN = {
    "model": "model.path",
    "runner": "rollouts are generated",
    "dtype": "model.compute_dtype",
    "seed": "seed",
    "max_model_len": "data.max_prompt_tokens + rollout.max_new_tokens",
    "logits_processors": "padded rows of the head are never sampled",
    "additional_config": "it tells which rows of the head are padded",
    "logprobs_mode": "training uses the log-probs of the sampled policy",
    "generation_config": "a model's own defaults would change the policy",
}
"""Options of vLLM that follow from other settings, or that training relies on, and from what"""


@dataclass
class RolloutConfig(Group, prefix="rollout."):
    engine: str = setting("hf", choices=("hf", "vllm", "vllm_server"))
    """What generates the responses: hf, generate() of transformers, for any model; vllm, which is
    faster for all but the smallest models; or vllm_server, vLLM in other processes, on GPUs or
    machines of their own."""
    servers: list[str] = field(default_factory=list)
    """Addresses of the vLLM servers, for example [http://10.0.0.2:8000]; --dry_run prints the
    command that starts one which does not answer. Empty: the run starts a server itself, on the
    next GPU, or the next n with rollout.vllm={tensor_parallel_size: n}."""
    prompts: int = setting(32, at_least=1)
    """Number of prompts in a step."""
    samples: int = setting(8, at_least=1)
    """Number of responses to each prompt, G."""
    refills: int = setting(0, at_least=0)
    """Dynamic sampling (DAPO): how many times per step the prompts whose responses all have the
    same reward are replaced by the next prompts; 0: never."""
    max_new_tokens: int = setting(1024, at_least=1)
    """Largest number of tokens in a response; one that is cut there counts as truncated."""
    temperature: float = setting(1.0, above=0)
    """Temperature of sampling, and of every log-prob that training uses."""
    top_p: float = setting(1.0, above=0, at_most=1)
    """Nucleus sampling: the likeliest tokens with this probability are sampled; 1: all tokens."""
    batch_size: int = setting(256, at_least=1)
    """Number of responses that are generated at once. vllm gets all of a step and works on this
    many (max_num_seqs) at a time: one that ends makes room for the next."""
    deterministic: bool = True
    """For vllm: whether each response has its own random numbers, so that the same seed gives the
    same responses and a resumed run is exact (with vllm_server, except for rounding). false: vLLM
    draws for all responses at once, which is faster; a resumed run is then as good as the first,
    but not the same."""
    max_logprob_gap: float | None = setting(None, above=0)
    """The run stops when log-probs of the engine and of the trainer differ by more than this (nats,
    mean over tokens). null: a few times the gap before the first update, when both have the same
    weights."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's LLM, for example {tensor_parallel_size: 2}. They are added to the
    defaults: on a GPU {hf_overrides: {head_dtype: float32}}, which keeps logits unrounded as in
    training, and {gpu_memory_utilization: 0.4, enable_sleep_mode: true}, which lends the engine's
    memory to the update, or {gpu_memory_utilization: 0.9} for vllm_server; on a CPU
    {kv_cache_memory_bytes: 1073741824}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in self.vllm:
            require(key not in OWN, f"rollout.vllm.{key}: bupo sets it ({OWN.get(key)})")
        for url in self.servers:
            require(
                self.engine == "vllm_server",
                f"rollout.servers needs rollout.engine=vllm_server, got {self.engine}",
            )
            require(
                re.fullmatch(r"https?://[^/:]+(:\d+)?/?", url) is not None,
                f"rollout.servers must be addresses such as http://10.0.0.2:8000, got {url!r}",
            )
        share = self.vllm.get("gpu_memory_utilization", 0.4)
        if type(share) is not float or not 0 < share < 1:
            key = "rollout.vllm.gpu_memory_utilization"
            raise ConfigError(f"{key} must be a share above 0 and below 1, got {share!r}")
        for key in ("kv_cache_memory_bytes", "tensor_parallel_size"):
            count = self.vllm.get(key, 1)
            if type(count) is not int or count < 1:
                raise ConfigError(f"rollout.vllm.{key} must be an integer above 0, got {count!r}")

    def ranks_together(self, world: int) -> int:
        """Returns the number of ranks, of so many, that one vLLM runs on: tensor_parallel_size. For
        a single process, vLLM starts others. Raises ConfigError if it is no divisor."""
        size = int(self.vllm.get("tensor_parallel_size", 1))
        if world == 1 or self.engine != "vllm":
            return 1
        require(
            size == 1 or "distributed_executor_backend" not in self.vllm,
            "distributed_executor_backend in rollout.vllm: expected none, as several ranks set it",
        )
        require(
            world % size == 0,
            f"tensor_parallel_size in rollout.vllm: expected a divisor of the number of ranks, "
            f"{world}, got {size}",
        )
        return size

    def vllm_options(self, gpu: bool) -> dict[str, Any]:
        """Arguments of LLM on a GPU or a CPU: the defaults, replaced by those given."""
        of_device: dict[str, Any] = {
            "kv_cache_memory_bytes": 1 << 30,
            "enforce_eager": True,
            # A prompt read in pieces takes back random numbers, which a CPU's generator cannot.
            "enable_chunked_prefill": False,
        }
        if gpu:
            shared = {"gpu_memory_utilization": 0.4, "enable_sleep_mode": True}
            of_device = {"hf_overrides": {"head_dtype": "float32"}}
            of_device |= shared if self.engine == "vllm" else {"gpu_memory_utilization": 0.9}
        everywhere = {"enable_prefix_caching": True, "disable_log_stats": True}
        return everywhere | of_device | self.vllm


@dataclass
class RewardConfig(Group, prefix="reward."):
    function: str | None = None
    """math: 1 if the last \\boxed{} equals the answer by Math-Verify, else 0. strict: the same by
    comparison of strings alone, as in the paper. MODULE:FUNCTION: a function of (responses:
    list[str], answers: list[str]) that returns list[float | None], None for a response that it
    cannot grade. Its module may have extract(response), for majority votes, and KILLABLE = True:
    the function is then called in processes of its own, one response at a time. null: the
    reward of the task, if it has one, else math."""
    by_source: dict[str, str] = field(default_factory=dict)
    """A function for each data_source, for example {math_dapo: strict, code: my.module:run}, in
    place of reward.function. Data of a source that is not named are then an error."""
    timeout: float = setting(10.0, above=0)
    """Seconds for one response before its worker process is killed (reward.workers). The response
    then has no reward: it is left out of training and counts as wrong in evaluations
    (reward/timeouts)."""
    workers: int = setting(2, at_least=1)
    """Number of worker processes of math, and of a function whose module says KILLABLE = True."""
    overlong_buffer: int = setting(0, at_least=0)
    """DAPO's soft penalty on length, in training only: over this many tokens before
    rollout.max_new_tokens, the penalty grows linearly from 0 to 1; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {f"by_source.{source}": name for source, name in self.by_source.items()}
        for key, name in {"function": self.function, **named}.items():
            if name not in (None, "math", "strict") and name.count(":") != 1:
                raise ConfigError(
                    f"reward.{key} must be math, strict or module:function, got {name!r}"
                )

    @property
    def functions(self) -> list[str]:
        """Each function in use, once."""
        return list(dict.fromkeys(self.by_source.values() or [self.function or "math"]))


@dataclass
class EvalConfig(Group, prefix="eval."):
    files: list[str] = field(default_factory=list)
    """Evaluation data, one name or a list, in the formats of data.train. Empty: no evaluation."""
    samples: int = setting(8, at_least=1)
    """Number of responses to each problem: n of Avg@n and of the estimator of Pass@K."""
    samples_by_source: dict[str, int] = setting({}, at_least=1)
    """Another number of responses for some data sources, for example {aime_2024: 32}."""
    pass_k: list[int] = setting([1, 4, 8], at_least=1)
    """Values of K for Pass@K; undefined (null) where K exceeds the number of responses."""
    temperature: float | None = setting(None, at_least=0)
    """Temperature of evaluation; 0: the likeliest token (needs eval.samples=1); null:
    rollout.temperature."""
    every: int = setting(0, at_least=0)
    """Number of steps between evaluations; 0: only those before the first step, at the end of phase
    1 and after the last step, which every run with eval.files has."""
    limit: int | None = setting(None, at_least=1)
    """Number of problems that are used of each file, from the first; null: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_sources = {f"samples_by_source.{name}": n for name, n in self.samples_by_source.items()}
        for key, count in {"samples": self.samples, **of_sources}.items():
            if self.temperature == 0 and count > 1:
                raise ConfigError(
                    f"eval.temperature=0 makes all samples equal: set eval.{key}=1, got {count}"
                )

    def samples_of(self, source: str) -> int:
        """Responses to each problem of a data source."""
        return self.samples_by_source.get(source, self.samples)

    def check_sources(self, sources: Collection[str]) -> None:
        """Raises ConfigError where samples_by_source names a set that is not evaluated."""
        for source in self.samples_by_source:
            require(
                source in sources,
                f"eval.samples_by_source names {source}, but eval.files have the data sources "
                f"{', '.join(sorted(sources)) or '(none)'}",
            )
