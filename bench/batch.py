"""Inputs of the benchmarks: a head, hidden states and per-token numbers with realistic logits."""

import dataclasses

import torch
from torch import Tensor

import bupo.ops as ops

SEQUENCE = 256


@dataclasses.dataclass
class Batch:
    """Inputs with realistic logits: standard deviation 4, two thirds of the targets confident."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    token_weights: Tensor

    @staticmethod
    def make(
        tokens: int, width: int, vocab: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> "Batch":
        g = torch.Generator(device).manual_seed(seed)
        on = {"generator": g, "device": device}
        weight = torch.randn(vocab, width, **on) * (4 / width**0.5)
        targets = torch.randint(vocab, (tokens,), **on)
        hidden = torch.randn(tokens, width, **on)
        planted = torch.rand(tokens, 1, **on) < 2 / 3
        hidden += planted * weight[targets] * (20 / 16)  # target logit near 20, the highest by far
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        logprobs = ops.lm_head_logprobs(hidden, weight, targets).logprobs
        advantages = torch.randn(tokens, **on)
        return Batch(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            logprobs + 0.05 * torch.randn(tokens, **on),
            advantages + advantages.sign() * 0.1,  # none is 0
            torch.full((tokens,), 1 / tokens, device=device),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, D, V"""
        return len(self.hidden), self.hidden.shape[1], len(self.weight)

    def first(self, tokens: int) -> "Batch":
        """The first rows, with gradients of their own."""
        rows = {k: x if k == "weight" else x[:tokens] for k, x in self.policy().items()}
        copies = {k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in rows.items()}
        return Batch(**copies)

    def of_double(self) -> "Batch":
        """The same numbers in float64, with gradients of their own."""
        return Batch(
            **{
                k: x.detach().double().requires_grad_(x.requires_grad)
                if x.is_floating_point()
                else x
                for k, x in self.policy().items()
            }
        )

    def live(self, share: float) -> "Batch":
        """The same with advantage 0, and so no gradient, for all tokens but one of 1 / share."""
        live = torch.arange(len(self.targets), device=self.targets.device) % round(1 / share) == 0
        return dataclasses.replace(self, advantages=self.advantages * live)

    def sequence_ids(self) -> Tensor:
        """Which sequence each token is of, if all have SEQUENCE tokens."""
        return torch.arange(len(self.targets), device=self.targets.device) // SEQUENCE

    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of lm_head_logprobs."""
        return self.hidden, self.weight, self.targets

    def policy(self) -> dict[str, Tensor]:
        """The arguments of policy_loss."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None
