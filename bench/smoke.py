"""Every CUDA kernel once, on a small call, against plain torch in float64: `python bench/smoke.py
sm90_pingpong`. The first thing to run on a new GPU.

Prints a line before each call and one after it, so that the last line names a call that hangs. A
call may take SECONDS; then the process ends. Exit status 1 if a call is wrong or hangs.
"""

import argparse
import faulthandler
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from truth import relative_error

import bupo.ops as ops
from bupo.ops.registration import CUDA_KERNELS

SECONDS = 20
SHAPE = (300, 256, 2600)  # N, D, V: several tiles of rows and columns, the last ones ragged
LIMIT = {"output": 1e-3, "gradient": 1e-2}
"""The largest error: absolute in nats, and by the Frobenius norm, where bfloat16 has 3e-3."""
Given = dict[str, Tensor]
Call = Callable[[Any, Given], tuple[Tensor, Tensor]]
"""Takes bupo.ops or its reference, and inputs. Returns outputs, and a scalar that may have a
gradient."""


def inputs(shape: tuple[int, int, int], device: str) -> Given:
    tokens, width, vocab = shape
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    return {
        "hidden": normal(tokens, width).bfloat16().requires_grad_(),
        "weight": (normal(vocab, width) * (4 / width**0.5)).bfloat16().requires_grad_(),
        "targets": torch.randint(vocab, (tokens,), generator=g, device=device),
        "bias": normal(vocab).bfloat16().requires_grad_(),
        "temperature": torch.linspace(0.5, 2, tokens, device=device),
        "old_logprobs": -8 - normal(tokens).abs(),
        "advantages": normal(tokens) * (normal(tokens) > 0),  # a share of them has no gradient
        "token_weights": (normal(tokens) < 1).float() / tokens,
    }


def select(given: Given, names: str) -> Given:
    return {name: given[name] for name in names.split()}


def forward(module: Any, given: Given, names: str = "") -> tuple[Tensor, Tensor]:
    """Some targets are -100: these tokens have no log-prob, but an entropy."""
    targets = given["targets"].clone()
    targets[::3] = -100
    with torch.no_grad():
        return backward(module, given | {"targets": targets}, names)


def backward(module: Any, given: Given, names: str = "", **options: Any) -> tuple[Tensor, Tensor]:
    out = module.lm_head_logprobs(**select(given, f"hidden weight targets {names}"), **options)
    total = (out.logprobs * given["advantages"]).sum()
    if names or options:
        total = (out.logprobs - 0.3 * out.entropy).mean()
    return torch.stack([out.logprobs, out.entropy]), total


def policy_loss(
    module: Any, given: Given, names: str = "", **options: Any
) -> tuple[Tensor, Tensor]:
    names = f"hidden weight targets old_logprobs advantages token_weights {names}"
    result = module.policy_loss(**select(given, names), **options)
    return result.loss, result.loss * 3


def in_chunks(module: Any, given: Given) -> tuple[Tensor, Tensor]:
    """dW is the sum of several products."""
    ops.set_workspace_bytes(1 << 20)
    try:
        return policy_loss(module, given)
    finally:
        ops.set_workspace_bytes(None)


CALLS: dict[str, Call] = {
    "forward": forward,
    "forward with bias": functools.partial(forward, names="bias"),
    "backward": backward,
    "backward of entropy with bias": functools.partial(backward, names="bias"),
    "backward of entropy with softcap": functools.partial(backward, softcap=20.0),
    "policy_loss": policy_loss,
    "policy_loss with bias and temperature": functools.partial(
        policy_loss, names="bias temperature", entropy_coef=0.01
    ),
    "policy_loss with softcap": functools.partial(policy_loss, softcap=20.0),
    "policy_loss in chunks": in_chunks,
}


def results(call: Call, module: Any, given: Given) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs of a call, and the gradients of its inputs."""
    outputs, total = call(module, given)
    if total.requires_grad:
        total.backward()
    grads = {name: x.grad for name, x in given.items() if x.grad is not None}
    return outputs.detach(), grads


def compare(call: Call, device: str) -> str:
    """Returns what is wrong, or ""."""
    outputs, gradients = results(call, ops, inputs(SHAPE, device))
    given = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs(SHAPE, device).items()
    }
    truth, exact = results(call, ops.reference, given)
    error = float((outputs - truth).abs().max())
    if not error <= LIMIT["output"]:
        return f"outputs are off by {error:.1e} nats"
    for name in exact:
        error = relative_error(gradients[name], exact[name])
        if not error <= LIMIT["gradient"]:
            return f"the gradient of {name} is off by {error:.1e} of its norm"
    return ""


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
    for name, call in CALLS.items():
        print(f"{args.kernels}, {name}: begins", flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            why = compare(call, args.device)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        faulthandler.cancel_dump_traceback_later()
        print(f"{args.kernels}, {name}: {why or 'right'}", flush=True)
        wrong += bool(why)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
