"""Every setting of a run. Each group checks itself when it is built, so no impossible configuration
exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bupo.config.errors import ConfigError, require
from bupo.config.inputs import DataConfig, LoraConfig, ModelConfig
from bupo.config.limits import Group, setting
from bupo.config.objective import (
    ADVANTAGES,
    POLICIES,
    TOKENWISE,
    BupoConfig,
    CriticConfig,
    LossConfig,
    OptimizerConfig,
    PhaseConfig,
)
from bupo.config.sampling import EvalConfig, RewardConfig, RolloutConfig

GPU_WORKSPACE = 2 << 30
"""Bytes of the LM-head ops in training, whatever memory is free: how many chunks they make decides
the last bit of a gradient, and a resumed run is to agree with one that never stopped."""

MAY_CHANGE = (
    *("steps", "name", "out", "resume", "max_bad_steps", "wandb", "watchdog.", "diagnostics."),
    *("eval.", "checkpoint.", "reward.workers", "reward.timeout", "rollout.max_logprob_gap"),
    # How the same sums are computed: what an out-of-memory error is cured with
    *("optimizer.micro_batch_tokens", "model.gradient_checkpointing", "model.attn_implementation"),
    *("rollout.batch_size", "rollout.vllm", "rollout.servers", "optimizer.place"),
    "model.shard_ranks",
    # Places; the weights come from the checkpoint, and the prompts are compared by their contents
    *("model.path", "data.train", "data.chat_template"),
)
"""Settings that may differ between a resumed run and the run that it continues."""


@dataclass
class CheckpointConfig(Group, prefix="checkpoint."):
    minutes: float = setting(30.0, at_least=0)
    """A checkpoint is written at the end of a step when the last one is this old; 0: never for its
    age. One is always written at the end of the run and on Ctrl-C or SIGTERM."""
    every: int = setting(0, at_least=0)
    """Number of steps between further checkpoints; 0: none."""
    in_background: bool = False
    """Write a checkpoint while training goes on. Until it is written, the host holds a copy: rank 0
    of the model, and each rank of its part of the optimizer's state (8 bytes per parameter, or 12
    with model.parameter_dtype=bfloat16)."""
    keep_last: int = setting(2, at_least=1)
    """Number of newest checkpoints that are kept; older ones are removed, except for `keep`."""
    keep: list[str] = setting(["switch", "best"], choices=("switch", "best"))
    """Checkpoints that are written and kept in addition: switch, at the end of each phase; best, at
    the step with the highest Avg@n in evaluation (mean over data sets). []: none."""


@dataclass
class WatchdogConfig(Group, prefix="watchdog."):
    seconds: float = setting(1800.0, at_least=0)
    """A stage (rollout, reward, update, evaluation, ...) that makes no progress for this long is
    named, and the stacks of all threads are written to stalls.txt; 0: never."""
    kill: bool = False
    """Then also end the process, for a supervisor that starts it again with resume=auto."""


@dataclass
class DiagnosticsConfig(Group, prefix="diagnostics."):
    every: int = setting(10, at_least=0)
    """Number of steps between measurements of the policies of all layers on the probes, which are
    the model's responses before step 1 to 32 prompts. diagnostics.jsonl and the report show them.
    0: never; a run that is started with 0 has no probes to measure later."""


@dataclass
class Config(Group):
    name: str = "run"
    """Name of the run, for its directory and its report."""
    policy: str = setting("bupo", choices=POLICIES)
    """Policy that the steps train. final: the model's own. internal: that of layer bupo.layer.
    bupo: the internal one for bupo.steps steps, then the final one. custom: those of `phases`.
    algorithm=NAME sets a well-known combination: bupo, internal and custom set only the policy;
    grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline and ppo set policy=final and that
    advantage (dr_grpo also its aggregation); gspo, gmpo, sapo and cispo set policy=final, that
    loss.type and what was published with it. Keys that are given next to it win."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Phases of policy=custom, for example from the bottom up: [{layer: 2, steps: 10}, {layer: 4,
    steps: 10}, {}]; or the layers up to 6 under the final policy's objective: [{lr: {7-: 0}}]."""
    advantage: str = setting("grpo", choices=ADVANTAGES)
    """How rewards become advantages: grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, or
    ppo, which trains a critic (bupo/rl/advantages.py)."""
    steps: int = setting(300, at_least=1)
    """Number of training steps in all."""
    seed: int = 0
    """Seed of the prompt order and of sampling; the same seed gives the same run."""
    out: str | None = None
    """Run directory; null: runs/NAME-ALGORITHM-TIME."""
    resume: str = setting("never", choices=("never", "auto"))
    """auto continues from the newest complete checkpoint in `out`, or starts if there is none."""
    max_bad_steps: int = setting(3, at_least=1)
    """An update with nan or infinity is skipped; this many steps in a row with one end the run."""
    wandb: str | None = None
    """Project of Weights & Biases that shows the metrics, if that package is installed; null:
    none."""
    task: str | None = None
    """Python module that makes model and data: bupo.tasks.arithmetic, modular, countdown, smollm2,
    reasoning_gym or tiny, or one of your own; null: model and data are given."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    bupo: BupoConfig = field(default_factory=BupoConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (prompts := self.optimizer.mini_batch_prompts) is not None:
            require(
                self.rollout.prompts % prompts == 0,
                f"rollout.prompts ({self.rollout.prompts}) must be a multiple of "
                f"optimizer.mini_batch_prompts ({prompts})",
            )
            self.optimizer.updates_per_step = self.rollout.prompts // prompts
        for message in (*self._contradictions(), *self._wrong_phases()):
            raise ConfigError(message)

    @property
    def algorithm(self) -> str:
        """The name in ALGORITHMS that comes nearest to these settings."""
        if self.policy != "final":
            return self.policy
        return self.advantage if self.loss.type == "ppo" else self.loss.type

    def _contradictions(self) -> Iterator[str]:
        rollout, loss, optimizer = self.rollout, self.loss, self.optimizer
        if self.resume == "auto" and self.out is None:
            yield "resume=auto needs out=DIR, the run directory to continue"
        if rollout.samples < 2 and self.advantage not in TOKENWISE:
            yield (
                f"rollout.samples must be at least 2 for {self.advantage}'s group advantages, got "
                f"{rollout.samples}"
            )
        if rollout.samples < 2 and rollout.refills:
            yield "rollout.refills needs rollout.samples of at least 2: one reward has no spread"
        if (buffer := self.reward.overlong_buffer) > rollout.max_new_tokens:
            yield (
                f"reward.overlong_buffer ({buffer}) exceeds rollout.max_new_tokens "
                f"({rollout.max_new_tokens})"
            )
        if rollout.top_p < 1 and loss.tis_cap is not None:
            yield (
                f"loss.tis_cap needs rollout.top_p=1, got {rollout.top_p}: the log-probs of a "
                "nucleus belong to another distribution, so the weights would be biased"
            )
        if rollout.top_p < 1 and loss.max_sequence_gap is not None and rollout.engine != "hf":
            yield (
                f"loss.max_sequence_gap with rollout.engine={rollout.engine} needs "
                f"rollout.top_p=1, got {rollout.top_p}: vLLM's log-probs are those of the nucleus"
            )
        if loss.kl_estimator == "k1_reward" and self.advantage not in TOKENWISE:
            yield f"loss.kl_estimator=k1_reward needs advantage={' or '.join(TOKENWISE)}"
        if rollout.prompts % optimizer.updates_per_step:
            yield (
                f"rollout.prompts ({rollout.prompts}) must be a multiple of "
                f"optimizer.updates_per_step ({optimizer.updates_per_step})"
            )
        if optimizer.warmup_steps > self.steps:
            yield f"optimizer.warmup_steps ({optimizer.warmup_steps}) exceeds steps ({self.steps})"

    def _wrong_phases(self) -> Iterator[str]:
        if self.policy == "bupo" and self.bupo.steps >= self.steps:
            yield f"bupo.steps ({self.bupo.steps}) must be less than steps ({self.steps})"
        for key in ("auto_layer", "auto_stop"):
            if getattr(self.bupo, key) is not None and self.policy != "bupo":
                yield f"bupo.{key} needs policy=bupo, got policy={self.policy}"
        if bool(self.phases) != (self.policy == "custom"):
            yield "policy=custom needs phases, and phases needs policy=custom"
        lengths = [phase.steps for phase in self.phases]
        if not all(lengths[:-1]):
            yield "phases: only the last phase may omit steps (it takes all that remain)"
        total, rest = sum(filter(None, lengths)), lengths[-1:] == [None]
        if lengths and (total >= self.steps if rest else total != self.steps):
            yield f"phases have {total} steps{' before the last' * rest}, but steps={self.steps}"
