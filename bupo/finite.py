"""Finds the tensor that nan or infinity came from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from bupo import ranks


def first_bad(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Returns `NAME: 3 of 4096 values are not finite` for the first such tensor, or None."""
    for name, tensor in tensors:
        if tensor is None:
            continue
        rows = ranks.local(tensor.detach())
        bad = rows.numel() - int(rows.isfinite().sum())
        if bad:
            return f"{name}: {bad} of {tensor.numel()} values are not finite"
    return None
