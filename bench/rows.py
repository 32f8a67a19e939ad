"""What may be said of a row of results: needs nothing that has to be built."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
GRADIENT_RIGHT = 5e-2
"""Frobenius error of dX and dW, relative. Generous on purpose: rounding the results to bfloat16
gives 2e-3, bfloat16 logits 1.5e-2 (they move the ratio too), bfloat16 sums over chunks more. A
softmax from other numbers than its logsumexp gives 0.2."""


def gradient_is_right(row: Row) -> bool:
    errors = (row.get("error_d_hidden"), row.get("error_d_weight"))
    return all(e is not None and e <= GRADIENT_RIGHT for e in errors)  # nan is not <=


def add_best_peer(rows: list[Row]) -> None:
    """x_best_peer: over the fastest peer that does as much (forward or both), if it is right."""
    for products in (1, 3):
        same = [r for r in rows if r.get("products") == products]
        fit = [r for r in same if r["peer"] and (products == 1 or gradient_is_right(r))]
        if fit:
            best = min(fit, key=lambda r: r["ms"])
            for row in same:
                row |= {"x_best_peer": row["ms"] / best["ms"], "best_peer": best["name"]}
