"""The whole analysis of a model, as `python -m bupo.analyze` computes it, for use in notebooks too.

found = analyse(model, texts, tokenizer)
found.frame()                   one row per token, layer and policy
found.curves()["entropy.ffn"]   values by layer, with the spread over texts
found.boundary.layer            the layer after which the FFNs stop exploring
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import nn

from bupo import progress
from bupo.internal import tables
from bupo.internal.boundary import TOLERANCE, Boundary, boundary_layer, convergence
from bupo.internal.budget import affordable, only, some_tokens
from bupo.internal.checks import Check, identities
from bupo.internal.curves import Curve, curves, single
from bupo.internal.entropy_flow import EntropyFlow, FlowMeasure
from bupo.internal.lens import Lens, LensMeasure, SimilarityMeasure
from bupo.internal.sweep import VIEWS, sweep
from bupo.internal.texts import measured
from bupo.policy import num_layers, unembedding
from bupo.samples import Sample

CLOSER = ("layer", "layer_normed")
"""The policies whose top tokens are kept"""
ECHO = 0.5
"""A policy is degenerate if it predicts the token just read for at least this share of tokens"""


@dataclass
class Analysis:
    """The analysis of one model over some texts. Arrays are those of EntropyFlow and Lens; layers
    count from 1."""

    name: str
    texts: list[Sample]
    """Those that are measured"""
    numbers: list[int]
    """The places of these texts among those that were given"""
    flow: EntropyFlow
    lens: Lens
    """Ranks, KL and agreement of all texts, at every `stride`-th layer and the last"""
    closer: Lens
    """Top tokens for the first tokens of the first texts"""
    closer_tokens: int
    """Largest number of tokens of a text in `closer`"""
    boundary: Boundary
    checks: list[Check]
    pieces: dict[int, str] = field(default_factory=dict)
    """Readable text by token id"""

    def curves(self) -> dict[str, Curve]:
        """Returns every quantity by layer; see bupo.internal.curves."""
        return curves(self.flow, self.lens)

    def table(self) -> pa.Table:
        """Returns one row per text, token, layer and policy. The columns are described in
        docs/internal_policies.md."""
        return pa.Table.from_batches(list(tables.token_rows(self)), tables.TOKENS)

    def top_table(self) -> pa.Table:
        """Returns one row per text, token, layer, policy and place among its likeliest tokens."""
        return pa.Table.from_batches(list(tables.top_rows(self)), tables.TOP_TOKENS)

    def frame(self) -> Any:
        """Returns table() as a pandas frame. Raises ImportError if pandas is not installed."""
        return self.table().to_pandas()

    def echo(self, policy: str) -> NDArray[np.floating]:
        """Returns, for each of the lens's layers, the share of tokens for which the policy's
        likeliest next token is the token that it has just read."""
        read = [self.texts[n].token_ids[p - 1] for n, p in zip(self.lens.text, self.lens.position)]
        same = self.lens.top_tokens[policy][..., 0] == np.array(read)
        return np.asarray(same.mean(axis=1))

    def notes(self) -> list[str]:
        """Returns notes to read before the curves, on layers where a curve is meaningless."""
        echo, layers = self.echo("layer"), self.lens.layers
        flat = [n for n, share in enumerate(echo) if share >= ECHO and layers[n] < layers[-1]]
        if not flat:
            return []
        return [
            f"{self.name}: in layers {_runs(flat, layers)} the raw policy pi^l mostly names the "
            f"token that it has just read (for {echo[flat].mean():.0%} of the tokens): "
            "the embedding still dominates H^l. Raw entropy, KL and ranks there say nothing about "
            "the next token; read the curves with the final norm."
        ]

    def piece(self, token: int) -> str:
        return self.pieces.get(token, f"<{token}>")

    def summary(self) -> dict[str, Any]:
        """Returns means by layer with standard errors over texts, boundary, convergence and
        checks."""
        found = self.curves()
        ways = {name: convergence(found[f"entropy.{name}"].mean) for name in self.flow.logprob}
        return {
            "name": self.name,
            "layers": self.flow.layers,
            "vocabulary": self.flow.vocab,
            "largest_entropy": float(np.log(self.flow.vocab)),
            "texts": len(self.texts),
            "tokens": len(self.flow.token),
            "of_tokens": sum(text.count for text in self.texts),
            "parallel_blocks": self.flow.parallel,
            "notes": self.notes(),
            "echo": {name: self.echo(name).tolist() for name in CLOSER},
            "checks": [asdict(c) for c in self.checks],
            "boundary": asdict(self.boundary),
            "convergence": {
                name: {"kind": kind, "share_of_last_two": share}
                for name, (kind, share) in ways.items()
            },
            "model": {name: _spread(x, 0) for name, x in single(self.flow).items()},
            "curves": {name: {"layers": x.layers, **_spread(x)} for name, x in found.items()},
            "similarity": self.lens.similarity.tolist(),
        }


def analyse(
    model: nn.Module,
    texts: Sequence[Sample],
    tokenizer: Any = None,
    *,
    name: str = "model",
    top_k: int = 5,
    closer: int = 3,
    closer_tokens: int = 192,
    stride: int = 1,
    temperature: float = 1.0,
    tolerance: float = TOLERANCE,
    batch_tokens: int = 1024,
    minutes: float | None = None,
    tokens: int | None = None,
    seed: int = 0,
) -> Analysis:
    """Measures entropies, log-probs, norms and cosines of every layer, attention and FFN over the
    measured tokens of texts; ranks, KL to the model and agreement at every `stride`-th layer and
    the last; and the top_k likeliest tokens for the first `closer_tokens` of the first `closer`
    texts.

    The texts run through the model once. tokens: the number of tokens that are measured, drawn from
    all texts evenly by seed. minutes: measures as many texts, drawn by seed, and tokens of them as
    that time allows. The tokens of the heat maps come on top, within half of the time. tokenizer:
    only needed for readable tokens.
    temperature: that of every policy. tolerance: that of the boundary. Memory: that of entropy_flow
    and lens, and O(L tokens). Errors: ValueError if there is no text, a text without a measured
    token, or a stride or closer_tokens below 1; IdentityError if an identity of
    bupo.internal.checks does not hold; DecompositionError; else those of bupo.policy.
    """
    for option, value in (("stride", stride), ("closer_tokens", closer_tokens)):
        if value < 1:
            raise ValueError(f"analyse: {option}: expected at least 1, got {value}")
    layers = kept_layers(num_layers(model), stride)
    measured("analyse", texts)
    shown = max(closer, 1)

    def measure(kept: NDArray[np.bool_], few: Sequence[Sample]) -> Any:
        """kept: of the counted tokens of these texts, those that are measured."""
        first = np.concatenate(
            [(n < shown) & (np.arange(x.count) < closer_tokens) for n, x in enumerate(few)]
        )
        read, either = only(few, kept | first), kept | first
        flow = FlowMeasure(model, read, temperature, kept[either])
        wide = LensMeasure(model, read, 1, VIEWS, layers, kept[either])
        near = LensMeasure(model, read, top_k, CLOSER, layers, first[either])
        similarity = SimilarityMeasure(read)
        sweep(model, read, [flow, wide, near, similarity], temperature, batch_tokens)
        return flow.result(), wide.result(similarity), near.result(similarity)

    def timed(probe: list[Sample]) -> None:
        with progress.watched_by(lambda share: None):
            measure(np.ones(probe[0].count, bool), probe)

    numbers = list(range(len(texts)))
    if minutes is not None:
        few, tokens = affordable(60 * minutes, texts, timed)
        numbers = sorted(np.random.default_rng(seed).permutation(len(texts))[:few].tolist())
        texts = [texts[number] for number in numbers]
        closer_tokens = max(1, min(closer_tokens, tokens // (2 * shown)))
        tokens = max(len(texts), tokens - sum(min(x.count, closer_tokens) for x in texts[:shown]))
    every = np.ones(sum(text.count for text in texts), bool)
    kept = every if tokens is None else some_tokens(texts, tokens, seed)
    entropies, wide, near = measure(kept, texts)
    found = Analysis(
        name=name,
        texts=list(texts),
        numbers=numbers,
        flow=entropies,
        lens=wide,
        closer=near,
        closer_tokens=closer_tokens,
        boundary=boundary_layer(entropies.by_text(entropies.change("ffn")), tolerance, seed),
        checks=identities(entropies, unembedding(model).weight.dtype),
    )
    if tokenizer is not None:
        pieces = [np.concatenate([*(t.token_ids for t in texts), found.closer.final_top])]
        pieces += [x.ravel() for x in found.closer.top_tokens.values()]
        found.pieces = readable(tokenizer, np.unique(np.concatenate(pieces)))
    return found


def _runs(chosen: Sequence[int], layers: Sequence[int]) -> str:
    """Describes the layers at these places with runs of neighbours joined, such as "1-5, 8"."""
    runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1)
    ends = [(layers[run[0]], layers[run[-1]]) for run in runs]
    return ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in ends)


def kept_layers(depth: int, stride: int) -> list[int]:
    """Returns every stride-th layer, and always the last."""
    return sorted({*range(1, depth + 1, stride), depth})


def readable(tokenizer: Any, ids: NDArray[np.integer]) -> dict[int, str]:
    """Returns the text of each token id; the tokenizer's name for it if the text is empty or part
    of a character; and <id> if the tokenizer does not have it (a padding row of the head)."""
    found = {}
    for token in map(int, ids):
        text = tokenizer.decode([token]) if token < len(tokenizer) else ""
        if not text or "\ufffd" in text:
            text = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
        found[token] = text or f"<{token}>"
    return found


def _spread(curve: Curve, layers: Any = ...) -> dict[str, Any]:
    error = None if curve.error is None else curve.error[layers].tolist()
    return {"mean": curve.mean[layers].tolist(), "se": error}
