"""Tidy tables of an analysis, with one observation per row, in Arrow's memory format.

TOKENS has a row per text, token, layer and policy. The policies are `embedding` (layer 0), `layer`,
`attention`, `ffn` (layers 1..L) and `final`, the model itself (layer L). Null means not measured.
TOP_TOKENS has a row per text, token, layer, policy and place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bupo.internal.curves import by_layer
from bupo.internal.entropy_flow import EntropyFlow
from bupo.internal.lens import Lens
from bupo.internal.sweep import POLICIES
from bupo.internal.texts import Tokens

NAME = pa.dictionary(pa.int32(), pa.string())
WHERE = [("model", NAME), ("text", pa.int32()), ("position", pa.int32())]
WHERE += [("token_id", pa.int32()), ("token", NAME), ("layer", pa.int32()), ("policy", NAME)]
FLOATS = ("entropy", "entropy_normed", "entropy_change", "logprob", "logprob_normed")
TOKENS = pa.schema(
    [
        *WHERE,
        *((name, pa.float32()) for name in FLOATS),
        *((name, pa.int32()) for name in ("rank", "rank_normed")),
        *((name, pa.float32()) for name in ("kl", "kl_normed")),
        *((name, pa.bool_()) for name in ("agrees", "agrees_normed")),
        *((name, pa.float32()) for name in ("norm", "cosine")),
    ]
)
TOP_TOKENS = pa.schema(
    [
        *WHERE,
        ("normed", pa.bool_()),
        ("place", pa.int32()),
        ("top_token_id", pa.int32()),
        ("top_token", NAME),
        ("logprob", pa.float32()),
    ]
)


class Analysed(Protocol):
    """The parts of a bupo.internal.Analysis that the tables need."""

    name: str
    flow: EntropyFlow
    lens: Lens
    closer: Lens

    def piece(self, token: int) -> str:
        """Returns the readable text of a token."""


def token_rows(found: Analysed) -> Iterator[pa.RecordBatch]:
    """Yields the rows of TOKENS, one batch per text, ordered by position, layer and policy."""
    flow, depth = found.flow, found.flow.layers
    policies = ["embedding", *POLICIES * depth, "final"]
    layers = np.array([0, *np.repeat(np.arange(1, depth + 1), len(POLICIES)), depth])
    # For each column: the indices of the policies that have a value, and values [policy, token].
    columns: dict[str, list[tuple[Any, NDArray[Any]]]] = {
        name: [] for name in TOKENS.names[len(WHERE) :]
    }
    columns["entropy"] = [(0, flow.embedding_entropy), (-1, flow.final_entropy)]
    columns["logprob"] = [(-1, flow.final_logprob)]
    for kind, name, kept, known in by_layer(flow, found.lens):
        policy = name.removesuffix("_normed")
        if policy in POLICIES:
            rows = 1 + len(POLICIES) * (np.array(kept) - 1) + POLICIES.index(policy)
            columns[kind + name.removeprefix(policy)].append((rows, known))
    for number in range(int(flow.text.max()) + 1):
        mine = np.flatnonzero(flow.text == number)
        token, row = np.indices((len(mine), len(policies))).reshape(2, -1)
        batch = _where(found, flow, mine[token], layers[row], [policies[n] for n in row])
        shape = (len(policies), len(mine))
        for name, parts in columns.items():
            values, null = np.zeros(shape, parts[0][1].dtype), np.ones(shape, bool)
            for rows, known in parts:
                values[rows], null[rows] = known[..., mine], False
            batch[name] = pa.array(values.T.ravel(), mask=null.T.ravel())
        yield pa.RecordBatch.from_pydict(batch, TOKENS)


def top_rows(found: Analysed) -> Iterator[pa.RecordBatch]:
    """Yields the rows of TOP_TOKENS, one batch per text, ordered by position, layer, policy and
    place."""
    near, layers = found.closer, np.array(found.closer.layers)
    views = list(near.top_tokens)
    for number in range(int(near.text.max()) + 1):
        mine = np.flatnonzero(near.text == number)
        # [view, layer, token, k] -> [token, layer, view, k]
        ids, logprobs = (
            np.stack([table[view][:, mine] for view in views]).transpose(2, 1, 0, 3)
            for table in (near.top_tokens, near.top_logprobs)
        )
        token, layer, view, place = np.indices(ids.shape).reshape(4, -1)
        policies = [views[n].removesuffix("_normed") for n in view]
        batch = _where(found, near, mine[token], layers[layer], policies)
        batch |= {
            "normed": np.array([name.endswith("_normed") for name in views])[view],
            "place": place + 1,
            "top_token_id": ids.ravel(),
            "top_token": _pieces(found, ids.ravel()),
            "logprob": logprobs.ravel(),
        }
        yield pa.RecordBatch.from_pydict(batch, TOP_TOKENS)


def _where(
    found: Analysed, tokens: Tokens, at: NDArray[Any], layer: NDArray[Any], policy: list[str]
) -> dict[str, Any]:
    return {
        "model": [found.name] * len(at),
        "text": tokens.text[at],
        "position": tokens.position[at],
        "token_id": tokens.token[at],
        "token": _pieces(found, tokens.token[at]),
        "layer": layer,
        "policy": policy,
    }


def _pieces(found: Analysed, ids: NDArray[Any]) -> pa.Array:
    which, places = np.unique(ids, return_inverse=True)
    names = pa.array([found.piece(t) for t in which.tolist()])
    return pa.DictionaryArray.from_arrays(pa.array(places.astype(np.int32)), names)
