"""Responses by transformers' generate, on the trainer's own model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopPLogitsWarper,
)

from bupo.config import RolloutConfig
from bupo.rl.rollouts.engine import Decoder, seed_of
from bupo.rl.types import Prompt, Rollout


class _Sampling(LogitsProcessor):
    """Applies the temperature, notes the log-prob of each sampled token (which shows in input_ids
    one call later), and keeps ids outside the tokenizer (padded embedding rows) and outside the
    nucleus from being sampled.

    generate() would apply its own temperature after this, so it is told 1."""

    def __init__(self, vocab: int, temperature: float, top_p: float) -> None:
        self._vocab, self._temperature = vocab, temperature or 1.0
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self._previous: Tensor | None = None
        self.logprobs: list[Tensor] = []

    def note(self, sampled: Tensor) -> None:
        if self._previous is not None:
            self.logprobs.append(self._previous.gather(-1, sampled[:, None]).squeeze(-1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids[:, -1])
        scores = scores.float() / self._temperature
        self._previous = scores.log_softmax(-1)  # of the policy itself, before any mask
        scores[:, self._vocab :] = -torch.inf
        return scores if self._nucleus is None else self._nucleus(input_ids, scores)


class HFEngine:
    """transformers' generate on the trainer's own model: always in sync, no second copy."""

    def __init__(self, model: Any, tokenizer: Any, config: RolloutConfig) -> None:
        self._model, self._config = model, config
        self._decoder = Decoder(tokenizer, model.generation_config.eos_token_id)
        pad, eos = tokenizer.pad_token_id, self._decoder.eos
        self._pad = pad if pad is not None else (eos[0] if eos else 0)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to do: the model is the trainer's."""

    def score(self, rollouts: Sequence[Rollout]) -> None:
        """Nothing to compare."""

    def close(self) -> None:
        """Nothing to do."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        stop: Callable[[], bool],
        temperature: float | None = None,
    ) -> list[Rollout]:
        temperature = self._config.temperature if temperature is None else temperature
        rollouts: list[Rollout] = []
        wanted = [(group, p) for group, p in enumerate(prompts) for _ in range(samples)]
        size = self._config.batch_size
        training, shipped = self._model.training, self._model.generation_config
        self._model.generation_config = GenerationConfig()
        self._model.eval()
        try:
            for start in range(0, len(wanted), size):
                if stop():
                    break
                batch = wanted[start : start + size]
                rollouts += self._batch(batch, seed_of(seed, start), temperature)
        finally:
            self._model.train(training)
            self._model.generation_config = shipped
        return rollouts

    @torch.no_grad()
    def _batch(
        self, wanted: Sequence[tuple[int, Prompt]], seed: int, temperature: float
    ) -> list[Rollout]:
        device = self._model.device
        width = max(len(p.token_ids) for _, p in wanted)
        ids = torch.full((len(wanted), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, (_, prompt) in enumerate(wanted):
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        sampling = _Sampling(self._decoder.vocab, temperature, self._config.top_p)
        settings = GenerationConfig(
            **(dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0) if temperature else {}),
            max_new_tokens=self._config.max_new_tokens,
            eos_token_id=self._decoder.eos or None,
            pad_token_id=self._pad,
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampling]),
            )
        sampling.note(out[:, -1])
        tokens = out[:, width:].tolist()
        logprobs = torch.stack(sampling.logprobs, dim=1).tolist()
        return [
            self._decoder.rollout(group, prompt, tokens[row], logprobs[row])
            for row, (group, prompt) in enumerate(wanted)
        ]
