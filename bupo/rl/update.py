"""Rollouts and advantages to new weights: old log-probs, then clipped updates of one policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from bupo import ops
from bupo.config import GPU_WORKSPACE, Config
from bupo.finite import first_bad
from bupo.policy import parameter_layers
from bupo.rl.forward import Forward, MicroBatch, TokenStats, mini_batches
from bupo.rl.losses import gspo_loss, token_weights
from bupo.rl.optimizer import AdamW, clip_gradients, learning_rate
from bupo.types import Policy, Rollout


class Trainer:
    """The model, its optimizer, and the two passes of a step."""

    def __init__(self, model: nn.Module, config: Config, pad: int) -> None:
        self.model, self._config = model, config
        ops.set_workspace_bytes(GPU_WORKSPACE)
        self.forward = Forward(model, config, pad)
        self.changed: set[str] = set()
        """Names of the parameters that the last update has moved"""
        self.skipped: list[str] = []
        """Why: of each optimiser update of the last step that was skipped"""
        parameters, places = dict(model.named_parameters()), parameter_layers(model)
        self.optimizer = AdamW(parameters, places, config.optimizer, config.optimizer.lr)

    def token_stats(
        self, rollouts: Sequence[Rollout], policy: Policy, temperature: float | None = None
    ) -> TokenStats:
        """See Forward.token_stats."""
        return self.forward.token_stats(rollouts, policy, temperature)

    def update(
        self,
        rollouts: Sequence[Rollout],
        old_logprobs: Sequence[Tensor],
        policy: Policy,
        step: int,
        importance: Sequence[Tensor] | None = None,
    ) -> dict[str, float]:
        """Optimiser updates over mini-batches of whole prompt groups; metrics, token-weighted.

        old_logprobs are those of the same policy: the ratio of J_IPA (arXiv 2512.19673) is
        pi^l / pi^l_old, and an update ratio only. importance: a factor of each token's ratio loss,
        of the final policy. A KL term in the loss takes rollout.ref_logprobs. An update whose loss
        or gradient is not finite is skipped and counted.
        """
        lr = learning_rate(self._config, step, self._config.optimizer.lr)
        self.optimizer.set_rates(lr, policy.rates.factor)
        settings = self._config.optimizer
        parts = mini_batches(rollouts, settings.updates_per_step) * settings.epochs
        sums: dict[str, float] = {}
        tokens = 0
        largest_ratio = 0.0
        losses: list[float] = []
        norms: list[float] = []
        self.changed, self.skipped = set(), []
        for part, indices in enumerate(parts):
            weights = token_weights(
                [len(rollouts[i].token_ids) for i in indices],
                self._config.loss.aggregation,
                self._config.rollout.max_new_tokens,
            )
            weight_of = dict(zip(indices, weights))
            loss, bad = 0.0, None
            for batch in self.forward.batches(rollouts, indices, part, len(parts)):
                part_loss, values = self._backward(
                    batch, rollouts, old_logprobs, weight_of, policy, importance
                )
                loss += part_loss
                bad = bad or values.pop("bad", None)
                tokens += len(batch.targets)
                largest_ratio = max(largest_ratio, values["ratio_max"])
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value * len(batch.targets)
            norm = clip_gradients(self.model.parameters(), self._config.optimizer.grad_clip)
            if math.isfinite(loss) and math.isfinite(norm):
                self.optimizer.step()
                self.changed |= {
                    name for name, p in self.model.named_parameters() if p.grad is not None
                }
                losses.append(loss)
                norms.append(norm)
            else:
                bad = bad or self._bad_gradient() or f"loss {loss:g}, gradient norm {norm:g}"
                self.skipped.append(f"update {part + 1} of {len(parts)}: {bad}")
            self.optimizer.zero_grad(set_to_none=True)  # None, so weight decay leaves it alone
        names = ("clip_fraction", "ratio_mean", "approx_kl", "live_fraction")
        metrics = {f"policy/{name}": sums.get(name, 0.0) / max(tokens, 1) for name in names}
        return metrics | {
            "policy/loss": fmean(losses) if losses else math.nan,
            "policy/ratio_max": largest_ratio,
            "policy/grad_norm": fmean(norms) if norms else math.nan,
            "policy/skipped_updates": len(parts) - len(losses),
            "policy/lr": lr,
        }

    def _bad_gradient(self) -> str | None:
        parameters = self.model.named_parameters()
        return first_bad((f"gradient of {name}", p.grad) for name, p in parameters)

    def _bad_input(self, *tensors: tuple[str, Tensor | None]) -> str:
        """Where a loss that is not finite comes from: what goes into it, in order."""
        parameters = ((f"parameter {n}", p) for n, p in self.model.named_parameters())
        return first_bad((*parameters, *tensors)) or "loss"

    def _backward(
        self,
        batch: MicroBatch,
        rollouts: Sequence[Rollout],
        old_logprobs: Sequence[Tensor],
        weight_of: dict[int, float],
        policy: Policy,
        importance: Sequence[Tensor] | None,
    ) -> tuple[float, dict[str, Any]]:
        def gather(tensors: Sequence[Tensor | None]) -> Tensor:
            present = [x for x in tensors if x is not None]
            assert len(present) == len(batch.members)
            return torch.cat(present).to(self.forward.device)

        settings, members = self._config.loss, [rollouts[i] for i in batch.members]
        lengths = [len(r.token_ids) for r in members]
        in_loss = settings.kl_coef if settings.kl_estimator != "k1_reward" else 0.0
        old = gather([old_logprobs[i] for i in batch.members])
        advantages = gather([r.advantages for r in members])
        weights = gather([torch.full((n,), weight_of[i]) for i, n in zip(batch.members, lengths)])
        options: dict[str, Any] = {
            "clip_low": settings.clip_low,
            "clip_high": settings.clip_high,
            "dual_clip": settings.dual_clip,
            "max_log_ratio": settings.max_log_ratio,
            "ref_logprobs": gather([r.ref_logprobs for r in members]) if in_loss else None,
            "kl_coef": in_loss,
            "kl_estimator": settings.kl_estimator if in_loss else "k3",
            "entropy_coef": settings.entropy_coef,
            "importance_weights": (
                None if importance is None else gather([importance[i] for i in batch.members])
            ),
        }
        hidden, head = self.forward.hidden(batch, policy), self.forward.head()
        if settings.type == "gspo":
            out = ops.lm_head_logprobs(hidden, targets=batch.targets, **head)
            logprobs = out.logprobs
            loss, metrics = gspo_loss(out, lengths, old, advantages, weights, **options)
        else:
            options |= head | {"targets": batch.targets, "loss_type": settings.type}
            result = ops.policy_loss(
                hidden,
                old_logprobs=old,
                advantages=advantages,
                token_weights=weights,
                **options,
            )
            loss, metrics, logprobs = result.loss, result.metrics, result.logprobs
        value = float(loss.detach())
        values: dict[str, Any] = {name: float(x) for name, x in metrics.items()}
        if math.isfinite(value):
            loss.backward()
        else:
            values["bad"] = self._bad_input(
                ("hidden states", hidden),
                ("old log-probs", old),
                ("advantages", advantages),
                ("log-probs", logprobs),
            )
        return value, values
