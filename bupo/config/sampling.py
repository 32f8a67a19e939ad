"""What is sampled and how it is graded: rollouts, rewards, evaluation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from bupo.config.errors import one_of, require

OWN = {
    "model": "model.path",
    "runner": "rollouts are generated",
    "dtype": "model.compute_dtype",
    "seed": "seed",
    "max_model_len": "data.max_prompt_tokens + rollout.max_new_tokens",
    "max_num_seqs": "rollout.batch_size",
    "logprobs_mode": "training uses the log-probs of the sampled policy",
    "generation_config": "a model's own defaults would bend the policy",
}
"""Options of vLLM that follow from other settings, or that training relies on, and from what"""


@dataclass
class RolloutConfig:
    engine: str = "hf"
    """hf: transformers' generate, any model. vllm: fast for all but the smallest models."""
    prompts: int = 32
    """Prompts per step."""
    samples: int = 8
    """Responses per prompt, G."""
    refills: int = 0
    """Dynamic sampling (DAPO): so often in a step, prompts whose responses all have one reward are
    replaced by the next ones; 0: never."""
    max_new_tokens: int = 1024
    """Longest response; a response cut there counts as truncated."""
    temperature: float = 1.0
    """Of sampling, and of every log-prob that training uses."""
    top_p: float = 1.0
    """Nucleus sampling; 1 samples from the policy itself."""
    batch_size: int = 256
    """Responses generated at once."""
    max_logprob_gap: float | None = None
    """Engine and trainer may differ by this much per token (nats, mean); more stops the run. null:
    a few times as much as before the first update, when they hold the same weights."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's LLM, e.g. {tensor_parallel_size: 2}, over the defaults: on a GPU
    {gpu_memory_utilization: 0.4, enable_sleep_mode: true}, which lends its memory to the update, on
    a CPU {kv_cache_memory_bytes: 1073741824}."""

    def __post_init__(self) -> None:
        one_of("rollout.engine", self.engine, ("hf", "vllm"))
        for key in ("prompts", "samples", "max_new_tokens", "batch_size"):
            require(getattr(self, key) > 0, f"rollout.{key} must be positive")
        require(self.refills >= 0, "rollout.refills must be at least 0")
        require(self.temperature > 0, f"rollout.temperature must be > 0, got {self.temperature}")
        require(
            self.max_logprob_gap is None or self.max_logprob_gap > 0,
            "rollout.max_logprob_gap must be > 0 or null",
        )
        require(0 < self.top_p <= 1, f"rollout.top_p must be in (0, 1], got {self.top_p}")
        for key in self.vllm:
            require(key not in OWN, f"rollout.vllm.{key}: bupo sets it ({OWN.get(key)})")
        share = self.vllm.get("gpu_memory_utilization", 0.4)
        require(
            type(share) is float and 0 < share < 1,
            f"rollout.vllm.gpu_memory_utilization must be in (0, 1), got {share!r}",
        )
        for key in ("kv_cache_memory_bytes", "tensor_parallel_size"):
            count = self.vllm.get(key, 1)
            require(
                type(count) is int and count > 0,
                f"rollout.vllm.{key} must be an integer over 0, got {count!r}",
            )

    def vllm_options(self, gpu: bool) -> dict[str, Any]:
        """For a device: those given, over the defaults."""
        of_device: dict[str, Any] = {
            "kv_cache_memory_bytes": 1 << 30,
            "enforce_eager": True,
            # A prompt read in pieces takes back random numbers, which a CPU's generator cannot.
            "enable_chunked_prefill": False,
        }
        if gpu:
            of_device = {"gpu_memory_utilization": 0.4, "enable_sleep_mode": True}
        everywhere = {"enable_prefix_caching": True, "disable_log_stats": True}
        return everywhere | of_device | self.vllm


@dataclass
class RewardConfig:
    function: str = "math"
    """math: 1 if the last \\boxed{} equals the answer by Math-Verify, else 0; strict: by string
    comparison alone, as in the paper; or module:function taking (responses: list[str], answers:
    list[str]) and returning list[float | None], None for a response that it cannot grade. A
    function extract(response) in that module gives majority votes."""
    by_source: dict[str, str] = field(default_factory=dict)
    """A function for each data_source, e.g. {math_dapo: strict, code: my.module:run}, in place of
    reward.function; data of a source that is not named is then an error."""
    timeout: float = 10.0
    """Seconds for one response before its worker is killed; the response then has no reward, is
    left out of training and counts as wrong in evaluations (reward/timeouts)."""
    workers: int = 2
    """Worker processes of the math reward."""
    overlong_buffer: int = 0
    """DAPO's soft penalty, in training only: over the last so many tokens before
    rollout.max_new_tokens it grows linearly from 0 to 1; 0: none."""

    def __post_init__(self) -> None:
        named = {f"by_source.{source}": name for source, name in self.by_source.items()}
        for key, name in {"function": self.function, **named}.items():
            require(
                name in ("math", "strict") or name.count(":") == 1,
                f"reward.{key} must be math, strict or module:function, got {name!r}",
            )
        require(self.overlong_buffer >= 0, "reward.overlong_buffer must be at least 0")
        require(self.timeout > 0 and self.workers > 0, "reward.timeout and .workers must be > 0")

    @property
    def functions(self) -> list[str]:
        """Each function in use, once."""
        return list(dict.fromkeys(self.by_source.values() or [self.function]))


@dataclass
class EvalConfig:
    files: list[str] = field(default_factory=list)
    """Evaluation data, same formats as data.train; empty for none."""
    samples: int = 8
    """Responses per problem, n of Avg@n and of the Pass@K estimator."""
    samples_by_source: dict[str, int] = field(default_factory=dict)
    """Another number of responses for some data sources, e.g. {aime_2024: 32}."""
    pass_k: list[int] = field(default_factory=lambda: [1, 4, 8])
    """K of Pass@K; undefined (null) where K > samples."""
    temperature: float | None = None
    """Of evaluation; 0 takes the likeliest token (then samples=1), null is rollout.temperature."""
    every: int = 0
    """Steps between evaluations; before, at the phase switch and after always run if files are
    given."""
    limit: int | None = None
    """Use only the first problems of each file."""

    def __post_init__(self) -> None:
        counts = {"samples": self.samples} | {
            f"samples_by_source.{source}": n for source, n in self.samples_by_source.items()
        }
        for key, count in counts.items():
            require(count > 0, f"eval.{key} must be positive, got {count}")
            require(
                self.temperature != 0 or count == 1,
                f"eval.temperature=0 makes equal samples: set eval.{key}=1, got {count}",
            )
        require(all(k > 0 for k in self.pass_k), "eval.pass_k must be positive")
        require(self.temperature is None or self.temperature >= 0, "eval.temperature must be >= 0")
        require(self.every >= 0, "eval.every must be at least 0")
        require(self.limit is None or self.limit > 0, "eval.limit must be positive or null")

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
