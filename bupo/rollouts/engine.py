"""What an engine is, and what all of them share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from bupo.types import Prompt, Rollout


class RolloutEngine(Protocol):
    """What the loop needs of an engine. Token ids in, token ids out."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        stop: Callable[[], bool],
        temperature: float | None = None,
    ) -> list[Rollout]:
        """`samples` responses for every prompt from the final policy, grouped by prompt.

        temperature: another one than rollout.temperature; at 0 the likeliest token is taken, and
        log-probs are those at 1. The result is a function of weights, prompts and seed. Returns
        early, with what is there, when stop() becomes true, which is asked before every batch.
        """
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over weights by their names in the Hugging Face model."""
        ...

    def score(self, rollouts: Sequence[Rollout]) -> list[Tensor] | None:
        """Log-probs of each response's tokens at temperature 1, by the weights that the engine
        holds; None for an engine that has none of its own."""
        ...

    def close(self) -> None:
        """Gives memory and processes back."""
        ...


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values; nearby values give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Decoder:
    """Sampled ids to a rollout."""

    def __init__(self, tokenizer: Any, eos: int | list[int] | None) -> None:
        """eos: the model's end-of-sequence ids; the tokenizer's if it has none."""
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos = [eos] if isinstance(eos, int) else list(eos or [])
        self.vocab = len(tokenizer)
        """Ids from here on are padding rows of the head: they must never be sampled"""

    def rollout(
        self, group: int, prompt: Prompt, tokens: list[int], logprobs: list[float]
    ) -> Rollout:
        # Cut after the first end of sequence: what follows is padding, even where pad == eos.
        end = next((i + 1 for i, t in enumerate(tokens) if t in self.eos), None)
        finish = "length" if end is None else "stop"
        end = len(tokens) if end is None else end
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Rollout(prompt, group, tokens[:end], logprobs[:end], finish, text)
