"""Every op with every sort of argument, once: what compute-sanitizer and the profilers watch.

Small ragged shapes by default, cut into several chunks by a small workspace; `--shape N D V` runs
one large call instead, between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import bupo.ops as ops

# N, D, V: rows, widths and vocabularies on both sides of the tiles of 128, 256 and 64.
SMALL = [(1, 8, 7), (7, 100, 1), (130, 64, 513), (257, 72, 1031), (129, 264, 4099)]
# The other dtypes at the middle shapes only.
DTYPES = dict.fromkeys(SMALL, (torch.bfloat16,))
DTYPES |= dict.fromkeys(SMALL[2:4], (torch.bfloat16, torch.float16, torch.float32))


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of lm_head_logprobs, and what policy_loss takes beside them."""
    tokens, width, vocab = shape
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device)

    head = {
        "hidden": normal(tokens, width).to(dtype).requires_grad_(),
        "weight": (normal(vocab, width) * (4 / width**0.5)).to(dtype).requires_grad_(),
        "targets": torch.randint(vocab, (tokens,), generator=g, device=device),
    }
    advantages = normal(tokens)
    policy = {
        "old_logprobs": ops.reference.lm_head_logprobs(**head).logprobs.detach()
        if tokens * vocab < 2**24
        else ops.lm_head_logprobs(**head).logprobs.detach(),
        "advantages": advantages * (advantages > -0.5),  # a share of them has no gradient
        "token_weights": (normal(tokens) < 1).float() / tokens,
    }
    return head, policy


def options(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    tokens, _, vocab = shape
    bias = torch.linspace(-1, 1, vocab, device=device).to(dtype).requires_grad_()
    temperature = torch.linspace(0.5, 2, tokens, device=device)
    return [{}, {"bias": bias, "temperature": temperature}, {"softcap": 20.0}]


def calls(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Iterator[torch.Tensor]:
    """Sums of results, so that a caller can see that they are numbers."""
    head, policy = inputs(shape, dtype, device)
    for extra in options(shape, dtype, device):
        for more in ({}, {"entropy_coef": 0.01}):
            result = ops.policy_loss(**head, **policy, **extra, **more)
            result.loss.backward()
            yield result.loss.detach()
        result = ops.lm_head_logprobs(**head, **extra)
        (result.logprobs.sum() + result.entropy.sum()).backward()
        yield result.logprobs.detach().sum()
        targets = head["targets"].clone()
        targets[::3] = -100
        with torch.no_grad():
            yield ops.lm_head_logprobs(**head | {"targets": targets}, **extra).entropy.sum()
    for name in ("hidden", "weight"):
        yield head[name].grad.float().sum()
        head[name].grad = None


def small(device: str, bfloat16: bool) -> None:
    for workspace, shapes in ((1 << 18, SMALL), (1 << 30, SMALL[3:4])):
        ops.set_workspace_bytes(workspace)
        for shape in shapes:
            for dtype in (torch.bfloat16,) if bfloat16 else DTYPES[shape]:
                if device == "cpu" and dtype == torch.float16:
                    continue
                for value in calls(shape, dtype, device):
                    assert value.isfinite(), (workspace, shape, dtype, value)
    if device == "cuda":  # a target out of range gives nan, and reads nothing that is not there
        head, _ = inputs((130, 64, 513), torch.bfloat16, device)
        head["targets"][5], head["targets"][6] = 2**40, -7
        got = ops.lm_head_logprobs(**head).logprobs
        assert got.isnan().sum() == 2 and got[5].isnan() and got[6].isnan(), got
    print("exercise: every call gave numbers")


def large(shape: tuple[int, int, int], device: str) -> None:
    """One policy_loss with its gradient and one forward, warmed up; a table of kernels."""
    head, policy = inputs(shape, torch.bfloat16, device)

    def once() -> None:
        ops.policy_loss(**head, **policy, clip_low=1.0, clip_high=1e9).loss.backward()
        head["hidden"].grad = head["weight"].grad = None
        with torch.no_grad():
            ops.lm_head_logprobs(**head)

    once()
    if device != "cuda":
        return once()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    once()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def kernel_table(shape: tuple[int, int, int], device: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds) as found:
        large(shape, device)
    by = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--bfloat16", action="store_true", help="no other dtype")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"))
    parser.add_argument("--table", action="store_true", help="torch.profiler's table of kernels")
    args = parser.parse_args()
    if args.shape is None:
        small(args.device, args.bfloat16)
    else:
        (kernel_table if args.table else large)(tuple(args.shape), args.device)


if __name__ == "__main__":
    main()
