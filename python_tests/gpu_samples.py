"""What the tests that need a GPU share: why they are skipped, and calls made on the device."""

from __future__ import annotations

import functools

import pytest
import torch
from on_device import OnDevice
from sample_inputs import OPS, Sample, head, with_policy
from torch import Tensor

import bupo.ops as ops


def why_not() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if "cuda" not in ops.build_info()["devices"]:
        return "the extension was built without its CUDA operators (BUPO_CUDA=ON)"
    return ""


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not())]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on_gpu(
    op: str, tokens: int, width: int, vocab: int, dtype: torch.dtype, name: str = "gpu"
) -> Sample:
    """A call of the op at this size, with live, clipped and excluded tokens."""
    return exact_on_gpu(op, tokens, width, vocab, name).to(dtype)


@functools.lru_cache(maxsize=1)
def _head_on_gpu(tokens: int, width: int, vocab: int, name: str) -> dict[str, Tensor]:
    with OnDevice("cuda"):
        return head(f"{name} {tokens}x{width}x{vocab}", (tokens,), width, vocab)


def exact_on_gpu(op: str, tokens: int, width: int, vocab: int, name: str = "gpu") -> Sample:
    """The same before rounding: float64."""
    arguments = _head_on_gpu(tokens, width, vocab, name)
    with OnDevice("cuda"):
        if op == "policy_loss":
            arguments = with_policy(name, arguments)
    return Sample(name, op, arguments)


def results(call: Sample) -> dict[str, Tensor]:
    """Outputs and gradients; unlike sample_inputs.evaluate nothing of it needs float64."""
    leaves = call.leaves()
    result = call.call(**leaves)
    if call.op == "policy_loss":
        total = result.loss
    else:
        total = (result.logprobs * 0.7 + result.entropy * 0.3).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {k: x.detach() for k, x in result._asdict().items() if isinstance(x, Tensor)}
    return found | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of results whose bits differ."""
    return [name for name in a if not torch.equal(a[name], b[name])]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
