"""Sizes that broke other kernels, on a GPU: every vocabulary, width and number of tokens of the
issue, more logits and more weights than 32 bits count, and the memory that a call takes.

Small products of N and V are compared with plain torch and float64 whole; large ones with the
chunked float64 truth of bench/truth.py, which samples rows of dX and dW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from batch import Batch
from gpu_samples import DTYPES, each_op, exact_on_gpu, needs_gpu
from implementations import Implementation, logprobs, logprobs_forward, policy_loss
from measure import MIB, Case, errors_of, memory_of
from sample_inputs import check_three_way
from truth import Truth

import bupo.ops as ops

pytestmark = needs_gpu

# N, D, V: each of N, D and V of the list at least once, ragged ones together.
WHOLE = [
    (129, 64, 151936),
    (127, 100, 128256),
    (7, 8, 151643),
    (129, 2880, 50257),
    (1, 2560, 50257),
    (127, 3584, 32003),
    (1, 64, 262144),
    (129, 4096, 7),
    (127, 2560, 1),
    (0, 4096, 50257),
    (8191, 100, 513),
    (8191, 8, 7),
    (65537, 64, 7),
    (65537, 8, 1),
]


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


# Random numbers are made on the CPU: the dtypes of one size follow one another and share them. The
# decorator on top changes fastest.
exact = functools.lru_cache(maxsize=1)(exact_on_gpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_op
@pytest.mark.parametrize("size", WHOLE, ids=lambda s: "x".join(map(str, s)))
def test_against_plain_torch(size: tuple[int, int, int], op: str, dtype: torch.dtype) -> None:
    check_three_way(exact(op, *size), dtype)


# N, D, V in bfloat16, whose [N, V] is too much for plain torch, or nearly.
LARGE = [
    (8191, 4096, 151936),
    (8191, 3584, 151643),
    (8191, 2880, 128256),
    (8191, 2560, 262144),
    (65537, 64, 151936),  # N V = 1e10
    (65537, 100, 50257),  # N V = 3e9
    (129, 8256, 262144),  # V D = 2.2e9, D % 128 = 64
]
assert sum(n * v > 2**31 for n, _, v in LARGE) >= 2 and sum(d * v > 2**31 for _, d, v in LARGE)
CALLS: dict[str, Callable] = {"policy_loss": policy_loss, "lm_head_logprobs": logprobs}


@pytest.mark.parametrize("size", LARGE, ids=lambda s: "x".join(map(str, s)))
def test_large_sizes_against_float64(size: tuple[int, int, int]) -> None:
    tokens, width, vocab = size
    need = 2 * (tokens + 3 * vocab) * width + 4 * vocab * width + 12 * 2**30
    if torch.cuda.get_device_properties(0).total_memory < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of GPU memory")
    batch = Batch.make(*size, torch.bfloat16, "cuda")
    truth = Truth.of(batch, 200, 300)
    for name, call in CALLS.items():
        case = Case(Implementation(name, call, 3), torch.bfloat16, [batch])
        found = errors_of(case, batch, truth)
        assert found["error_logprobs"] < 1e-3, (name, found)
        assert found["error_entropy"] < 1e-3, (name, found)
        assert found["error_d_hidden"] <= 3e-3, (name, found)
        assert found["error_d_weight"] <= 3e-3, (name, found)


@pytest.mark.parametrize("budget_mib", [64, 256, 1024])
@pytest.mark.parametrize("name", ["policy_loss", "lm_head_logprobs", "forward"])
def test_memory_is_the_budget(name: str, budget_mib: int) -> None:
    """Beside results and gradients: the workspace, 128 rows of logits if those are more, and an
    fp32 accumulator of dW once there are several chunks (set_workspace_bytes documents it)."""
    tokens, width, vocab = 8192, 512, 128256
    batch = Batch.make(tokens, width, vocab, torch.bfloat16, "cuda")
    call = {**CALLS, "forward": logprobs_forward}[name]
    case = Case(Implementation(name, call, 3), torch.bfloat16, [batch])
    before = ops.build_info()["workspace_bytes"]
    ops.set_workspace_bytes(budget_mib * MIB)
    try:
        memory_of(case)  # libraries take their workspaces
        extra = memory_of(case)["extra_mib"]
    finally:
        ops.set_workspace_bytes(before or None)
    smallest = 128 * vocab * (4 + 2) / MIB
    accumulator = 0 if name == "forward" else 4 * vocab * width / MIB
    assert extra <= max(budget_mib, smallest) + accumulator + 64, extra
    assert extra < tokens * vocab * 2 / MIB + accumulator, "this is the size of all logits"
