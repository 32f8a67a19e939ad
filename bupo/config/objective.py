"""What is trained: which policies, for which advantages and loss, by which steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bupo.config.errors import require
from bupo.config.limits import Group, setting

POLICIES = ("bupo", "internal", "custom", "final")
ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo")
TOKENWISE = ("reinforce_pp", "ppo")
"""Advantages that are made of token rewards, and need no group to compare with"""
AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum", "seq_sum_longest")

ALGORITHMS: dict[str, dict[str, Any]] = {
    **{name: {"policy": name} for name in POLICIES[:3]},
    **{n: {"policy": "final", "advantage": n, "loss": {"type": "ppo"}} for n in ADVANTAGES},
    "dr_grpo": {
        "policy": "final",
        "advantage": "dr_grpo",
        "loss": {"type": "ppo", "aggregation": "seq_sum_longest"},
    },
    "gspo": {
        "policy": "final",
        "advantage": "grpo",
        "loss": {"type": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    },
    "gmpo": {
        "policy": "final",
        "advantage": "grpo",
        "loss": {"type": "gmpo", "clip_low": 0.4, "clip_high": 0.4, "aggregation": "seq_mean"},
    },
    "sapo": {
        "policy": "final",
        "advantage": "grpo",
        "loss": {"type": "sapo", "aggregation": "seq_mean"},
    },
    "cispo": {  # bounds the ratio only from above
        "policy": "final",
        "advantage": "grpo",
        "loss": {"type": "cispo", "clip_high": 4.0},
    },
}
"""The settings that `algorithm=NAME` stands for"""


@dataclass
class BupoConfig(Group, prefix="bupo."):
    layer: int | None = setting(None, at_least=1)
    """Layer l of the internal policy pi^l, counted from 1, which policy=bupo trains in phase 1 and
    policy=internal in all steps. It has no default, as the right layer depends on the model: the
    paper takes 6 for Qwen3-4B and -8B and the last but one for Llamas; bupo.auto_layer measures
    it."""
    steps: int = setting(30, at_least=0)
    """Number of steps in phase 1, the paper's s_inter; then the final policy is trained."""
    final_norm: bool = False
    """Apply the model's final norm to H^l before the unembedding (the paper does not)."""
    auto_layer: float | None = setting(None, at_least=0, below=1)
    """Measure the layer before step 1 (policy=bupo): the one where the FFNs of the model stop
    exploring, on 64 of its own responses. The value is the share of the largest rise of entropy by
    an FFN below which a layer no longer explores, for example 0.1. auto_layer.json in the run
    directory holds the curve. null: bupo.layer is used."""
    auto_stop: float | None = setting(None, above=0)
    """End phase 1 before bupo.steps where it has stopped helping (policy=bupo): when the final
    policy's log perplexity of the probes (see diagnostics.every) has risen by this many nats, for
    example 0.1, or KL(pi^l || pi) has made no new low for 5 steps. null: never."""


_LAYERS = re.compile(r"(\d+)(?:(-)(\d+)?)?")


@dataclass
class PhaseConfig(Group, prefix="phases[]."):
    layer: int | None = setting(None, at_least=1)
    """Layer of the internal policy that the phase trains, from 1; null: the final policy."""
    steps: int | None = setting(None, at_least=1)
    """Number of steps in the phase; null, in the last phase only: all that remain."""
    lr: dict[Any, float] = setting({}, at_least=0)
    """Factors of optimizer.lr for parts of the model; 0 freezes a part. The parts are embedding,
    head (unless it is the embedding), a layer (6), a range of layers (1-6), all layers from one on
    with the final norm (7-), and others: whatever is not named, 1 if not given. {7-: 0} trains up
    to layer 6; {6: 1, others: 0} trains layer 6 alone."""

    def __post_init__(self) -> None:
        self.lr = {str(key): factor for key, factor in self.lr.items()}  # YAML reads 6 as a number
        super().__post_init__()
        ranges = sorted(self.lr_of_layers().values())
        for (_, last, _), (first, _, _) in pairwise(ranges):
            require(last < first, f"phases[].lr names layer {first} twice: {self.lr}")

    def lr_of_layers(self) -> dict[str, tuple[int, float, float]]:
        """First layer, last layer (infinity where open), factor, by how they are named."""
        found = {}
        for key, factor in self.lr.items():
            if key in ("embedding", "head", "others"):
                continue
            match = _LAYERS.fullmatch(key)
            first = int(match[1]) if match else 0
            last = float(match[3] or (math.inf if match[2] else first)) if match else 0
            require(
                1 <= first <= last,
                "phases[].lr: expected embedding, head, others, a layer (6) or layers (1-6, 7-), "
                f"got {key!r}",
            )
            found[key] = (first, last, factor)
        return found


@dataclass
class LossConfig(Group, prefix="loss."):
    type: str = setting("ppo", choices=("ppo", "cispo", "gspo", "gmpo", "sapo"))
    """ppo: the clipped ratio of each token. cispo: the clipped ratio as the weight of each token's
    log-prob. gspo: one ratio per response, the geometric mean of its tokens'; clips of about
    3e-4. gmpo: the same, but each token's log-ratio is clipped, to [-clip_low, clip_high]; clips of
    about 0.4. sapo: a sigmoid of each token's ratio in place of a clip."""
    clip_low: float = setting(0.2, at_least=0, at_most=1)
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; 1: no lower bound."""
    clip_high: float = setting(0.2, at_least=0, at_most=math.inf)
    """See clip_low; DAPO's clip-higher is 0.28. inf: no upper bound."""
    dual_clip: float | None = setting(None, above=1, at_most=math.inf)
    """Where the advantage is negative, the loss of a token is at most this times its size, for
    example 10; null: no bound."""
    max_log_ratio: float | None = setting(20.0, above=0)
    """The log of the ratio is clamped to plus or minus this (nats), as in the paper's code, so that
    no ratio is infinite; null: no bound."""
    aggregation: str = setting("token_mean", choices=AGGREGATIONS)
    """token_mean: mean over all tokens of an update. seq_mean: mean over responses of the mean over
    tokens (the paper). seq_sum: mean over responses of the sum over tokens. seq_sum_longest: that
    divided by rollout.max_new_tokens (Dr.GRPO)."""
    entropy_coef: float = setting(0.0, at_least=0)
    """Weight of a bonus on the entropy of the policy that is trained."""
    kl_coef: float = setting(0.0, at_least=0)
    """Weight of the KL divergence to the policy before step 1: the final policy, or pi^l in
    phase 1."""
    kl_estimator: str = setting("k3", choices=("k1", "k2", "k3", "k1_reward"))
    """k1, k2 and k3 are terms of the loss (only k2 has the gradient of KL(pi || reference));
    k1_reward subtracts k1 from the reward of each token (advantages reinforce_pp and ppo)."""
    drop_truncated: bool = False
    """Leave responses cut at rollout.max_new_tokens out of the loss and of its denominators."""
    max_sequence_gap: float | None = setting(None, above=0)
    """Leave out responses whose log-probs by the final policy and by the engine differ by more than
    this (nats, mean over tokens of the absolute value); null: none."""
    tis_cap: float | None = setting(None, above=0)
    """Truncated importance sampling, for engines whose log-probs differ from the trainer's: each
    token's loss is multiplied by min(pi / pi_engine, tis_cap), for example 2; null: no factor."""


@dataclass
class CriticConfig(Group, prefix="critic."):
    lr: float = setting(1e-5, above=0)
    """Learning rate of the critic, a second copy of the model, which advantage=ppo trains."""
    gamma: float = setting(1.0, at_least=0, at_most=1)
    """Discount of a reward for each token that it lies ahead."""
    gae_lambda: float = setting(1.0, at_least=0, at_most=1)
    """Lambda of generalised advantage estimation: 1 is reward-to-go - V, 0 one step of it."""
    clip: float = setting(0.5, above=0, at_most=math.inf)
    """Within an update, a value gains nothing by moving further than this from its old one."""


@dataclass
class OptimizerConfig(Group, prefix="optimizer."):
    lr: float = setting(1e-6, above=0)
    """Learning rate of AdamW."""
    warmup_steps: int = setting(0, at_least=0)
    """Number of training steps over which the learning rate rises linearly to its full value."""
    schedule: str = setting("constant", choices=("constant", "linear"))
    """Learning rate after the warm-up: constant (the paper), or linear, which would be 0 one step
    after the last."""
    betas: tuple[float, float] = setting((0.9, 0.999), at_least=0, below=1)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = setting(0.01, at_least=0)
    """Weight decay of AdamW. A parameter without a gradient, such as those of the layers above l in
    phase 1, never moves."""
    place: str = setting("device", choices=("device", "host"))
    """Where AdamW keeps its moments, and the float32 copies of parameters in bfloat16: on the
    device of the model, or on the host, whose CPU then makes the updates. host saves 8 bytes of GPU
    memory per parameter (12 with model.parameter_dtype=bfloat16)."""
    grad_clip: float = setting(1.0, above=0, at_most=math.inf)
    """Largest norm of the gradient; a longer one is scaled down to it. inf: no limit."""
    updates_per_step: int = setting(4, at_least=1)
    """Number of mini-batches that the prompts of a step are split into; each is one update."""
    mini_batch_prompts: int | None = setting(None, at_least=1)
    """The same as a number of prompts in each mini-batch; it replaces updates_per_step. null: that
    number counts."""
    epochs: int = setting(1, at_least=1)
    """Number of passes over the mini-batches of a step: updates_per_step * epochs updates."""
    micro_batch_tokens: int = setting(16384, at_least=1)
    """Number of tokens (prompt and response, padded) in one forward pass. It decides the memory of
    an update, not its result."""
