"""Runs samples through a model: gives hidden states that predict counted tokens, and log-probs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bupo import adapters, ops, progress, ranks
from bupo.config import Config, RunError, first_line
from bupo.policy import hidden_states, internal_policy, unembedding
from bupo.rl import sharding
from bupo.samples import Batch, Sample, micro_batches
from bupo.terminal import say
from bupo.types import Policy

Result = TypeVar("Result")


@dataclass(frozen=True)
class TokenStats:
    """Log-probs and entropies of the counted tokens, one tensor per sample."""

    logprobs: list[Tensor]
    entropy: list[Tensor]

    def mean_entropy(self) -> float:
        """Returns the mean entropy over all tokens, in nats."""
        return float(torch.cat(self.entropy).mean())


class _CachedCast(torch.autograd.Function):
    """Uses an earlier cast of a parameter: forward and gradient are those of `.to()`."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


class Forward:
    """Runs samples through a model in micro-batches."""

    def __init__(self, model: nn.Module, config: Config, pad: int) -> None:
        self.model, self._config, self._pad = model, config, pad
        self.device = next(model.parameters()).device
        self._half = config.model.compute_dtype == "bfloat16"
        self._cast: tuple[Tensor, int, Tensor] | None = None
        self._tokens = config.optimizer.micro_batch_tokens
        self._shape = 0, 0
        """Number of sequences and of tokens in the newest micro-batch"""

    @property
    def can_widen(self) -> bool:
        """Whether in_float32() is possible: not if parameters in bfloat16 are divided among ranks,
        because FSDP gathers them from memory of its own."""
        return (
            not sharding.is_sharded(self.model) or self._config.model.parameter_dtype != "bfloat16"
        )

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Inside the context, the model computes in float32, regardless of model.compute_dtype."""
        assert self.can_widen
        half, self._half = self._half, False
        rounded = [p for p in self.model.parameters() if p.dtype == torch.bfloat16]
        for parameter in rounded:
            parameter.data = parameter.data.float()
        try:
            yield
        finally:
            self._half, self._cast = half, None
            for parameter in rounded:
                parameter.data = parameter.data.bfloat16()

    def token_stats(
        self, samples: Sequence[Sample], policy: Policy, temperature: float | None = None
    ) -> TokenStats:
        """Returns log-probs and entropies of the counted tokens under a policy, without gradient,
        at the sampling temperature unless another is given. Each rank computes its share."""

        def values(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
            hidden, head = self.hidden(batch, policy), self.head(temperature)
            out = ops.lm_head_logprobs(hidden, targets=batch.targets, **head)
            return batch.split(out.logprobs.cpu()), batch.split(out.entropy.cpu())

        return TokenStats(*self.per_sample(samples, values, 2))

    def per_sample(
        self,
        samples: Sequence[Sample],
        values: Callable[[Batch], Sequence[list[Tensor]]],
        kinds: int,
    ) -> list[list[Tensor]]:
        """Returns tensors for each sample, of so many kinds, which values(batch) computes without
        gradient for the members of a batch."""
        found: dict[int, tuple[Tensor, ...]] = {}

        @torch.no_grad()
        def run() -> None:
            for batch in self.batches(samples):
                found.update(zip(batch.members, zip(*values(batch))))

        self.in_memory(run)
        sharding.reshard(self.model)
        if ranks.world() > 1:  # a view would be sent with the values of the whole batch
            found = {n: tuple(x.clone() for x in some) for n, some in found.items()}
        for part in ranks.gathered(found):
            found |= part
        return [[found[n][kind] for n in range(len(samples))] for kind in range(kinds)]

    def in_memory(self, run: Callable[[], Result]) -> Result:
        """Returns run(), a pass over batches(). If that runs out of memory, runs it again, and all
        later passes, with micro-batches of half as many tokens. Raises RunError if the micro-batch
        was a single sequence."""
        while True:
            try:
                return run()
            except torch.OutOfMemoryError as error:
                reason = first_line(error)
            sequences, tokens = self._shape
            if ranks.world() > 1:  # the others are in the middle of the pass
                raise RunError(
                    f"out of memory with {tokens} tokens in a micro-batch ({reason}); lower "
                    f"optimizer.micro_batch_tokens to {tokens // 2} or less and resume the run"
                )
            if sequences <= 1:
                raise RunError(
                    f"out of memory with one sequence in a micro-batch ({reason}); the plan lists "
                    "what takes memory, and docs/memory.md says how to reduce it"
                )
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._tokens = tokens // 2
            say(
                f"out of memory with {tokens} tokens in a micro-batch; from now on it has at most "
                f"{self._tokens}; set optimizer.micro_batch_tokens={self._tokens} to avoid this "
                "next time"
            )

    def batches(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        """Yields the micro-batches of one pass over the samples, and reports the progress."""
        done = 0
        if sharding.is_sharded(self.model):
            self._cast = None  # gathering the head anew does not count as a change
        rank, world = ranks.rank(), ranks.world()
        for batch in micro_batches(
            samples, self._tokens, self.device, pad=self._pad, rank=rank, world=world
        ):
            self._shape = len(batch.members), batch.input_ids.numel()
            yield batch
            done += len(batch.members) * world
            progress.report(min(done / len(samples), 1))

    def hidden(self, batch: Batch, policy: Policy) -> Tensor:
        """Returns the hidden states [T, D] from which the policy predicts the counted tokens. The
        hidden states of other tokens are discarded here."""
        with self._autocast(), internal_policy(self.model, policy.layer, policy.final_norm):
            hidden = hidden_states(self.model, batch.input_ids, batch.attention_mask)
        hidden = batch.pick(hidden)
        return hidden.to(torch.bfloat16) if self._half else hidden

    def _autocast(self) -> AbstractContextManager[object]:
        if not self._half:
            return nullcontext()
        # The cache would hold a copy of all layers, of which a rank has only its rows.
        whole = not sharding.is_sharded(self.model)
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=whole)

    def head(self, temperature: float | None = None) -> dict[str, Any]:
        """Returns the arguments of the LM-head ops that describe the head, at the sampling
        temperature unless another is given."""
        head = unembedding(self.model)
        if temperature is None:
            temperature = self._config.rollout.temperature
        return {
            "weight": self._in_half(head.weight) if self._half else head.weight,
            "bias": head.bias,
            "softcap": head.softcap,
            "temperature": head.temperature * temperature,
        }

    def _in_half(self, weight: Tensor) -> Tensor:
        """Returns the head in bfloat16, cast once after each change and not in each micro-batch."""
        cached = self._cast
        if cached is None or cached[0] is not weight or cached[1] != weight._version:
            cached = weight, weight._version, weight.detach().to(torch.bfloat16)
            self._cast = cached
        cast: Tensor = _CachedCast.apply(weight, cached[2])  # type: ignore[no-untyped-call]
        return cast


class WithoutAdapters:
    """The policy of a model without its adapters, which is the one that training began with."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def token_stats(self, samples: Sequence[Sample], policy: Policy) -> TokenStats:
        """Does the same as Forward.token_stats."""
        with adapters.left_out(self._forward.model):
            return self._forward.token_stats(samples, policy)
