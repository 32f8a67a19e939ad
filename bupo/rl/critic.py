"""The value function of PPO, which has a separate backbone and head, and its updates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bupo.config import Config
from bupo.policy import parameter_layers, unembedding
from bupo.rl import sharding, state_files
from bupo.rl.forward import Forward
from bupo.rl.optimise import BatchLoss, Updates, mini_batches, optimise
from bupo.rl.optimizer import AdamW, learning_rate
from bupo.samples import Batch, with_streams
from bupo.types import Policy, Rollout

_FINAL = Policy(None)


class Critic:
    """V(s_t) = v . h_t + b, where h_t [D] is the final hidden state from which token t is
    predicted, so s_t is the state before the action. v and b begin at zero, and so do the values.

    V is the value of the final policy, which samples, whichever policy a step trains.
    """

    def __init__(self, model: nn.Module, config: Config, pad: int) -> None:
        """model: a causal LM that is not shared with the policy; its unembedding is not used. It is
        equal on all ranks, which divide it."""
        sharding.shard(model, config.model)
        self.forward = Forward(model, config, pad)
        self._config = config
        weight = unembedding(model).weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.head = nn.Linear(weight.shape[1], 1).to(weight.device, dtype)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        sharding.shard_head(self.head, config.model)
        places = {f"backbone.{n}": place for n, place in parameter_layers(model).items()}
        self._parameters = self._trained()
        self.optimizer = AdamW(self._parameters, places, config.optimizer, config.critic.lr)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns what is trained: all but the unembedding, unless it is tied to the embedding."""
        return self._parameters

    def _trained(self) -> dict[str, nn.Parameter]:
        backbone = self.forward.model
        head_only = {n for n, place in parameter_layers(backbone).items() if place is None}
        named = [(f"backbone.{n}", p) for n, p in backbone.named_parameters() if n not in head_only]
        return dict(named) | {f"head.{n}": p for n, p in self.head.named_parameters()}

    @torch.no_grad()
    def evaluate(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Returns the rollouts with the stream `value`: V of the state before each token."""

        def values(batch: Batch) -> tuple[list[Tensor]]:
            return (batch.split(self._values(batch).cpu()),)

        found = self.forward.per_sample(rollouts, values, 1)
        sharding.reshard(self.head)
        return with_streams(rollouts, "value", found[0])

    def update(self, rollouts: Sequence[Rollout], step: int) -> Updates:
        """Makes optimiser updates over the same mini-batches as the policy. V_old and R are the
        streams `value` and `return`::

            mean over tokens of 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)

        Source: 1707.06347, in the form that implementations use (2005.12729).
        """
        settings = self._config.optimizer
        rate = learning_rate(self._config, step, self._config.critic.lr)
        self.optimizer.set_rates(rate, lambda place: 1.0)
        updates = optimise(
            self.parameters(),
            self.optimizer,
            mini_batches(rollouts, settings.updates_per_step) * settings.epochs,
            self.forward,
            self._loss,
            settings.grad_clip,
        )
        metrics = {"clip_fraction": 0.0} | updates.metrics
        metrics["explained_variance"] = explained_variance(rollouts)
        return Updates(
            {f"critic/{name}": value for name, value in metrics.items()},
            updates.changed,
            [f"critic {why}" for why in updates.skipped],
        )

    def _values(self, batch: Batch) -> Tensor:
        """Returns the values [T], in float32 at least."""
        hidden = self.forward.hidden(batch, _FINAL)
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values

    def _loss(self, batch: Batch, tokens: int) -> BatchLoss:
        values, eps = self._values(batch), self._config.critic.clip
        old, returns = batch.streams["value"].to(values), batch.streams["return"].to(values)
        free = (values - returns).square()
        bounded = (values.clamp(old - eps, old + eps) - returns).square()
        loss = torch.maximum(free, bounded).sum() / 2 / max(tokens, 1)
        clipped = (bounded > free).double()
        metrics = {"clip_fraction": clipped.sum() / max(len(clipped), 1)}
        return BatchLoss(loss, metrics, {"returns": returns, "values": old})

    def divided_state(self) -> dict[str, Tensor]:
        """Returns what a checkpoint holds: the parameters and the optimizer's state, which share
        their memory."""
        parameters = {name: p.detach() for name, p in self._parameters.items()}
        return parameters | self.optimizer.divided_state()

    def load(self, folder: Path) -> None:
        """Restores this state. Raises ValueError if something is missing or left over."""
        state_files.read(folder, self.divided_state())
        self.optimizer.follow_parameters()


def explained_variance(rollouts: Sequence[Rollout]) -> float:
    """Returns 1 - Var(R - V) / Var(R) over the tokens in the loss, or 0 if R does not vary."""
    kept = [r for r in rollouts if not r.dropped]
    if not sum(r.count for r in kept):
        return 0.0
    target = torch.cat([r.stream("return").double() for r in kept])
    value = torch.cat([r.stream("value").double() for r in kept])
    spread = float(target.var(correction=0))
    return 1 - float((target - value).var(correction=0)) / spread if spread > 1e-12 else 0.0
