"""Adds to the rollouts of a step what its update needs: log-probs, values and advantages."""

from __future__ import annotations

from collections.abc import Sequence

from bupo import progress
from bupo.config import Config
from bupo.rl.advantages import estimate, penalise_length, with_kl_costs
from bupo.rl.critic import Critic
from bupo.rl.forward import Forward, TokenStats, WithoutAdapters
from bupo.rl.losses import drop, mean_kl, with_importance_weights
from bupo.rl.update import Trainer
from bupo.rl.weight_sync import GapLimit, gap
from bupo.samples import with_streams
from bupo.types import Policy, Rollout

SOME_ROLLOUTS, SOME_FRACTION = 8, 16
"""Where the final policy is not needed on all rollouts, it is evaluated on 1 / SOME_FRACTION of
them, and on at least SOME_ROLLOUTS, for metrics and to check that the engine has its weights"""


class Streams:
    """Computes the streams of bupo.types.Rollout that follow `engine`, up to `importance`."""

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        reference: Forward | WithoutAdapters | None,
        critic: Critic | None,
        samples_from_nucleus: bool,
    ) -> None:
        """reference, critic: as in bupo.rl.loop.Parts. samples_from_nucleus: of the engine."""
        self._config, self._trainer = config, trainer
        self._reference, self._critic = reference, critic
        self._comparable = config.rollout.top_p == 1 or not samples_from_nucleus
        dtype, fixed = config.model.compute_dtype, config.rollout.max_logprob_gap
        self._limit = GapLimit(dtype, fixed, sampled=True)

    def with_logprobs(
        self, rollouts: list[Rollout], policy: Policy
    ) -> tuple[list[Rollout], dict[str, float]]:
        """Adds the log-probs that the loss, the advantages and the critic need, and returns metrics
        of them. Raises SyncError if the engine has sampled from other weights.

        The stream `old` is left to the update if that can compute it, and nothing else needs it.
        """
        loss, forward = self._config.loss, self._trainer.forward
        everywhere = bool(loss.tis_cap or loss.max_sequence_gap)
        old_is_needed = not self._trainer.updates_once or everywhere or self._reference is not None
        old_is_final = policy.layer is None and old_is_needed
        others = (self._reference, self._critic)
        passes = progress.parts(
            old_is_needed + (not old_is_final) + sum(other is not None for other in others)
        )
        found: dict[str, float] = {}
        if old_is_needed:
            with next(passes):
                final = old = forward.token_stats(rollouts, policy)
            rollouts = with_streams(rollouts, "old", old.logprobs)
            found["policy/entropy"] = old.mean_entropy()
        compared = rollouts
        if not old_is_final:
            if not everywhere:
                wanted = max(SOME_ROLLOUTS, len(rollouts) // SOME_FRACTION)
                compared = rollouts[:: max(1, len(rollouts) // wanted)]
            with next(passes):
                final = forward.token_stats(compared, Policy(None))
        found |= self._compared_with_engine(compared, final)
        if everywhere:
            rollouts = with_streams(rollouts, "final", final.logprobs)
        if self._reference:
            with next(passes):
                reference = self._reference.token_stats(rollouts, policy)
            rollouts = with_streams(rollouts, "reference", reference.logprobs)
            found["policy/kl"] = mean_kl(rollouts)
        if self._critic:
            with next(passes):
                rollouts = self._critic.evaluate(rollouts)
        return rollouts, found

    def _compared_with_engine(
        self, rollouts: Sequence[Rollout], final: TokenStats
    ) -> dict[str, float]:
        """Returns metrics of the final policy. Raises SyncError if it is not the engine's."""
        mismatch = gap([r.stream("engine") for r in rollouts], final.logprobs)
        if self._comparable:
            self._limit.check(mismatch, "log-probs of sampled tokens")
        return {"final/entropy": final.mean_entropy(), "rollout/logprob_gap": mismatch}

    def with_advantages(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Adds the advantages that the update uses, and marks the responses that it leaves out."""
        config, loss = self._config, self._config.loss
        rollouts = drop(rollouts, loss.max_sequence_gap, loss.drop_truncated)
        buffer = config.reward.overlong_buffer
        rollouts = penalise_length(rollouts, config.rollout.max_new_tokens, buffer)
        if self._reference and loss.kl_estimator == "k1_reward":
            rollouts = with_kl_costs(rollouts, loss.kl_coef)
        critic = config.critic
        rollouts = estimate(rollouts, config.advantage, critic.gamma, critic.gae_lambda)
        return rollouts if loss.tis_cap is None else with_importance_weights(rollouts, loss.tis_cap)
