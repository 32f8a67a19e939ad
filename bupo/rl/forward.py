"""Rollouts through a model: micro-batches, hidden states where response tokens are predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bupo import ops
from bupo.config import Config
from bupo.policy import hidden_states, internal_policy, unembedding
from bupo.types import Policy, Rollout


@dataclass
class TokenStats:
    """Per-token log-probs and entropies, one tensor a rollout."""

    logprobs: list[Tensor]
    entropy: list[Tensor]

    def mean_entropy(self) -> float:
        return float(torch.cat(self.entropy).mean())


@dataclass
class MicroBatch:
    """Some rollouts, padded on the right, with the place of every response token."""

    members: list[int]
    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    rows: Tensor  # [T]: the sequence ...
    columns: Tensor  # [T]: ... and the position that predicts each response token
    targets: Tensor  # [T]

    def split(self, tokens: Tensor, rollouts: Sequence[Rollout]) -> list[Tensor]:
        return list(tokens.split([len(rollouts[i].token_ids) for i in self.members]))


def micro_batches(
    rollouts: Sequence[Rollout], indices: Sequence[int], budget: int, pad: int, device: Any
) -> list[MicroBatch]:
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
        result.append(MicroBatch(members, *(t.to(device) for t in tensors)))
    return result


def mini_batches(rollouts: Sequence[Rollout], parts: int) -> list[list[int]]:
    """The indices of whole prompt groups, dealt out to so many optimiser updates (at most one a
    group), without dropped responses."""
    groups = sorted({r.group for r in rollouts})
    parts = min(parts, len(groups))
    dealt = [set(groups[part::parts]) for part in range(parts)]
    return [
        [i for i, r in enumerate(rollouts) if r.group in chosen and not r.dropped]
        for chosen in dealt
    ]


class Forward:
    """A model and how it is run over rollouts."""

    def __init__(self, model: nn.Module, config: Config, pad: int) -> None:
        self.model, self._config, self._pad = model, config, pad
        self.device = next(model.parameters()).device
        self._half = config.model.compute_dtype == "bfloat16"
        self.share: Callable[[float], object] = lambda share: None
        """Called with the share of a pass that is done"""

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Inside, the model computes in float32, whatever model.compute_dtype says."""
        half, self._half = self._half, False
        try:
            yield
        finally:
            self._half = half

    def token_stats(
        self, rollouts: Sequence[Rollout], policy: Policy, temperature: float | None = None
    ) -> TokenStats:
        """Log-probs and entropies of the response tokens under a policy, without gradient, at the
        sampling temperature unless another is given."""
        stats = TokenStats([torch.empty(0)] * len(rollouts), [torch.empty(0)] * len(rollouts))
        with torch.no_grad():
            for batch in self.batches(rollouts, range(len(rollouts))):
                hidden, head = self.hidden(batch, policy), self.head(temperature)
                out = ops.lm_head_logprobs(hidden, targets=batch.targets, **head)
                for name in ("logprobs", "entropy"):
                    parts = batch.split(getattr(out, name).cpu(), rollouts)
                    for i, part in zip(batch.members, parts):
                        getattr(stats, name)[i] = part
        return stats

    def batches(
        self, rollouts: Sequence[Rollout], indices: Sequence[int], part: int = 0, parts: int = 1
    ) -> Iterator[MicroBatch]:
        """Micro-batches of one of so many parts of a pass; share() hears how far it is."""
        budget = self._config.optimizer.micro_batch_tokens
        batches = micro_batches(rollouts, indices, budget, self._pad, self.device)
        for n, batch in enumerate(batches, start=1):
            yield batch
            self.share((part + n / len(batches)) / parts)

    def hidden(self, batch: MicroBatch, policy: Policy) -> Tensor:
        """Hidden states of the policy where response tokens are predicted [T, D]. Prompt tokens go
        no further than this."""
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self._half else nullcontext()
        with autocast, internal_policy(self.model, policy.layer, policy.final_norm):
            hidden = hidden_states(self.model, batch.input_ids, batch.attention_mask)
        hidden = hidden[batch.rows, batch.columns]
        return hidden.to(torch.bfloat16) if self._half else hidden

    def head(self, temperature: float | None = None) -> dict[str, Any]:
        """The arguments of the LM-head ops beside hidden states and tokens, at the sampling
        temperature unless another is given."""
        head = unembedding(self.model)
        if temperature is None:
            temperature = self._config.rollout.temperature
        return {
            "weight": head.weight.to(torch.bfloat16) if self._half else head.weight,
            "bias": head.bias,
            "softcap": head.softcap,
            "temperature": head.temperature * temperature,
        }
