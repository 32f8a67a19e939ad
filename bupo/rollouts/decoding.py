"""A decoding loop for transformers' generate, which takes it as its `custom_generate`.

It differs from the built-in loop in three ways: a prompt is read once for all of its responses;
rows that have ended leave the batch; each response has its own random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, TopPLogitsWarper

from bupo import progress

BLOCK = 256
"""Number of probabilities per block: `draw` does two short searches instead of one long sum"""
FULL = 0.75
"""Ended rows are removed when at most this share of the rows is alive"""
PAUSE = {"cpu": 1}
"""Steps between checks for ended rows by device; OFTEN for others, as a check waits for the GPU"""
OFTEN = 8


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws an index for each row, [B], with probability proportional to its weight, by inversion.

    weights [B, V] >= 0, with a positive sum; uniforms [B], float64 in [0, 1). The index is the
    first one whose cumulative weight exceeds uniform * sum, so its own weight is above 0.
    """
    rows, size = weights.shape
    whole = size // BLOCK
    blocks = weights[:, : whole * BLOCK].view(rows, whole, BLOCK).sum(-1)
    blocks = torch.cat([blocks, weights[:, whole * BLOCK :].sum(-1, keepdim=True)], dim=1)
    bounds = blocks.double().cumsum(1)
    target = uniforms[:, None] * bounds[:, -1:]
    block = torch.searchsorted(bounds, target, right=True).clamp_(max=whole)  # nan is past the end
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    beyond = columns >= size
    columns.clamp_(max=size - 1)
    inner = weights.gather(1, columns).masked_fill(beyond, 0).double().cumsum(1)
    # The sum of a block, added in another order, may be slightly less than what is left.
    left = target - pad(bounds, (1, 0)).gather(1, block)
    left = torch.minimum(left, torch.nextafter(inner[:, -1:], inner.new_zeros(())))
    place = torch.searchsorted(inner, left, right=True).clamp_(max=BLOCK - 1)
    return columns.gather(1, place)[:, 0]


class Sampler:
    """Samples tokens from logits, and gives their log-probs under the policy itself, that is at its
    temperature before any mask. No token is outside the tokenizer (a padded row of the head) or
    outside the nucleus."""

    def __init__(self, vocab: int, temperature: float, top_p: float) -> None:
        """Temperature 0 takes the likeliest token and gives log-probs at temperature 1."""
        self._vocab, self._temperature = vocab, temperature
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.float()
        if self._temperature not in (0, 1):
            scores = scores / self._temperature
        allowed, padded = scores[:, : self._vocab], scores[:, self._vocab :]
        top, likeliest = allowed.max(-1, keepdim=True)
        weights = (allowed - top).exp_()
        normaliser = top[:, 0] + weights.sum(-1).log()
        if padded.shape[1]:
            normaliser = normaliser.logaddexp(padded.logsumexp(-1))
        if not self._temperature:
            tokens = likeliest[:, 0]
        else:
            if self._nucleus is not None:
                outside = self._nucleus(None, allowed) == -torch.inf
                weights.masked_fill_(outside, 0)
            tokens = draw(weights, uniforms)
        return tokens, scores.gather(1, tokens[:, None])[:, 0] - normaliser


class Sequences:
    """The rows that generate() works on, with their ids and the model's state."""

    def __init__(self, model: Any, ids: Tensor, state: dict[str, Any]) -> None:
        self._model, self._ids, self._state = model, ids, state
        self._begun = False

    def logits(self) -> Tensor:
        """Runs one forward and returns the logits [B, V] of the next token."""
        inputs = self._model.prepare_inputs_for_generation(
            self._ids,
            next_sequence_length=1 if self._begun and self._state.get("use_cache") else None,
            is_first_iteration=not self._begun,
            **self._state,
        )
        outputs = self._model(**inputs, return_dict=True)
        self._state = self._model._update_model_kwargs_for_generation(outputs, self._state)
        self._begun = True
        # Without this copy, the logits of the whole prompt, which some models return, stay alive.
        logits: Tensor = outputs.logits[:, -1].clone()
        return logits

    def append(self, tokens: Tensor) -> None:
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)

    def take(self, rows: Tensor) -> None:
        """Continues with these rows in this order; a row may occur several times or not at all.
        Only for models for which `rows_can_move` returns an empty text."""
        self._ids = self._ids[rows]
        for name, value in self._state.items():
            if isinstance(value, Cache):
                layers: Any = value
                layers.reorder_cache(rows)  # the only selection that every kind of layer has
            elif isinstance(value, Tensor):  # mask, positions: [B, T], in some models [3, B, T]
                self._state[name] = value.index_select(-2, rows)


def decode(
    model: Any,
    input_ids: Tensor,
    *,
    copies: Tensor | None,
    uniforms: Tensor,
    sampler: Sampler,
    ends: Sequence[int],
    **state: Any,
) -> tuple[Tensor, Tensor]:
    """Returns tokens and log-probs [B, limit] of B responses; the values after an end of sequence
    are arbitrary. Pass it to generate() with the keywords up to `ends` bound.

    input_ids: the padded prompts. copies [B]: the index of each response's prompt, for models whose
    rows can move (see `rows_can_move`); with None, response b answers prompt b and no row leaves.
    uniforms: [B, limit]. Do not use it for a sharded model: its ranks end at different steps and
    would wait for each other.
    """
    count, limit = uniforms.shape
    sequences = Sequences(model, input_ids, _of_the_model(state))
    eos = torch.tensor(ends, device=input_ids.device)
    rows = torch.arange(count, device=input_ids.device)  # response of each sequence
    alive = torch.ones_like(rows, dtype=torch.bool)
    tokens = input_ids.new_zeros(count, limit)
    logprobs = torch.zeros(count, limit, device=input_ids.device)
    pause = PAUSE.get(input_ids.device.type, OFTEN)
    for step in range(limit):
        logits = sequences.logits()
        if step == 0 and copies is not None:
            sequences.take(copies)
            logits = logits[copies]
        chosen, logprob = sampler(logits, uniforms[rows, step])
        tokens[rows, step], logprobs[rows, step] = chosen, logprob
        sequences.append(chosen)
        alive &= ~torch.isin(chosen, eos)
        progress.report((step + 1) / limit)
        if step % pause == 0:
            kept = alive.nonzero()[:, 0]
            if not len(kept):
                break
            if copies is not None and len(kept) <= FULL * len(rows):
                sequences.take(kept)
                rows, alive = rows[kept], alive[kept]
    progress.report(1)
    return tokens, logprobs


def rows_can_move(model: Any) -> str:
    """Returns an empty text if rows of a batch can be dropped, doubled and exchanged between two
    forwards, else the reason why not. This is tried on three short prompts, whose logits are
    compared with those of unmoved rows."""
    # Tokens of the lower half of the vocabulary: placeholders for images and such are at its end.
    vocab = model.get_input_embeddings().num_embeddings
    ids = torch.linspace(0, vocab // 2, 9, device=model.device).long().view(3, 3)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, :1] = 0

    def second(order: list[int]) -> Tensor:
        """Returns the logits of the second token when rows are put in this order before it."""

        def loop(model: Any, input_ids: Tensor, **state: Any) -> Tensor:
            sequences = Sequences(model, input_ids, _of_the_model(state))
            sequences.logits()
            sequences.append(input_ids[:, 0])
            if order != [0, 1, 2]:
                sequences.take(torch.tensor(order, device=input_ids.device))
            return sequences.logits().float()

        result: Tensor = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=2, custom_generate=loop
        )
        return result

    straight = second([0, 1, 2])  # a model that cannot generate raises here
    try:
        moved = second([2, 0, 0])
    except Exception as error:  # models fail in different ways
        return f"{type(error).__name__}: {error}"
    apart = (straight[2] - straight[0]).abs().max()
    gap = float((moved - straight[[2, 0, 0]]).abs().max() / apart)
    return "" if gap < 0.01 else f"its logits move by {gap:.2g} of the distance between two rows"


def _of_the_model(state: dict[str, Any]) -> dict[str, Any]:
    """Removes the arguments that generate() passes for the decoding loop, not for the model."""
    own = ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus")
    return {name: value for name, value in state.items() if name not in own}
