"""The parts that the engines share: seeds, and the conversion of sampled ids to rollouts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from bupo.types import Prompt, Rollout


def seed_of(*parts: object) -> int:
    """Returns a 63-bit seed made from any values; nearby values give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numbered(
    prompts: Sequence[Prompt], groups: Sequence[int] | None
) -> Iterator[tuple[int, Prompt]]:
    """Yields the number of each prompt's group, and the prompt."""
    return zip(range(len(prompts)) if groups is None else groups, prompts)


class Decoder:
    """Turns sampled ids into a rollout."""

    def __init__(self, tokenizer: Any, eos: int | list[int] | None) -> None:
        """eos: the model's end-of-sequence ids, or None to use the tokenizer's."""
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos = [eos] if isinstance(eos, int) else list(eos or [])
        self.vocab = len(tokenizer)
        """Ids from this number on are padding rows of the head, which must never be sampled"""

    def rollout(
        self, group: int, prompt: Prompt, tokens: list[int], logprobs: list[float]
    ) -> Rollout:
        # Cut after the first end of sequence. The rest is padding, even if pad == eos.
        end = next((i + 1 for i, t in enumerate(tokens) if t in self.eos), None)
        finish = "length" if end is None else "stop"
        end = len(tokens) if end is None else end
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Rollout.from_response(prompt, group, tokens[:end], logprobs[:end], finish, text)
