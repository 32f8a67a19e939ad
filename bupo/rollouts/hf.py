"""The engine that generates responses with transformers, on the trainer's own model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from bupo import progress
from bupo.config import RolloutConfig, RunError
from bupo.policy import half_precision
from bupo.rollouts.decoding import Sampler, decode, rows_can_move
from bupo.rollouts.engine import Decoder, numbered, seed_of
from bupo.samples import Sample
from bupo.types import Prompt, Rollout

Wanted = tuple[int, int, Prompt]
"""A response to generate: group, number in the group, prompt"""


class HFEngine:
    """Generates with transformers on the trainer's own model, so the weights are always in sync and
    there is no second copy.

    Responses are generated in batches of similar prompt length. Each has its own random numbers, so
    the other responses of a batch only affect its rounding.
    """

    samples_from_nucleus = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: RolloutConfig,
        compute_dtype: str = "float32",
        gathered: Callable[[Any], AbstractContextManager[None]] = lambda model: nullcontext(),
    ) -> None:
        """compute_dtype: that of training (model.compute_dtype), so that the policy that samples is
        the one that is trained. gathered(model): inside, a model that is divided among ranks is
        whole, so that each rank may call it as often as it likes."""
        self._gathered = gathered
        self._half = compute_dtype == "bfloat16"
        self._model, self._config = model, config
        self._decoder = Decoder(tokenizer, model.generation_config.eos_token_id)
        pad, eos = tokenizer.pad_token_id, self._decoder.eos
        self._pad = pad if pad is not None else (eos[0] if eos else 0)
        self._movable: bool | None = None
        """Whether rows can move within a batch; None before the first batch"""

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Does nothing, since the model is the trainer's."""

    def score(self, samples: Sequence[Sample]) -> None:
        """Does nothing, since there is no second model to compare."""

    def close(self) -> None:
        """Does nothing, since the engine holds no resources."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        stop: Callable[[], bool],
        temperature: float | None = None,
        groups: Sequence[int] | None = None,
    ) -> list[Rollout]:
        temperature = self._config.temperature if temperature is None else temperature
        wanted = [(group, k, p) for group, p in numbered(prompts, groups) for k in range(samples)]
        wanted.sort(key=lambda w: len(w[2].token_ids))  # stable: a group stays together
        training, shipped = self._model.training, self._model.generation_config
        self._model.generation_config = GenerationConfig()
        self._model.eval()
        try:
            with self._gathered(self._model):
                made = self._batches(wanted, seed, stop, temperature)
        finally:
            self._model.train(training)
            self._model.generation_config = shipped
        return [made[place] for place in sorted(made)]

    def _batches(
        self, wanted: Sequence[Wanted], seed: str, stop: Callable[[], bool], temperature: float
    ) -> dict[tuple[int, int], Rollout]:
        """Returns the responses by group and number, or those that were made before stop()."""
        made: dict[tuple[int, int], Rollout] = {}
        size = self._config.batch_size
        for start in range(0, len(wanted), size):
            if stop():
                break
            batch = wanted[start : start + size]
            with progress.part(start / len(wanted), (start + len(batch)) / len(wanted)):
                rollouts = self._batch(batch, seed, temperature)
            made |= {(group, k): r for (group, k, _), r in zip(batch, rollouts)}
        return made

    @torch.no_grad()
    def _batch(self, wanted: Sequence[Wanted], seed: str, temperature: float) -> list[Rollout]:
        movable, device = self._rows_can_move(), self._model.device
        first = {w[0]: w[2] for w in wanted}  # each prompt is read once and copied
        prompts = list(first.values()) if movable else [prompt for _, _, prompt in wanted]
        numbers = {group: n for n, group in enumerate(first)}
        copies = torch.tensor([numbers[group] for group, _, _ in wanted], device=device)
        ids, mask = self._padded(prompts)
        loop = partial(
            decode,
            copies=copies if movable else None,
            uniforms=self._uniforms(wanted, seed).to(device),
            sampler=Sampler(self._decoder.vocab, temperature, self._config.top_p),
            ends=self._decoder.eos,
        )
        settings = GenerationConfig(
            max_new_tokens=self._config.max_new_tokens, pad_token_id=self._pad
        )
        with half_precision(self._model) if self._half else nullcontext():
            out = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                custom_generate=loop,
            )
        if not out[1].isfinite().all():
            raise RunError("the model's log-probs are not finite, so it cannot be sampled from")
        tokens, logprobs = (x.tolist() for x in out)
        return [
            self._decoder.rollout(group, prompt, tokens[row], logprobs[row])
            for row, (group, _, prompt) in enumerate(wanted)
        ]

    def _padded(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Returns ids and attention mask, padded on the left."""
        width = max(len(p.token_ids) for p in prompts)
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        return ids, mask

    def _uniforms(self, wanted: Sequence[Wanted], seed: str) -> Tensor:
        """Returns a random number for each possible token, from the seed of its response."""
        generator, size = torch.Generator(), self._config.max_new_tokens
        rows = []
        for group, k, _ in wanted:
            generator.manual_seed(seed_of(seed, group, k))
            rows.append(torch.rand(size, generator=generator, dtype=torch.float64))
        return torch.stack(rows)

    def _rows_can_move(self) -> bool:
        if self._movable is None:
            why = rows_can_move(self._model)
            self._movable = not why
            if why:
                warnings.warn(
                    f"generation with {type(self._model).__name__} is slower than it could be: "
                    f"finished rows stay in the batch ({why})",
                    stacklevel=2,
                )
        return self._movable
