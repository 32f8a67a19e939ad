"""Updates the weights of the policy from rollouts with advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from bupo import ops
from bupo.config import GPU_WORKSPACE, Config
from bupo.policy import parameter_layers
from bupo.rl.forward import Forward
from bupo.rl.losses import LOSSES, with_weights
from bupo.rl.optimise import BatchLoss, Updates, mini_batches, optimise
from bupo.rl.optimizer import AdamW, learning_rate
from bupo.samples import Batch
from bupo.types import Policy, Rollout

_METRICS = ("clip_fraction", "ratio_mean", "approx_kl", "live_fraction", "ratio_max")


class Trainer:
    """Holds the model, its forward pass for rollouts, and its optimizer."""

    def __init__(self, model: nn.Module, config: Config, pad: int) -> None:
        self.model, self._config = model, config
        ops.set_workspace_bytes(GPU_WORKSPACE)
        self.forward = Forward(model, config, pad)
        parameters, places = dict(model.named_parameters()), parameter_layers(model)
        self.optimizer = AdamW(parameters, places, config.optimizer, config.optimizer.lr)

    def update(self, rollouts: Sequence[Rollout], policy: Policy, step: int) -> Updates:
        """Makes optimiser updates over mini-batches of whole prompt groups.

        The stream `old` comes from the policy that is updated: the ratio of J_IPA (arXiv
        2512.19673) is pi^l / pi^l_old and shows only what updates have changed. `importance`, if
        present, comes from the final policy and is a factor of each token's ratio loss.
        """
        settings, loss_settings = self._config.optimizer, self._config.loss
        lr = learning_rate(self._config, step, settings.lr)
        self.optimizer.set_rates(lr, policy.rates.factor)
        longest = self._config.rollout.max_new_tokens
        parts = [
            with_weights(part, loss_settings.aggregation, longest)
            for part in mini_batches(rollouts, settings.updates_per_step)
        ]

        def loss(batch: Batch, tokens: int) -> BatchLoss:
            hidden, head = self.forward.hidden(batch, policy), self.forward.head()
            out = LOSSES[loss_settings.type](hidden, head, batch, loss_settings)
            made_of = {
                "hidden states": hidden,
                "old log-probs": batch.streams["old"],
                "advantages": batch.streams["advantage"],
                "log-probs": out.logprobs,
            }
            return BatchLoss(out.loss, {name: out.metrics[name] for name in _METRICS}, made_of)

        updates = optimise(
            dict(self.model.named_parameters()),
            self.optimizer,
            parts * settings.epochs,
            self.forward.batches,
            loss,
            settings.grad_clip,
        )
        metrics = dict.fromkeys(_METRICS, 0.0) | updates.metrics | {"lr": lr}
        return replace(updates, metrics={f"policy/{name}": x for name, x in metrics.items()})
