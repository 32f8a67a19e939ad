"""Every CUDA kernel once, on a small call, against plain torch in float64: `python bench/smoke.py
sm90_pingpong`. The first thing to run on a new GPU.

A line before each call and one after it, so that the last line names what hangs: a call has
SECONDS, then the process ends. Exit status 1 if one is wrong or hangs.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bupo.ops as ops
from bupo.ops.registration import CUDA_KERNELS

SECONDS = 20
SHAPE = (300, 256, 2600)
"""N, D, V: several tiles of rows and columns, the last ones ragged"""
LIMIT = {"output": 1e-3, "gradient": 1e-2}
"""Absolute, in nats, and by the Frobenius norm: bfloat16 gives 3e-3."""


def inputs(device: str) -> dict[str, Tensor]:
    tokens, width, vocab = SHAPE
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    return {
        "hidden": normal(tokens, width).bfloat16().requires_grad_(),
        "weight": (normal(vocab, width) * (4 / width**0.5)).bfloat16().requires_grad_(),
        "targets": torch.randint(vocab, (tokens,), generator=g, device=device),
        "bias": normal(vocab).bfloat16().requires_grad_(),
        "old_logprobs": -8 - normal(tokens).abs(),
        "advantages": normal(tokens) * (normal(tokens) > 0),
        "token_weights": (normal(tokens) < 1).float() / tokens,
    }


def compare(call: Callable[[Any, dict[str, Tensor]], tuple[Tensor, Tensor]], device: str) -> str:
    """What is wrong, or nothing. call: (ops or its reference, inputs) -> (outputs, scalar)."""
    found = []
    for module, dtype in ((ops, None), (ops.reference, torch.float64)):
        given = inputs(device)
        if dtype:
            given = {
                k: x.detach().to(dtype).requires_grad_(x.requires_grad)
                if x.is_floating_point()
                else x
                for k, x in given.items()
            }
        outputs, total = call(module, given)
        leaves = [given[name] for name in ("hidden", "weight", "bias")]
        grads = [None] * 3
        if total.requires_grad:
            grads = list(torch.autograd.grad(total, leaves, allow_unused=True))
        found.append((outputs.detach().double(), grads))
    (outputs, grads), (truth, exact) = found
    error = float((outputs - truth).abs().max())
    if not error <= LIMIT["output"]:
        return f"outputs are off by {error:.1e} nats"
    for name, g, e in zip(("dX", "dW", "db"), grads, exact, strict=True):
        if g is not None and e is not None:
            error = float((g.double() - e.double()).norm() / e.double().norm())
            if not error <= LIMIT["gradient"]:
                return f"{name} is off by {error:.1e} of its norm"
    return ""


def head(given: dict[str, Tensor], *more: str) -> dict[str, Tensor]:
    return {name: given[name] for name in ("hidden", "weight", "targets", *more)}


def forward(module: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = module.lm_head_logprobs(**head(given))
    return torch.stack([out.logprobs, out.entropy]), out.logprobs.sum()


def forward_with_bias(module: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = module.lm_head_logprobs(**head(given, "bias"))
    return torch.stack([out.logprobs, out.entropy]), out.logprobs.sum()


def backward(module: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    out = module.lm_head_logprobs(**head(given))
    return torch.stack([out.logprobs, out.entropy]), (out.logprobs * given["advantages"]).sum()


def backward_of_entropy(module: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    out = module.lm_head_logprobs(**head(given, "bias"))
    return out.logprobs, (out.logprobs - 0.3 * out.entropy).mean()


def policy_loss(module: Any, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    names = ("old_logprobs", "advantages", "token_weights")
    result = module.policy_loss(**head(given, *names), **options)
    return result.loss, result.loss * 3


def policy_loss_with_bias(module: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return policy_loss(module, given, bias=given["bias"], entropy_coef=0.01)


def in_chunks(module: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """dW is added up over several products."""
    ops.set_workspace_bytes(1 << 20)
    try:
        return policy_loss(module, given)
    finally:
        ops.set_workspace_bytes(None)


CALLS = (
    *(forward, forward_with_bias, backward, backward_of_entropy),
    *(policy_loss, policy_loss_with_bias, in_chunks),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernels", choices=CUDA_KERNELS)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    args = parser.parse_args(arguments)
    hopper = args.device == "cpu" or torch.cuda.get_device_capability() == (9, 0)
    if args.kernels.startswith("sm90") and not hopper:
        print(f"{args.kernels}: not a Hopper GPU")
        return 0
    ops.set_cuda_kernels(args.kernels)
    torch.zeros(1, device=args.device)  # the context is made before the clock runs
    wrong = 0
    for call in CALLS:
        print(f"{args.kernels}, {call.__name__}: begins", flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            why = compare(call, args.device)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        faulthandler.cancel_dump_traceback_later()
        print(f"{args.kernels}, {call.__name__}: {why or 'right'}", flush=True)
        wrong += bool(why)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
