"""What each internal policy would say: its most likely tokens, and how far it is from the model.

For a policy q of layer l (layer, attention or FFN; raw or with the final norm) and the final policy
pi, of each measured token t:

    rank = #{j : q_j > q_t}    KL(q || pi) = sum_j q_j (log q_j - log pi_j)    argmax q = argmax pi?

These need whole rows of logits beside each other, a few tokens at a time: [CHUNK, V] is the largest
tensor. entropy_flow() is the cheaper sweep, for all tokens; this one is for a closer look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bupo.internal.decomposition import Layer, decomposed
from bupo.internal.log_probs import CHUNK, evaluating, kl_rows, log_probs
from bupo.internal.texts import Batch, Text, batches_of
from bupo.policy import decoder_stack, hidden_states, num_layers, unembedding

VIEWS = ("layer", "attention", "ffn", "layer_normed", "attention_normed", "ffn_normed")
COMPARED = 256
"""Tokens of a batch, evenly spaced, whose H^1..H^L are kept for the cosines between layers"""


@dataclass
class Lens:
    """Arrays over [layer, token], by view ("layer", ..., "ffn_normed"); rows as in `layers`."""

    text: NDArray[np.int64]
    position: NDArray[np.int64]
    token: NDArray[np.int64]
    rank: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Of the measured token, 0 for the most likely"""
    kl: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """KL(internal || final), nats"""
    agrees: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Same most likely token as the model"""
    top_tokens: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """[layer, token, k]"""
    top_logprobs: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    final_top: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """[token]: the model's most likely token"""
    similarity: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """[L, L]: cos(H^l, H^m), mean over tokens (of a text over COMPARED tokens: of so many)"""
    layers: list[int] = field(default_factory=list)
    """Which layers the rows are, counted from 1"""


def lens(
    model: nn.Module,
    texts: Sequence[Text],
    top_k: int = 5,
    views: Sequence[str] = VIEWS,
    temperature: float = 1.0,
    layers: Sequence[int] | None = None,
    share: Callable[[float], object] = lambda share: None,
    batch_tokens: int = 1024,
) -> Lens:
    """Ranks, distances and top tokens of layers' policies over the measured tokens.

    layers: which, counted from 1; None: all. share is called with the share done. Errors:
    ValueError for no text, an unknown view or layer, top_k outside 1..V; DecompositionError for a
    family whose layers cannot be taken apart.
    """
    if not texts:
        raise ValueError("lens: texts: expected at least one, came none")
    if unknown := [v for v in views if v not in VIEWS]:
        raise ValueError(f"lens: views: expected some of {VIEWS}, came {unknown}")
    head = unembedding(model)
    if not 1 <= top_k <= head.weight.shape[0]:
        raise ValueError(f"lens: top_k: expected 1..{head.weight.shape[0]}, came {top_k}")
    depth = num_layers(model)
    chosen = sorted(set(range(1, depth + 1) if layers is None else layers))
    if not chosen or chosen[0] < 1 or chosen[-1] > depth:
        raise ValueError(f"lens: layers: expected some of 1..{depth}, came {layers}")
    done, total = 0, sum(len(t.token_ids) for t in texts)

    def of_batch(batch: Batch) -> Lens:
        nonlocal done
        begin, size = done, batch.ids.numel()
        look = _Look(model, batch, top_k, views, temperature, chosen)
        look.share = lambda part: share((begin + part * size) / total)
        done += size
        return look.run()

    with evaluating(model):
        batches = list(batches_of(texts, batch_tokens, head.weight.device))
        parts = [of_batch(b) for b in batches]
    found = _joined(parts, [len(b.text) for b in batches])
    found.layers = chosen
    return found


class _Look:
    """One batch of texts."""

    share: Callable[[float], object]

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        top_k: int,
        views: Sequence[str],
        temperature: float,
        layers: Sequence[int],
    ) -> None:
        self.model, self.batch, self.top_k, self.views = model, batch, top_k, views
        self.layers, self.depth = frozenset(layers), num_layers(model)
        count = len(batch.targets)
        places = np.linspace(0, count - 1, min(count, COMPARED)).round()
        self.compared = torch.tensor(places, dtype=torch.long, device=batch.targets.device)
        self.head, self.norm, self.temperature = (
            unembedding(model),
            decoder_stack(model).norm,
            temperature,
        )
        self.stream: list[Tensor] = []
        self.found: dict[str, dict[str, list[Tensor]]] = {}

    def run(self) -> Lens:
        self.final = self.batch.pick(hidden_states(self.model, self.batch.ids))
        with decomposed(self.model, self._visit):
            hidden_states(self.model, self.batch.ids)
        unit = torch.stack([nn.functional.normalize(x.float(), dim=-1) for x in self.stream])
        tops = [self._logp(rows).argmax(-1).cpu() for rows in self.final.split(CHUNK)]
        look = Lens(self.batch.text, self.batch.position, self.batch.targets.cpu().numpy())
        for kind, columns in self.found.items():
            getattr(look, kind).update(
                {view: torch.stack(x).numpy() for view, x in columns.items()}
            )
        look.final_top = torch.cat(tops).numpy()
        look.similarity = torch.einsum("ind,jnd->ij", unit, unit).div(unit.shape[1]).cpu().numpy()
        return look

    def _logp(self, hidden: Tensor) -> Tensor:
        return log_probs(self.head, hidden, self.temperature)

    def _visit(self, layer: Layer) -> None:
        vectors = {n: self.batch.pick(getattr(layer, n)) for n in ("after", "attention", "ffn")}
        vectors["layer"] = vectors.pop("after")
        self.stream.append(vectors["layer"][self.compared])
        self.share(layer.index / self.depth)
        if layer.index not in self.layers:
            return
        vectors |= {f"{name}_normed": self.norm(x) for name, x in tuple(vectors.items())}
        pieces: dict[str, dict[str, list[Tensor]]] = {}
        for first in range(0, len(self.batch.targets), CHUNK):
            rows = slice(first, first + CHUNK)
            final = self._logp(self.final[rows])
            said, target = final.argmax(-1), self.batch.targets[rows, None]
            for view in self.views:
                logp = self._logp(vectors[view][rows])
                for kind, values in self._compare(logp, final, said, target).items():
                    pieces.setdefault(kind, {}).setdefault(view, []).append(values.cpu())
        for kind, columns in pieces.items():
            for view, parts in columns.items():
                self.found.setdefault(kind, {}).setdefault(view, []).append(torch.cat(parts))

    def _compare(
        self, logp: Tensor, final: Tensor, said: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """Of policies [n, V] to the model's, whose likeliest tokens are said."""
        if self.top_k > 1:
            best, first = logp.topk(self.top_k, dim=-1)
        else:  # much cheaper
            best, first = logp.max(-1, keepdim=True)
        return {
            "rank": (logp > logp.gather(1, target)).sum(-1),
            "kl": kl_rows(logp, final),
            "agrees": first[:, 0] == said,
            "top_tokens": first,
            "top_logprobs": best,
        }


def _joined(parts: list[Lens], counts: list[int]) -> Lens:
    """One of several, tokens in the order of texts and places."""
    text, position = (np.concatenate([getattr(p, n) for p in parts]) for n in ("text", "position"))
    order = np.lexsort((position, text))

    def tables(name: str) -> dict[str, NDArray]:
        found = [getattr(p, name) for p in parts]
        return {view: np.concatenate([f[view] for f in found], 1)[:, order] for view in found[0]}

    weights = np.array(counts, dtype=np.float64) / sum(counts)
    similar = sum(w * p.similarity.astype(np.float64) for w, p in zip(weights, parts))
    return Lens(
        text[order],
        position[order],
        np.concatenate([p.token for p in parts])[order],
        rank=tables("rank"),
        kl=tables("kl"),
        agrees=tables("agrees"),
        top_tokens=tables("top_tokens"),
        top_logprobs=tables("top_logprobs"),
        final_top=np.concatenate([p.final_top for p in parts])[order],
        similarity=np.asarray(similar, dtype=np.float32),
    )
