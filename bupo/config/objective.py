"""What is minimised, and by which steps."""

from __future__ import annotations

from dataclasses import dataclass

from bupo.config.errors import one_of, require

ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo")
TOKENWISE = ("reinforce_pp", "ppo")
"""Advantages that are made of token rewards, and need no group to compare with"""
AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum", "seq_sum_longest")


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
    max_log_ratio: float | None = 20.0
    """The log of the ratio is clamped to plus or minus this, as in the paper's code, so that no
    ratio is infinite; null for no bound."""
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
        one_of("loss.type", self.type, ("ppo", "cispo", "gspo"))
        one_of("loss.kl_estimator", self.kl_estimator, ("k1", "k2", "k3", "k1_reward"))
        require(self.kl_coef >= 0, "loss.kl_coef must be at least 0")
        one_of("loss.aggregation", self.aggregation, AGGREGATIONS)
        require(
            self.max_sequence_gap is None or self.max_sequence_gap > 0,
            "loss.max_sequence_gap must be > 0 or null",
        )
        require(self.tis_cap is None or self.tis_cap > 0, "loss.tis_cap must be > 0 or null")
        require(self.clip_low >= 0 and self.clip_high >= 0, "loss.clip_* must be at least 0")
        require(
            self.clip_low <= 1,
            f"loss.clip_low must be at most 1, where the ratio has no bound, got {self.clip_low}",
        )
        require(
            not self.entropy_coef < 0,
            f"loss.entropy_coef must be at least 0, for it is a bonus, got {self.entropy_coef}",
        )
        require(self.dual_clip is None or self.dual_clip > 1, "loss.dual_clip must be > 1 or null")
        require(
            self.max_log_ratio is None or self.max_log_ratio > 0,
            f"loss.max_log_ratio must be > 0 or null, got {self.max_log_ratio}",
        )


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
        require(self.lr > 0 and self.clip > 0, "critic.lr and .clip must be > 0")
        for key in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, key) <= 1, f"critic.{key} must be in [0, 1]")


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    """Learning rate of AdamW."""
    warmup_steps: int = 0
    """Linear warm-up over training steps."""
    schedule: str = "constant"
    """After the warm-up: constant (the paper), or linear, so that 0 would come one step
    after the last."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""
    weight_decay: float = 0.01
    """Never moves a parameter without gradient (layers above l in phase 1)."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    updates_per_step: int = 4
    """Mini-batches that the prompts of a step are split into, one optimiser update each."""
    epochs: int = 1
    """Passes over the mini-batches of a step; updates_per_step * epochs updates in all."""
    micro_batch_tokens: int = 16384
    """Tokens (prompt and response, padded) per forward; does not change the result."""

    def __post_init__(self) -> None:
        one_of("optimizer.schedule", self.schedule, ("constant", "linear"))
        require(self.lr > 0 and self.grad_clip > 0, "optimizer.lr and .grad_clip must be > 0")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps must be at least 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay must be at least 0")
        require(all(0 <= b < 1 for b in self.betas), "optimizer.betas must be in [0, 1)")
        for key in ("updates_per_step", "epochs"):
            require(getattr(self, key) > 0, f"optimizer.{key} must be positive")
        require(self.micro_batch_tokens > 0, "optimizer.micro_batch_tokens must be positive")
