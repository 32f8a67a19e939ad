"""The policy that a run began with, and how far the one that is trained has gone from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bupo.config import Config
from bupo.rl.forward import Forward
from bupo.rl.losses import mean_kl
from bupo.types import Policy, Rollout


class Reference:
    """A frozen model. It stands for its policy of the layer that is trained, so that a KL term of
    phase 1 has no gradient above that layer."""

    def __init__(self, model: Any, config: Config, pad: int) -> None:
        self.forward = Forward(model.eval().requires_grad_(False), config, pad)
        self._settings = config.loss

    def compare(
        self, rollouts: Sequence[Rollout], policy: Policy, logprobs: Sequence[Tensor]
    ) -> dict[str, float]:
        """Sets ref_logprobs; logprobs are those of the policy that is trained."""
        stats = self.forward.token_stats(rollouts, policy)
        for rollout, ref in zip(rollouts, stats.logprobs):
            rollout.ref_logprobs = ref
        return {"policy/kl": mean_kl(logprobs, rollouts)}

    def costs(self, rollouts: Sequence[Rollout], logprobs: Sequence[Tensor]) -> list[Tensor] | None:
        """beta (log pi - log pi_ref) of each token, if that is a part of the reward."""
        if self._settings.kl_estimator != "k1_reward":
            return None
        pairs = [(x, r.ref_logprobs) for x, r in zip(logprobs, rollouts)]
        return [self._settings.kl_coef * (x - ref) for x, ref in pairs if ref is not None]
