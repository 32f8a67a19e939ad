"""What the tests of the operators share: a small call, its gradients, equality, a record."""

from typing import Any

import pytest
import torch
from sample_inputs import (
    DTYPES,
    OPS,
    Sample,
    evaluate,
    sample,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bupo.ops as ops

each_op = pytest.mark.parametrize("op", OPS)


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def small(op: str, dtype: torch.dtype = torch.float32) -> Sample:
    """[2, 25] tokens, D = 24, V = 150, with a bias."""
    return sample(op, "bias").to(dtype)


def gradients(call: Sample, **changes: Any) -> dict[str, Tensor]:
    return {k: x for k, x in evaluate(ops, call.but(**changes)).results.items() if k[:2] == "d "}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], label: str = "") -> None:
    """Equal but for the last bits, which the strides of a matrix product may change."""
    for name, x in expected.items():
        eps = torch.finfo(x.dtype).eps
        close = {"rtol": 2 * eps, "atol": 8 * eps * float(x.detach().abs().max())}
        torch.testing.assert_close(got[name], x, **close, msg=lambda m, n=name: f"{label} {n}: {m}")


class RecordBupo(TorchDispatchMode):
    """Keeps the calls of torch.ops.bupo operators and what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.outputs: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func.namespace == "bupo":
            self.calls.append((func, args))
            self.outputs.append(out)
        return out
