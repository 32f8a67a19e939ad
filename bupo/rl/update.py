"""Updates the weights of the policy from rollouts with advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bupo import adapters, ops, progress, ranks
from bupo.config import GPU_WORKSPACE, Config, LossConfig
from bupo.policy import parameter_layers
from bupo.rl import sharding
from bupo.rl.forward import Forward, TokenStats
from bupo.rl.losses import policy_loss, with_weights
from bupo.rl.optimise import BatchLoss, Updates, mini_batches, optimise
from bupo.rl.optimizer import AdamW, learning_rate
from bupo.samples import Batch
from bupo.types import Policy, Rollout

_METRICS = ("clip_fraction", "ratio_mean", "approx_kl", "live_fraction", "ratio_max")


@dataclass(frozen=True)
class PolicyUpdates(Updates):
    """The results of the updates of the policy."""

    old: TokenStats | None
    """Log-probs and entropies of all rollouts before the update, if it has computed them"""


class Trainer:
    """Holds the model, its forward pass for rollouts, and its optimizer."""

    def __init__(self, model: nn.Module, config: Config, pad: int) -> None:
        """model: equal on all ranks, which divide it."""
        sharding.shard(model, config.model)
        self.model, self._config = model, config
        ops.set_workspace_bytes(GPU_WORKSPACE)
        self.forward = Forward(model, config, pad)
        self.parameters = adapters.parameters(model) or dict(model.named_parameters())
        places = parameter_layers(model)
        self.optimizer = AdamW(self.parameters, places, config.optimizer, config.optimizer.lr)

    @property
    def updates_once(self) -> bool:
        """Whether a step makes one update. Its ratios are then 1, and no earlier pass is needed for
        the stream `old`: update() computes it from the hidden states that it has anyway."""
        return self._config.optimizer.updates_per_step * self._config.optimizer.epochs == 1

    def update(self, rollouts: Sequence[Rollout], policy: Policy, step: int) -> PolicyUpdates:
        """Makes optimiser updates over mini-batches of whole prompt groups.

        The stream `old` comes from the policy that is updated: the ratio of J_IPA (arXiv
        2512.19673) is pi^l / pi^l_old and shows only what updates have changed. It may be missing
        if updates_once. `importance`, if present, comes from the final policy and is a factor of
        each token's ratio loss.

        A response whose advantages are all 0 has no gradient without a KL or entropy term, so only
        its count enters the update. All metrics but live_fraction are those of the other responses.
        """
        settings, loss_settings = self._config.optimizer, self._config.loss
        lr = learning_rate(self._config, step, settings.lr)
        self.optimizer.set_rates(lr, policy.rates.factor)
        longest = self._config.rollout.max_new_tokens
        all_parts = [
            with_weights(part, loss_settings.aggregation, longest)
            for part in mini_batches(rollouts, settings.updates_per_step)
        ]
        parts = [_with_gradient(part, loss_settings) for part in all_parts]
        known = all("old" in rollout.streams for rollout in rollouts)
        passes, old = progress.parts(1 if known else 2), None
        if not known:
            with next(passes):
                old = _OldStats(rollouts, parts[0], self.forward, policy)

        def loss(batch: Batch, tokens: int) -> BatchLoss:
            hidden, head = self.forward.hidden(batch, policy), self.forward.head()
            if old is not None:
                batch = old.completed(batch, hidden, head)
            out = policy_loss(hidden, head, batch, loss_settings)
            made_of = {
                "hidden states": hidden,
                "old log-probs": batch.streams["old"],
                "advantages": batch.streams["advantage"],
                "log-probs": out.logprobs,
            }
            return BatchLoss(out.loss, {name: out.metrics[name] for name in _METRICS}, made_of)

        with next(passes):
            updates = optimise(
                self.parameters,
                self.optimizer,
                parts * settings.epochs,
                self.forward,
                loss,
                settings.grad_clip,
            )
        metrics = dict.fromkeys(_METRICS, 0.0) | updates.metrics | {"lr": lr}
        metrics["live_fraction"] *= _tokens(parts) / max(_tokens(all_parts), 1)
        return PolicyUpdates(
            {f"policy/{name}": x for name, x in metrics.items()},
            updates.changed,
            updates.skipped,
            None if old is None else old.stats(),
        )


def _with_gradient(part: Sequence[Rollout], settings: LossConfig) -> list[Rollout]:
    """Returns the responses that have a gradient or, if there are none, the shortest one. An update
    then has a gradient of 0, which decays the optimizer's moments, as without this shortcut."""
    if settings.entropy_coef or (settings.kl_coef and settings.kl_estimator != "k1_reward"):
        return list(part)
    found = [r for r in part if bool(r.stream("advantage").any())]
    return found or sorted(part, key=lambda r: len(r.token_ids))[:1]


def _tokens(parts: Sequence[Sequence[Rollout]]) -> int:
    return sum(r.count for part in parts for r in part)


class _OldStats:
    """The log-probs and entropies of all rollouts before the only update of a step."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        trained: Sequence[Rollout],
        forward: Forward,
        policy: Policy,
    ) -> None:
        """Computes those of the rollouts that are not trained on."""
        places = {id(r.token_ids): n for n, r in enumerate(rollouts)}  # copies share this list
        self._trained = [places[id(r.token_ids)] for r in trained]
        rest = sorted(set(range(len(rollouts))) - set(self._trained))
        stats = forward.token_stats([rollouts[n] for n in rest], policy)
        self._found = dict(zip(rest, zip(stats.logprobs, stats.entropy)))

    def completed(self, batch: Batch, hidden: Tensor, head: dict[str, Any]) -> Batch:
        """Returns the batch with the stream `old`, and keeps its values."""
        with torch.no_grad():
            out = ops.lm_head_logprobs(hidden.detach(), targets=batch.targets, **head)
        parts = zip(batch.split(out.logprobs), batch.split(out.entropy))
        self._found |= {self._trained[i]: part for i, part in zip(batch.members, parts)}
        return replace(batch, streams=batch.streams | {"old": out.logprobs})

    def stats(self) -> TokenStats:
        for part in ranks.gathered({n: (a.cpu(), b.cpu()) for n, (a, b) in self._found.items()}):
            self._found |= part
        found = [self._found[n] for n in range(len(self._found))]
        return TokenStats(*([x.cpu() for x in some] for some in zip(*found)))
