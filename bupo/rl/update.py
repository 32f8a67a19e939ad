"""Rollouts and advantages to new weights: old log-probs, then clipped updates of one policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from bupo import ops
from bupo.config import Config
from bupo.policy import hidden_states, internal_policy, unembedding
from bupo.rl.finite import first_bad
from bupo.rl.types import Policy, Rollout


@dataclass
class TokenStats:
    """Per-token log-probs and entropies, one tensor a rollout."""

    logprobs: list[Tensor]
    entropy: list[Tensor]

    def mean_entropy(self) -> float:
        return float(torch.cat(self.entropy).mean())


@dataclass
class _MicroBatch:
    """Some rollouts, padded on the right, with the place of every response token."""

    members: list[int]
    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    rows: Tensor  # [T]: the sequence ...
    columns: Tensor  # [T]: ... and the position that predicts each response token
    targets: Tensor  # [T]

    def split(self, tokens: Tensor, rollouts: Sequence[Rollout]) -> list[Tensor]:
        return list(tokens.split([len(rollouts[i].token_ids) for i in self.members]))


def _micro_batches(
    rollouts: Sequence[Rollout], indices: Sequence[int], budget: int, pad: int, device: Any
) -> list[_MicroBatch]:
    """The indexed rollouts, those of similar length together, at most `budget` padded tokens (or
    one rollout) each."""
    length = {i: len(rollouts[i].prompt.token_ids) + len(rollouts[i].token_ids) for i in indices}
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (length[i], i)):  # so the newest is the longest
        if batches and (len(batches[-1]) + 1) * length[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    result = []
    for members in batches:
        width = max(length[i] for i in members)
        ids = torch.full((len(members), width), pad)
        mask = torch.zeros_like(ids)
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        for row, i in enumerate(members):
            prompt, response = rollouts[i].prompt.token_ids, rollouts[i].token_ids
            ids[row, : length[i]] = torch.tensor([*prompt, *response])
            mask[row, : length[i]] = 1
            rows += [row] * len(response)
            columns += range(len(prompt) - 1, length[i] - 1)
            targets += response
        places = (torch.tensor(x, dtype=torch.long) for x in (rows, columns, targets))
        tensors = (ids, mask, *places)
        result.append(_MicroBatch(members, *(t.to(device) for t in tensors)))
    return result


def token_weights(
    lengths: Sequence[int], aggregation: str, longest: int | None = None
) -> list[float]:
    """The weight of each token of each response, from the counts of the whole optimiser step, so
    that no split into micro-batches changes the loss.

    token_mean 1 / sum of lengths; seq_mean 1 / (N length_i), the paper's; seq_sum 1 / N;
    seq_sum_longest 1 / (N longest), Dr.GRPO's.
    """
    n, total = len(lengths), max(sum(lengths), 1)
    if aggregation == "token_mean":
        return [1 / total] * n
    if aggregation == "seq_mean":
        return [1 / (n * max(length, 1)) for length in lengths]
    if aggregation == "seq_sum_longest":
        assert longest is not None
        return [1 / (n * longest)] * n
    return [1 / n] * n


def importance_weights(
    rollouts: Sequence[Rollout], final_logprobs: Sequence[Tensor], cap: float
) -> list[Tensor]:
    """min(pi / pi_engine, cap) of each token. pi is the final policy in both phases: the engine
    never samples from another, and with pi^l the weight would be the whole distance of pi^l."""
    pairs = zip(final_logprobs, rollouts)
    return [(x - torch.tensor(r.logprobs)).exp().clamp(max=cap) for x, r in pairs]


class Trainer:
    """The model, its optimizer, and the two passes of a step."""

    def __init__(self, model: nn.Module, config: Config, pad: int) -> None:
        self.model, self._config, self._pad = model, config, pad
        self._device = next(model.parameters()).device
        self.changed: set[str] = set()
        """Names of the parameters that the last update has moved"""
        self.skipped: list[str] = []
        """Why: of each optimiser update of the last step that was skipped"""
        self.share: Callable[[float], object] = lambda share: None
        """Called with the share of a pass that is done"""
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    def token_stats(
        self, rollouts: Sequence[Rollout], policy: Policy, temperature: float | None = None
    ) -> TokenStats:
        """Log-probs and entropies of the response tokens under a policy, without gradient, at the
        sampling temperature unless another is given."""
        stats = TokenStats([torch.empty(0)] * len(rollouts), [torch.empty(0)] * len(rollouts))
        with torch.no_grad():
            for batch in self._batches(rollouts, range(len(rollouts))):
                hidden, head = self._hidden(batch, policy, temperature)
                out = ops.lm_head_logprobs(hidden, head.pop("weight"), batch.targets, **head)
                for name in ("logprobs", "entropy"):
                    parts = batch.split(getattr(out, name).cpu(), rollouts)
                    for i, part in zip(batch.members, parts):
                        getattr(stats, name)[i] = part
        return stats

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
        of the final policy. An update whose loss or gradient is not finite
        is skipped and counted.
        """
        lr = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        groups = sorted({r.group for r in rollouts})
        parts = min(self._config.optimizer.updates_per_step, len(groups))
        sums: dict[str, float] = {}
        tokens = 0
        largest_ratio = 0.0
        losses: list[float] = []
        norms: list[float] = []
        self.changed, self.skipped = set(), []
        for part in range(parts):
            chosen = set(groups[part::parts])
            indices = [i for i, r in enumerate(rollouts) if r.group in chosen]
            weights = token_weights(
                [len(rollouts[i].token_ids) for i in indices],
                self._config.loss.aggregation,
                self._config.rollout.max_new_tokens,
            )
            weight_of = dict(zip(indices, weights))
            loss, bad = 0.0, None
            for batch in self._batches(rollouts, indices, part, parts):
                part_loss, values = self._backward(
                    batch, rollouts, old_logprobs, weight_of, policy, importance
                )
                loss += part_loss
                bad = bad or values.pop("bad", None)
                tokens += len(batch.targets)
                largest_ratio = max(largest_ratio, values["ratio_max"])
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value * len(batch.targets)
            norm = self._gradient_norm()
            if math.isfinite(loss) and math.isfinite(norm):
                self.optimizer.step()
                self.changed |= {
                    name for name, p in self.model.named_parameters() if p.grad is not None
                }
                losses.append(loss)
                norms.append(norm)
            else:
                bad = bad or self._bad_gradient() or f"loss {loss:g}, gradient norm {norm:g}"
                self.skipped.append(f"update {part + 1} of {parts}: {bad}")
            self.optimizer.zero_grad(set_to_none=True)  # None, so weight decay leaves it alone
        names = ("clip_fraction", "ratio_mean", "approx_kl", "live_fraction")
        metrics = {f"policy/{name}": sums.get(name, 0.0) / max(tokens, 1) for name in names}
        return metrics | {
            "policy/loss": fmean(losses) if losses else math.nan,
            "policy/ratio_max": largest_ratio,
            "policy/grad_norm": fmean(norms) if norms else math.nan,
            "policy/skipped_updates": parts - len(losses),
            "policy/lr": lr,
        }

    def _gradient_norm(self) -> float:
        """Before clipping, which a norm that is not finite would spread to every gradient."""
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if math.isfinite(float(norm)):
            limit = self._config.optimizer.grad_clip
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)

    def _bad_gradient(self) -> str | None:
        parameters = self.model.named_parameters()
        return first_bad((f"gradient of {name}", p.grad) for name, p in parameters)

    def _bad_input(self, members: Sequence[Rollout], *tensors: tuple[str, Tensor | None]) -> str:
        """Where a loss that is not finite comes from: what goes into it, in order."""
        rewards = torch.tensor([r.reward for r in members])
        parameters = ((f"parameter {n}", p) for n, p in self.model.named_parameters())
        return first_bad((("reward", rewards), *parameters, *tensors)) or "loss"

    def _learning_rate(self, step: int) -> float:
        """Of step 1, 2, ...; a function of the step alone, so a resumed run has the same."""
        settings, steps = self._config.optimizer, self._config.steps
        if step <= settings.warmup_steps:
            return settings.lr * step / settings.warmup_steps
        if settings.schedule == "constant":
            return settings.lr
        return settings.lr * (steps - step + 1) / (steps - settings.warmup_steps)

    def _batches(
        self, rollouts: Sequence[Rollout], indices: Sequence[int], part: int = 0, parts: int = 1
    ) -> Iterator[_MicroBatch]:
        budget = self._config.optimizer.micro_batch_tokens
        batches = _micro_batches(rollouts, indices, budget, self._pad, self._device)
        for n, batch in enumerate(batches, start=1):
            yield batch
            self.share((part + n / len(batches)) / parts)

    def _hidden(
        self, batch: _MicroBatch, policy: Policy, temperature: float | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states of the policy where response tokens are predicted [T, D], and the head's
        arguments. Prompt tokens go no further than this."""
        half = self._config.model.compute_dtype == "bfloat16"
        autocast = torch.autocast(self._device.type, torch.bfloat16) if half else nullcontext()
        with autocast, internal_policy(self.model, policy.layer, policy.final_norm):
            hidden = hidden_states(self.model, batch.input_ids, batch.attention_mask)
        head = unembedding(self.model)
        weight = head.weight.to(torch.bfloat16) if half else head.weight
        return hidden[batch.rows, batch.columns].to(weight.dtype), {
            "weight": weight,
            "bias": head.bias,
            "softcap": head.softcap,
            "temperature": head.temperature
            * (self._config.rollout.temperature if temperature is None else temperature),
        }

    def _backward(
        self,
        batch: _MicroBatch,
        rollouts: Sequence[Rollout],
        old_logprobs: Sequence[Tensor],
        weight_of: dict[int, float],
        policy: Policy,
        importance: Sequence[Tensor] | None,
    ) -> tuple[float, dict[str, Any]]:
        def gather(tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors).to(self._device)

        members = [rollouts[i] for i in batch.members]
        assert all(r.advantages is not None for r in members)
        settings = self._config.loss
        hidden, head = self._hidden(batch, policy)
        result = ops.policy_loss(
            hidden,
            head.pop("weight"),
            batch.targets,
            gather([old_logprobs[i] for i in batch.members]),
            gather([r.advantages for r in members if r.advantages is not None]),
            gather(
                [torch.full((len(rollouts[i].token_ids),), weight_of[i]) for i in batch.members]
            ),
            **head,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            loss_type=settings.type,
            entropy_coef=settings.entropy_coef,
            importance_weights=(
                None if importance is None else gather([importance[i] for i in batch.members])
            ),
        )
        loss = float(result.loss.detach())
        values: dict[str, Any] = {name: float(value) for name, value in result.metrics.items()}
        if math.isfinite(loss):
            result.loss.backward()
        else:
            values["bad"] = self._bad_input(
                members,
                ("hidden states", hidden),
                ("old log-probs", gather([old_logprobs[i] for i in batch.members])),
                ("advantages", gather([r.advantages for r in members if r.advantages is not None])),
                ("log-probs", result.logprobs),
            )
        return loss, values
