"""What is minimised, and by which steps."""

from __future__ import annotations

from dataclasses import dataclass

from bupo.config.limits import Group, setting

ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo")
TOKENWISE = ("reinforce_pp", "ppo")
"""Advantages that are made of token rewards, and need no group to compare with"""
AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum", "seq_sum_longest")


@dataclass
class LossConfig(Group, prefix="loss."):
    type: str = setting("ppo", choices=("ppo", "cispo", "gspo"))
    """ppo: the clipped ratio of each token. cispo: the clipped ratio weights each token's log-prob.
    gspo: one ratio per response, the geometric mean of its tokens' ratios; its clips are about
    3e-4."""
    clip_low: float = setting(0.2, at_least=0, at_most=1)
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; 1: no lower bound."""
    clip_high: float = setting(0.2, at_least=0, finite=False)
    """See clip_low; DAPO's clip-higher is 0.28. inf: no upper bound."""
    dual_clip: float | None = setting(None, above=1, finite=False)
    """Largest ratio that counts where the advantage is negative, for example 10; null: no bound."""
    max_log_ratio: float | None = setting(20.0, above=0)
    """The log of the ratio is clamped to plus or minus this (nats), as in the paper's code, so that
    no ratio is infinite; null: no bound."""
    aggregation: str = setting("token_mean", choices=AGGREGATIONS)
    """How token losses make one loss: token_mean over all tokens of an update; seq_mean, the mean
    over responses of each one's mean (the paper); seq_sum, the mean over responses of each one's
    sum; seq_sum_longest, that divided by rollout.max_new_tokens (Dr.GRPO)."""
    entropy_coef: float = setting(0.0, at_least=0)
    """Weight of a bonus on the entropy of the policy that is trained."""
    kl_coef: float = setting(0.0, at_least=0)
    """Weight of the KL divergence to the policy before step 1: the final policy, or pi^l in
    phase 1."""
    kl_estimator: str = setting("k3", choices=("k1", "k2", "k3", "k1_reward"))
    """k1, k2 and k3 are terms of the loss (only k2 has the gradient of KL(pi || reference)).
    k1_reward subtracts k1 from the reward of each token (advantages reinforce_pp and ppo)."""
    drop_truncated: bool = False
    """Leave responses that were cut at rollout.max_new_tokens out of the loss and of its
    denominators."""
    max_sequence_gap: float | None = setting(None, above=0)
    """Leave out responses whose log-probs by the final policy and by the engine differ by more than
    this (nats, mean over tokens of the absolute value); null: none."""
    tis_cap: float | None = setting(None, above=0)
    """Truncated importance sampling, for engines whose log-probs differ from the trainer's: the loss
    of each token is multiplied by min(pi / pi_engine, tis_cap), for example 2; null: it is not."""


@dataclass
class CriticConfig(Group, prefix="critic."):
    lr: float = setting(1e-5, above=0)
    """Learning rate of the critic, a copy of the model that advantage=ppo trains besides."""
    gamma: float = setting(1.0, at_least=0, at_most=1)
    """Discount of a reward per token that it lies ahead."""
    gae_lambda: float = setting(1.0, at_least=0, at_most=1)
    """Lambda of generalised advantage estimation: at 1 the advantage is reward-to-go - V, at 0 the
    temporal difference of one token."""
    clip: float = setting(0.5, above=0, finite=False)
    """Within an update, a value gains nothing by moving further than this from its old one."""


@dataclass
class OptimizerConfig(Group, prefix="optimizer."):
    lr: float = setting(1e-6, above=0)
    """Learning rate of AdamW."""
    warmup_steps: int = setting(0, at_least=0)
    """Number of training steps over which the learning rate rises linearly to its full value."""
    schedule: str = setting("constant", choices=("constant", "linear"))
    """Learning rate after the warm-up: constant (the paper), or linear, which falls so that it would
    reach 0 one step after the last."""
    betas: tuple[float, float] = setting((0.9, 0.999), at_least=0, below=1)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = setting(0.01, at_least=0)
    """Weight decay of AdamW. It never moves a parameter that has no gradient, such as those of the
    layers above l in phase 1."""
    grad_clip: float = setting(1.0, above=0, finite=False)
    """Largest norm of the gradient; a longer one is scaled down to it. inf: no limit."""
    updates_per_step: int = setting(4, at_least=1)
    """Number of mini-batches that the prompts of a step are split into; each is one update."""
    epochs: int = setting(1, at_least=1)
    """Number of passes over the mini-batches of a step: updates_per_step * epochs updates in all."""
    micro_batch_tokens: int = setting(16384, at_least=1)
    """Number of tokens (prompt and response, padded) in one forward pass. It decides the memory that
    an update takes, not its result."""
