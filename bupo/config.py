"""Every setting of a run: dataclasses, read from YAML and `key=value`, strict about names.

The text under a field is its help; `python -m bupo.run --help` prints it. Cross-field rules are in
`__post_init__`, so an impossible configuration cannot be built.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo")
TOKENWISE = ("reinforce_pp", "ppo")
"""Advantages that are made of token rewards, and need no group to compare with"""
AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum", "seq_sum_longest")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line for the user."""


class RunError(RuntimeError):
    """Ends a run with one line; what could be saved is saved."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{key} must be one of {', '.join(choices)}, got {value!r}")


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
        _one_of("model.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))


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
    """File with a Jinja chat template that replaces the tokenizer's own; octothinker.jinja
    (User: ... Assistant: ...) comes with bupo."""
    chat_template_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false} for Qwen3."""
    limit: int | None = None
    """Use only the first rows of each training file."""

    def __post_init__(self) -> None:
        _one_of("data.overlong", self.overlong, ("error", "drop"))
        _require(self.max_prompt_tokens > 0, "data.max_prompt_tokens must be positive")
        _require(self.limit is None or self.limit > 0, "data.limit must be positive or null")
        _require(all(w > 0 for w in self.weights), "data.weights must be positive")
        _require(
            len(self.weights) in (0, len(self.train)),
            f"data.weights has {len(self.weights)} values for {len(self.train)} data.train",
        )
        for name in self.columns:
            _one_of("data.columns' names", name, ("prompt", "answer", "data_source"))


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
    max_logprob_gap: float = 0.1
    """Engine and trainer may differ by this much per token (nats, mean); more stops the run."""
    kv_cache_gib: int = 1
    """vllm on a CPU: memory of its cache."""
    gpu_memory_utilization: float = 0.4
    """vllm on a GPU: its share of the memory, the trainer's aside."""
    tensor_parallel: int = 1
    """vllm on GPUs: how many share one model."""
    sleep: bool = True
    """vllm on a GPU: give its memory back during the update."""

    def __post_init__(self) -> None:
        _one_of("rollout.engine", self.engine, ("hf", "vllm"))
        counts = ("prompts", "samples", "max_new_tokens", "batch_size", "kv_cache_gib")
        for key in (*counts, "tensor_parallel"):
            _require(getattr(self, key) > 0, f"rollout.{key} must be positive")
        _require(self.refills >= 0, "rollout.refills must be at least 0")
        _require(self.temperature > 0, f"rollout.temperature must be > 0, got {self.temperature}")
        _require(self.max_logprob_gap > 0, "rollout.max_logprob_gap must be > 0")
        _require(
            0 < self.gpu_memory_utilization < 1, "rollout.gpu_memory_utilization must be in (0, 1)"
        )
        _require(0 < self.top_p <= 1, f"rollout.top_p must be in (0, 1], got {self.top_p}")


@dataclass
class RewardConfig:
    function: str = "math"
    """math: 1 if the last \\boxed{} equals the answer by Math-Verify, else 0; strict: by string
    comparison alone, as in the paper; or module:function taking (responses: list[str], answers:
    list[str]) and returning list[float]. A function extract(response) in that module gives
    majority votes."""
    by_source: dict[str, str] = field(default_factory=dict)
    """A function for each data_source, e.g. {math_dapo: strict, code: my.module:run}, in place of
    reward.function; data of a source that is not named is then an error."""
    timeout: float = 10.0
    """Seconds for one response before its worker is killed; it then counts as reward/timeouts."""
    workers: int = 2
    """Worker processes of the math reward."""
    overlong_buffer: int = 0
    """DAPO's soft penalty, in training only: over the last so many tokens before
    rollout.max_new_tokens it grows linearly from 0 to 1; 0: none."""

    def __post_init__(self) -> None:
        named = {f"by_source.{source}": name for source, name in self.by_source.items()}
        for key, name in {"function": self.function, **named}.items():
            _require(
                name in ("math", "strict") or name.count(":") == 1,
                f"reward.{key} must be math, strict or module:function, got {name!r}",
            )
        _require(self.overlong_buffer >= 0, "reward.overlong_buffer must be at least 0")
        _require(self.timeout > 0 and self.workers > 0, "reward.timeout and .workers must be > 0")

    @property
    def functions(self) -> list[str]:
        """Each function in use, once."""
        return list(dict.fromkeys(self.by_source.values() or [self.function]))


@dataclass
class BupoConfig:
    layer: int = 6
    """The internal policy pi^l, counted from 1 (algorithm=bupo: that of phase 1; internal)."""
    steps: int = 30
    """Steps of phase 1, s_inter of the paper; then the final policy is trained."""
    final_norm: bool = False
    """Apply the model's final norm to H^l before the unembedding (the paper does not)."""
    auto_layer: bool = False
    """Measure the layer before step 1 instead: where the FFNs of the model leave exploration, on 64
    responses of its own (algorithm=bupo; auto_layer.json in the run directory has the curve)."""
    auto_tolerance: float = 0.1
    """Share of the largest rise of entropy by an FFN below which a layer no longer explores."""

    def __post_init__(self) -> None:
        _require(self.layer >= 1, f"bupo.layer counts from 1, got {self.layer}")
        _require(self.steps >= 0, f"bupo.steps must be at least 0, got {self.steps}")
        _require(0 <= self.auto_tolerance < 1, "bupo.auto_tolerance must be in [0, 1)")


@dataclass
class PhaseConfig:
    layer: int | None = None
    """The internal policy that the phase trains, counted from 1; null: the final policy."""
    steps: int | None = None
    """Steps of the phase; null, in the last phase: all that remain."""
    boundary: int | None = None
    """A layer that parts the model: 1..boundary and the embeddings are below, the others and the
    final norm above; the head is neither (a tied head is the embedding)."""
    lr_below: float = 1.0
    """Factor of the learning rate below the boundary; 0 freezes."""
    lr_above: float = 1.0
    """Factor of the learning rate above the boundary; 0 freezes."""

    def __post_init__(self) -> None:
        for key in ("layer", "steps", "boundary"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"phases[].{key} must be at least 1, got {value}")
        rates = (self.lr_below, self.lr_above)
        _require(
            all(0 <= rate < math.inf for rate in rates), "phases[].lr_* must be at least 0, finite"
        )
        _require(
            self.boundary is not None or rates == (1, 1),
            "phases[].lr_below and .lr_above need phases[].boundary",
        )
        _require(any(rates), "phases[].lr_below and .lr_above are both 0: nothing would be trained")
        _require(
            self.layer is None or self.lr_below > 0 or self.layer > (self.boundary or 0),
            f"phases[]: lr_below=0 freezes all layers of the policy of layer {self.layer}",
        )


@dataclass
class LossConfig:
    type: str = "ppo"
    """ppo (clipped ratio of each token), cispo, or gspo: one ratio a response, the geometric mean
    of its tokens', with clips of about 3e-4."""
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.2
    """See clip_low; 0.28 is DAPO's clip-higher."""
    dual_clip: float | None = None
    """Bound c of the loss for negative advantages, e.g. 10; null for none."""
    aggregation: str = "token_mean"
    """token_mean over the optimiser step, seq_mean (mean of each response's mean: the paper),
    seq_sum (sum over tokens, mean over responses) or seq_sum_longest (that over max_new_tokens:
    Dr.GRPO)."""
    entropy_coef: float = 0.0
    """Bonus on the entropy of the policy being optimised."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the starting policy: the final one, or pi^l of phase 1."""
    kl_estimator: str = "k3"
    """k1, k2, k3: a term of the loss (only k2 has the gradient of KL(pi || reference)). k1_reward:
    k1 is taken from the reward of each token (reinforce_pp, ppo)."""
    drop_truncated: bool = False
    """Responses cut at max_new_tokens have no part in the loss and its denominators."""
    max_sequence_gap: float | None = None
    """Responses whose log-probs by the final policy and by the engine differ by more than this
    (nats, mean over tokens of the absolute value) have none either; null: no limit."""
    tis_cap: float | None = None
    """Truncated importance sampling: each token's loss times min(pi / pi_engine, cap), e.g. 2; null
    for none. For engines whose log-probs differ from the trainer's."""

    def __post_init__(self) -> None:
        _one_of("loss.type", self.type, ("ppo", "cispo", "gspo"))
        _one_of("loss.kl_estimator", self.kl_estimator, ("k1", "k2", "k3", "k1_reward"))
        _require(self.kl_coef >= 0, "loss.kl_coef must be at least 0")
        _one_of("loss.aggregation", self.aggregation, AGGREGATIONS)
        _require(
            self.max_sequence_gap is None or self.max_sequence_gap > 0,
            "loss.max_sequence_gap must be > 0 or null",
        )
        _require(self.tis_cap is None or self.tis_cap > 0, "loss.tis_cap must be > 0 or null")
        _require(self.clip_low >= 0 and self.clip_high >= 0, "loss.clip_* must be at least 0")
        _require(self.dual_clip is None or self.dual_clip > 1, "loss.dual_clip must be > 1 or null")


@dataclass
class CriticConfig:
    lr: float = 1e-5
    """Learning rate of the critic, which has its own copy of the model (advantage=ppo)."""
    gamma: float = 1.0
    """Discount of a reward for each token that it lies ahead."""
    gae_lambda: float = 1.0
    """Of generalised advantage estimation: 1 is reward-to-go - V, 0 one step of it."""
    clip: float = 0.5
    """In an update a value gains nothing by leaving its old one by more than this."""

    def __post_init__(self) -> None:
        _require(self.lr > 0 and self.clip > 0, "critic.lr and .clip must be > 0")
        for key in ("gamma", "gae_lambda"):
            _require(0 <= getattr(self, key) <= 1, f"critic.{key} must be in [0, 1]")


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    """Learning rate of AdamW."""
    warmup_steps: int = 0
    """Linear warm-up over training steps."""
    schedule: str = "constant"
    """After the warm-up: constant (the paper), or linear down to 0 at the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""
    weight_decay: float = 0.01
    """Never moves a parameter without gradient (layers above l in phase 1)."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    updates_per_step: int = 4
    """Optimiser updates per step: rollout.prompts is split into this many mini-batches."""
    micro_batch_tokens: int = 16384
    """Tokens (prompt and response, padded) per forward; does not change the result."""

    def __post_init__(self) -> None:
        _one_of("optimizer.schedule", self.schedule, ("constant", "linear"))
        _require(self.lr > 0 and self.grad_clip > 0, "optimizer.lr and .grad_clip must be > 0")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps must be at least 0")
        _require(self.weight_decay >= 0, "optimizer.weight_decay must be at least 0")
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas must be in [0, 1)")
        _require(self.updates_per_step > 0, "optimizer.updates_per_step must be positive")
        _require(self.micro_batch_tokens > 0, "optimizer.micro_batch_tokens must be positive")


@dataclass
class EvalConfig:
    files: list[str] = field(default_factory=list)
    """Evaluation data, same formats as data.train; empty for none."""
    samples: int = 8
    """Responses per problem, n of Avg@n and of the Pass@K estimator."""
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
        _require(self.samples > 0, "eval.samples must be positive")
        _require(all(k > 0 for k in self.pass_k), "eval.pass_k must be positive")
        _require(self.temperature is None or self.temperature >= 0, "eval.temperature must be >= 0")
        _require(
            self.temperature != 0 or self.samples == 1,
            f"eval.temperature=0 makes equal samples: set eval.samples=1, got {self.samples}",
        )
        _require(self.every >= 0, "eval.every must be at least 0")
        _require(self.limit is None or self.limit > 0, "eval.limit must be positive or null")


@dataclass
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM."""
    keep_last: int = 2
    """Older checkpoints are removed."""

    def __post_init__(self) -> None:
        _require(self.every >= 0 and self.keep_last >= 1, "checkpoint.every >= 0, .keep_last >= 1")


@dataclass
class WatchdogConfig:
    seconds: float = 1800.0
    """A stage (rollout, reward, old_logprobs, update, sync, evaluation, save) that gets no further
    for so long is named, and the stacks of all threads go to stalls.txt; 0: never."""
    kill: bool = False
    """Then end the process, for a supervisor that starts it again with resume=auto."""

    def __post_init__(self) -> None:
        _require(self.seconds >= 0, "watchdog.seconds must be at least 0")


@dataclass
class Config:
    name: str = "run"
    """Used in the name of the run directory and the report."""
    algorithm: str = "bupo"
    """bupo: the internal policy first, then the final policy. grpo: the final policy only.
    internal: the internal policy only. custom: the given `phases`."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """For algorithm=custom, e.g. from the bottom up: [{layer: 2, steps: 10}, {layer: 4, steps: 10},
    {}]; only layers up to 6, under the final objective: [{boundary: 6, lr_above: 0}]."""
    advantage: str = "grpo"
    """grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, or ppo, which trains a critic
    (bupo/rl/advantages.py)."""
    steps: int = 300
    """Training steps in all."""
    seed: int = 0
    """Of prompt order and sampling; same seed, same run."""
    out: str | None = None
    """Run directory; default runs/NAME-ALGORITHM-TIME."""
    resume: str = "never"
    """auto continues from the newest complete checkpoint in `out`, or starts if there is none."""
    max_bad_steps: int = 3
    """An update with nan or infinity is skipped; so many steps in a row with one end the run."""
    wandb: str | None = None
    """Project of Weights & Biases to show the metrics in, if that package is installed."""
    task: str | None = None
    """Python module that makes model and data (bupo.tasks.arithmetic, bupo.tasks.tiny)."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the task."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    bupo: BupoConfig = field(default_factory=BupoConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        _one_of("algorithm", self.algorithm, ("bupo", "grpo", "internal", "custom"))
        _one_of("advantage", self.advantage, ADVANTAGES)
        _one_of("resume", self.resume, ("never", "auto"))
        _require(self.steps > 0, f"steps must be positive, got {self.steps}")
        _require(self.max_bad_steps > 0, "max_bad_steps must be positive")
        _require(
            self.resume == "never" or self.out is not None,
            "resume=auto needs out=DIR, the run directory to continue",
        )
        _require(
            self.rollout.samples >= 2 or self.advantage in TOKENWISE,
            f"rollout.samples must be at least 2 for {self.advantage}'s group advantages, got "
            f"{self.rollout.samples}",
        )
        _require(
            self.rollout.refills == 0 or self.rollout.samples >= 2,
            "rollout.refills needs rollout.samples of at least 2: one reward has no spread",
        )
        _require(
            self.reward.overlong_buffer <= self.rollout.max_new_tokens,
            f"reward.overlong_buffer ({self.reward.overlong_buffer}) exceeds "
            f"rollout.max_new_tokens ({self.rollout.max_new_tokens})",
        )
        _require(
            self.loss.kl_estimator != "k1_reward" or self.advantage in TOKENWISE,
            f"loss.kl_estimator=k1_reward needs advantage={' or '.join(TOKENWISE)}",
        )
        _require(
            self.rollout.prompts % self.optimizer.updates_per_step == 0,
            f"rollout.prompts ({self.rollout.prompts}) must be a multiple of "
            f"optimizer.updates_per_step ({self.optimizer.updates_per_step})",
        )
        _require(
            self.algorithm != "bupo" or self.bupo.steps < self.steps,
            f"bupo.steps ({self.bupo.steps}) must be less than steps ({self.steps})",
        )
        _require(
            not self.bupo.auto_layer or self.algorithm == "bupo",
            "bupo.auto_layer needs algorithm=bupo",
        )
        _require(
            bool(self.phases) == (self.algorithm == "custom"),
            "phases and algorithm=custom need one another",
        )
        lengths = [phase.steps for phase in self.phases]
        _require(
            all(lengths[:-1]), "phases: only the last may leave out steps, which is all that remain"
        )
        total, rest = sum(filter(None, lengths)), bool(lengths) and lengths[-1] is None
        _require(
            not lengths or (total < self.steps if rest else total == self.steps),
            f"phases have {total} steps{' before the last' if rest else ''}, steps={self.steps}",
        )


def shipped(name: str) -> Path:
    """The file of that name, or the one that comes with bupo among its recipes."""
    package = Path(__file__).parent
    beside = (package / "recipes" / name, package.parent / "recipes" / name)
    return next((path for path in (Path(name), *beside) if path.is_file()), Path(name))


def all_keys(node: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key, leaves only."""
    names: list[str] = []
    for f in fields(node):
        default = f.default_factory() if callable(f.default_factory) else f.default
        if is_dataclass(default):
            names += all_keys(type(default), f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


def load(file: Path | None, overrides: list[str]) -> Config:
    """The configuration of a YAML file and `key=value` overrides.

    Raises ConfigError, one line: an unknown key (naming the nearest), a value of the wrong type, a
    missing file, an impossible combination.
    """
    merged = OmegaConf.structured(Config)
    reading = str(file)
    try:
        if file is not None:
            if not file.is_file():
                raise ConfigError(f"configuration file not found: {file}")
            merged = OmegaConf.merge(merged, OmegaConf.load(file))
        for text in overrides:
            reading = text
            _require(text.find("=") > 0, f"expected key=value, got {text!r}")
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([text]))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        of_phase = error.object_type is PhaseConfig
        name = "phases[]." * of_phase + str(error.full_key)
        known = all_keys(PhaseConfig, "phases[].") if of_phase else all_keys()
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown key {name}{hint}") from None
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{getattr(error, 'full_key', None) or reading}: {first_line}") from None
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{reading} cannot be read: {text}") from None
    except (ValueError, TypeError) as error:  # from OmegaConf: a value of the wrong structure
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{reading}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    for key, value in values(config).items():
        if isinstance(value, float) and not math.isfinite(value) and "clip" not in key:
            raise ConfigError(f"{key} must be finite, got {value}")
    return config


def values(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key and its value."""
    found: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            found |= values(value, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = value
    return found


_MAY_CHANGE = (
    *("steps", "name", "out", "resume", "eval.", "checkpoint.", "reward.workers"),
    *("rollout.max_logprob_gap", "rollout.kv_cache_gib", "rollout.gpu_memory_utilization"),
    *("rollout.sleep", "max_bad_steps", "wandb", "watchdog."),
)
"""Settings that a resumed run may have otherwise than the run it continues."""


def changes_since(
    file: Path, config: Config, may_change: tuple[str, ...] = _MAY_CHANGE
) -> list[str]:
    """`key: old -> new` of the settings that make this another run than the one of `file`."""
    old = values(load(file, []))
    return [
        f"{key}: {old[key]} -> {value}"
        for key, value in values(config).items()
        if value != old[key] and not key.startswith(may_change)
    ]


def dump(config: Config) -> str:
    """The configuration as YAML."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def describe(node: type = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, help) of every key, the help taken from the text under each field."""
    body = ast.parse(inspect.getsource(node)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for item, following in zip(body.body, body.body[1:]):
        if isinstance(item, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(item.target, ast.Name)
            texts[item.target.id] = " ".join(ast.literal_eval(following.value).split())
    rows: list[tuple[str, str, str]] = []
    for f in fields(node):
        default = f.default_factory() if callable(f.default_factory) else f.default
        if is_dataclass(default):
            rows += describe(type(default), f"{prefix}{f.name}.")
        else:
            shown = "null" if default is None else str(default)
            rows.append((prefix + f.name, shown, texts.get(f.name, "")))
        if f.name == "phases":
            rows += describe(PhaseConfig, "phases[].")
    return rows
