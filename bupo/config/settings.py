"""Every setting of a run. Rules between groups are in `__post_init__`, so an impossible
configuration cannot be built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bupo.config.errors import one_of, require
from bupo.config.inputs import DataConfig, ModelConfig
from bupo.config.objective import ADVANTAGES, TOKENWISE, CriticConfig, LossConfig, OptimizerConfig
from bupo.config.phases import BupoConfig, PhaseConfig
from bupo.config.sampling import EvalConfig, RewardConfig, RolloutConfig

GPU_WORKSPACE = 2 << 30
"""Bytes of the LM-head ops in training, whatever memory is free: how many chunks they make decides
the last bit of a gradient, and a resumed run is to agree with one that never stopped."""

MAY_CHANGE = (
    *("steps", "name", "out", "resume", "max_bad_steps", "wandb", "watchdog.", "diagnostics."),
    *("eval.", "checkpoint.", "reward.workers", "reward.timeout", "rollout.max_logprob_gap"),
    # How the same sums are computed: what an out-of-memory error is cured with
    *("optimizer.micro_batch_tokens", "model.gradient_checkpointing", "model.attn_implementation"),
    *("rollout.batch_size", "rollout.vllm"),
    # Places; the weights come from the checkpoint, and the prompts are compared by their contents
    *("model.path", "data.train", "data.chat_template"),
)
"""Settings that may differ between a resumed run and the run that it continues."""


@dataclass
class CheckpointConfig:
    minutes: float = 30.0
    """A checkpoint is written at the end of a step when the last one is this old; 0: not for its
    age. One is always written at the end of the run and on Ctrl-C or SIGTERM."""
    every: int = 0
    """Steps between further checkpoints; 0: none."""
    keep_last: int = 2
    """This many of the newest checkpoints are kept; older ones are removed, except for `keep`."""
    keep: list[str] = field(default_factory=lambda: ["switch", "best"])
    """Checkpoints that are written and kept besides: switch, the end of every phase; best, the step
    with the highest Avg@n in evaluation (mean over data sets). []: none."""

    def __post_init__(self) -> None:
        require(self.minutes >= 0, f"checkpoint.minutes must be at least 0, got {self.minutes}")
        require(self.every >= 0, f"checkpoint.every must be at least 0, got {self.every}")
        require(self.keep_last >= 1, f"checkpoint.keep_last must be at least 1: {self.keep_last}")
        for kind in self.keep:
            one_of("checkpoint.keep", kind, ("switch", "best"))


@dataclass
class WatchdogConfig:
    seconds: float = 1800.0
    """A stage (rollout, reward, update, evaluation, ...) that gets no further
    for so long is named, and the stacks of all threads go to stalls.txt; 0: never."""
    kill: bool = False
    """Then end the process, for a supervisor that starts it again with resume=auto."""

    def __post_init__(self) -> None:
        require(self.seconds >= 0, "watchdog.seconds must be at least 0")


@dataclass
class DiagnosticsConfig:
    every: int = 10
    """Steps between looks at the policies of all layers, on probes: responses that the model gives
    before step 1 to 32 prompts. diagnostics.jsonl and the report have them. 0: never; a run
    that began so has no probes to look at later."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "diagnostics.every must be at least 0")


@dataclass
class Config:
    name: str = "run"
    """Used in the name of the run directory and the report."""
    algorithm: str = "bupo"
    """bupo: the internal policy first, then the final policy. grpo: the final policy only.
    internal: the internal policy only. custom: the given `phases`."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """For algorithm=custom, e.g. from the bottom up: [{layer: 2, steps: 10}, {layer: 4, steps: 10},
    {}]; only layers up to 6, under the final objective: [{lr: {7-: 0}}]."""
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
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        one_of("algorithm", self.algorithm, ("bupo", "grpo", "internal", "custom"))
        one_of("advantage", self.advantage, ADVANTAGES)
        one_of("resume", self.resume, ("never", "auto"))
        require(self.steps > 0, f"steps must be positive, got {self.steps}")
        require(self.max_bad_steps > 0, "max_bad_steps must be positive")
        require(
            self.resume == "never" or self.out is not None,
            "resume=auto needs out=DIR, the run directory to continue",
        )
        require(
            self.rollout.samples >= 2 or self.advantage in TOKENWISE,
            f"rollout.samples must be at least 2 for {self.advantage}'s group advantages, got "
            f"{self.rollout.samples}",
        )
        require(
            self.rollout.refills == 0 or self.rollout.samples >= 2,
            "rollout.refills needs rollout.samples of at least 2: one reward has no spread",
        )
        require(
            self.reward.overlong_buffer <= self.rollout.max_new_tokens,
            f"reward.overlong_buffer ({self.reward.overlong_buffer}) exceeds "
            f"rollout.max_new_tokens ({self.rollout.max_new_tokens})",
        )
        sampled = self.rollout.top_p == 1
        require(
            sampled or self.loss.tis_cap is None,
            f"loss.tis_cap needs rollout.top_p=1, got {self.rollout.top_p}: the log-probs of a "
            "nucleus are of another distribution, so the weights would be biased",
        )
        require(
            sampled or self.loss.max_sequence_gap is None or self.rollout.engine == "hf",
            f"loss.max_sequence_gap with rollout.engine=vllm needs rollout.top_p=1, got "
            f"{self.rollout.top_p}: vLLM's log-probs are those of the nucleus",
        )
        require(
            self.loss.kl_estimator != "k1_reward" or self.advantage in TOKENWISE,
            f"loss.kl_estimator=k1_reward needs advantage={' or '.join(TOKENWISE)}",
        )
        require(
            self.rollout.prompts % self.optimizer.updates_per_step == 0,
            f"rollout.prompts ({self.rollout.prompts}) must be a multiple of "
            f"optimizer.updates_per_step ({self.optimizer.updates_per_step})",
        )
        require(
            self.optimizer.warmup_steps <= self.steps,
            f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) exceeds steps ({self.steps})",
        )
        require(
            self.algorithm != "bupo" or self.bupo.steps < self.steps,
            f"bupo.steps ({self.bupo.steps}) must be less than steps ({self.steps})",
        )
        require(
            self.bupo.auto_layer is None or self.algorithm == "bupo",
            "bupo.auto_layer needs algorithm=bupo",
        )
        require(
            self.bupo.auto_stop is None or self.algorithm == "bupo",
            "bupo.auto_stop needs algorithm=bupo",
        )
        require(
            bool(self.phases) == (self.algorithm == "custom"),
            "phases and algorithm=custom need one another",
        )
        lengths = [phase.steps for phase in self.phases]
        require(
            all(lengths[:-1]), "phases: only the last may leave out steps, which is all that remain"
        )
        total, rest = sum(filter(None, lengths)), bool(lengths) and lengths[-1] is None
        require(
            not lengths or (total < self.steps if rest else total == self.steps),
            f"phases have {total} steps{' before the last' if rest else ''}, steps={self.steps}",
        )
