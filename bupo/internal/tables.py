"""An analysis as tables: tidy, one observation a row, in Arrow's memory format.

TOKENS: a row a text, token, layer and policy. Policies: `embedding` (layer 0), `layer`,
`attention`, `ffn` (layers 1..L) and `final`, the model itself (layer L). Null: not measured.
TOP_TOKENS: a row a text, token, layer, policy and place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bupo.internal.entropy_flow import EntropyFlow
from bupo.internal.lens import Lens
from bupo.internal.sweep import POLICIES

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
    """What tables are made of: bupo.internal.Analysis."""

    name: str
    flow: EntropyFlow
    lens: Lens
    closer: Lens

    def piece(self, token: int) -> str:
        """A readable token."""


def token_rows(found: Analysed) -> Iterator[pa.RecordBatch]:
    """Rows of TOKENS, a batch a text, ordered by place, layer and policy."""
    change = {name: found.flow.change(name) for name in POLICIES}
    for number in range(int(found.flow.text.max()) + 1):
        yield _token_rows(found, number, change)


def _token_rows(found: Analysed, number: int, change: dict[str, NDArray]) -> pa.RecordBatch:
    flow, mine = found.flow, found.flow.text == number
    count, depth = int(mine.sum()), flow.layers
    policies = ["embedding", *POLICIES * depth, "final"]
    layers = np.array([0, *np.repeat(np.arange(1, depth + 1), len(POLICIES)), depth], np.int32)
    rows = len(policies)

    def column(values: list[tuple[slice | int, Any]], kind: Any) -> pa.Array:
        """values: (rows of a token, [those rows, token]); the other rows are null."""
        data, known = np.zeros((rows, count), np.float64), np.zeros((rows, count), bool)
        for place, x in values:
            data[place], known[place] = x, True
        return pa.array(data.T.ravel(), mask=~known.T.ravel()).cast(kind)

    def by_policy(table: dict[str, NDArray], suffix: str = "", layers: Any = None) -> list:
        kept = np.arange(depth) if layers is None else np.array(layers) - 1
        return [
            (1 + len(POLICIES) * kept + k, table[name + suffix][:, mine])
            for k, name in enumerate(POLICIES)
            if name + suffix in table
        ]

    of_model = {"entropy": flow.final_entropy, "logprob": flow.final_logprob}
    columns: dict[str, list] = {}
    for kind in ("entropy", "logprob"):
        columns[kind] = [*by_policy(getattr(flow, kind)), (rows - 1, of_model[kind][mine])]
        columns[f"{kind}_normed"] = by_policy(getattr(flow, kind), "_normed")
    columns["entropy"].append((0, flow.embedding_entropy[mine]))
    columns["entropy_change"] = by_policy(change)
    for kind in ("rank", "kl", "agrees"):
        table = getattr(found.lens, kind)
        columns[kind] = by_policy(table, "", found.lens.layers)
        columns[f"{kind}_normed"] = by_policy(table, "_normed", found.lens.layers)
    columns["norm"], columns["cosine"] = by_policy(flow.norm), by_policy(flow.cosine)
    where = _where(
        found,
        number,
        np.repeat(flow.position[mine], rows),
        np.repeat(flow.token[mine], rows),
        np.tile(layers, count),
        policies * count,
    )
    rest = {name: column(columns[name], TOKENS.field(name).type) for name in columns}
    return pa.record_batch([(where | rest)[name] for name in TOKENS.names], schema=TOKENS)


def top_rows(found: Analysed) -> Iterator[pa.RecordBatch]:
    """Rows of TOP_TOKENS, a batch a text, ordered by place in the text, layer, policy, place."""
    near = found.closer
    views = list(near.top_tokens)
    for number in range(int(near.text.max()) + 1):
        mine = near.text == number
        # [view, layer, token, k] -> [token, layer, view, k]
        ids, logp = (
            np.stack([table[view][:, mine] for view in views]).transpose(2, 1, 0, 3)
            for table in (near.top_tokens, near.top_logprobs)
        )
        count, layers, kinds, k = ids.shape
        each = layers * kinds * k
        where = _where(
            found,
            number,
            np.repeat(near.position[mine], each),
            np.repeat(near.token[mine], each),
            np.tile(np.repeat(np.array(near.layers, np.int32), kinds * k), count),
            [v.removesuffix("_normed") for v in views for _ in range(k)] * (layers * count),
        )
        normed = np.repeat([v.endswith("_normed") for v in views], k)
        where["normed"] = pa.array(np.tile(normed, count * layers))
        where["place"] = pa.array(np.tile(np.arange(1, k + 1, dtype=np.int32), each * count // k))
        where["top_token_id"] = pa.array(ids.ravel().astype(np.int32))
        where["top_token"] = _pieces(found, ids.ravel())
        where["logprob"] = pa.array(logp.ravel().astype(np.float32))
        yield pa.record_batch([where[n] for n in TOP_TOKENS.names], schema=TOP_TOKENS)


def _where(
    found: Analysed,
    number: int,
    position: NDArray,
    token: NDArray,
    layer: NDArray,
    policy: list[str],
) -> dict[str, pa.Array]:
    rows = len(position)
    return {
        "model": _names([found.name] * rows),
        "text": pa.array(np.full(rows, number, np.int32)),
        "position": pa.array(position.astype(np.int32)),
        "token_id": pa.array(token.astype(np.int32)),
        "token": _pieces(found, token),
        "layer": pa.array(layer),
        "policy": _names(policy),
    }


def _names(values: list[str]) -> pa.Array:
    return pa.array(values).dictionary_encode().cast(NAME)


def _pieces(found: Analysed, ids: NDArray) -> pa.Array:
    which, places = np.unique(ids, return_inverse=True)
    names = pa.array([found.piece(t) for t in which.tolist()])
    return pa.DictionaryArray.from_arrays(pa.array(places.astype(np.int32)), names)
