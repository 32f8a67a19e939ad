"""Loads the extension and registers its operators' fake (shape) functions and autograd with torch.

Only this file, lm_head.py, policy_loss.py and divergence.py use torch.ops.bupo.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bupo.ops.results import METRICS

try:
    from bupo import _C
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "bupo.ops: the compiled extension bupo._C cannot be loaded. Build it with `make setup`, or "
        f"`pip install --no-build-isolation -e .` in the environment of this torch. ({error})"
    ) from error


def build_info() -> dict[str, Any]:
    """Returns how the extension was built and what it can run.

    Keys: ``version``; ``cuda``, the build mode (OFF, CHECK, ON); ``archs``, the CUDA architectures;
    ``torch_target``, the oldest torch it runs on; ``devices``, those with an implementation;
    ``cpu_products``, for float32 and bfloat16: "block" (oneDNN's block product, which needs AVX-512
    and, for bfloat16, AVX512_BF16; bfloat16 calls with an odd width do not use it) or "library"
    (torch's BLAS in float32, slower);
    ``cpu_vectors``, the vector width in bits of the other CPU code; ``workspace_bytes``, see
    `set_workspace_bytes`, 0 for its default; ``cuda_kernels``, see `set_cuda_kernels`.
    """
    return dict(_C.build_info())


def set_workspace_bytes(size: int | None) -> None:
    """Sets the workspace of a CUDA op in bytes, in addition to its results.

    None, the default, stands for a quarter of the memory that is free on the GPU when the first op
    runs there, rounded down to a power of two, at least 256 MiB and at most 4 GiB. It does not
    change afterwards, but it may differ between processes, and with it the number of chunks and the
    rounding of dW. Set a number if two runs must agree to the last bit.

    More memory means fewer, larger chunks of tokens. At least 128 rows of logits are always taken.
    Two things are added to the budget: a float32 accumulator of the size of dW, always for float16
    weights, and for bfloat16 weights if there is more than one chunk (a single chunk is used if it
    fits into budget plus accumulator); and the logits that lm_head_logprobs keeps from its forward
    for its backward, which take at most the budget once more. CPU ops do not use a budget.

    Raises:
        TypeError, ValueError: size is neither None nor a positive int.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        raise TypeError(f"bupo.ops.set_workspace_bytes: size must be an int or None, got {size!r}")
    if size is not None and size <= 0:
        raise ValueError(f"bupo.ops.set_workspace_bytes: size must be positive, got {size}")
    _C.set_workspace_bytes(size or 0)


CUDA_KERNELS = ("auto", "portable", "sm90_cooperative", "sm90_pingpong")


def set_cuda_kernels(name: str) -> None:
    """Sets the kernels for CUDA calls, to compare them or to avoid one that fails.

    ``auto``, the default, takes the best kernel that supports a call. ``portable`` runs on every
    GPU from sm_80 on. ``sm90_cooperative`` and ``sm90_pingpong`` are two schedules of the Hopper
    kernel; a call that it does not support still takes the portable kernel. docs/ops.md lists these
    calls. The environment variable ``BUPO_CUDA_KERNELS`` sets the name when bupo.ops is imported.

    Raises:
        ValueError: name is none of these.
    """
    if name not in CUDA_KERNELS:
        raise ValueError(
            f"bupo.ops.set_cuda_kernels: name must be one of {', '.join(CUDA_KERNELS)}, "
            f"got {name!r}"
        )
    _C.set_cuda_kernels(name)


if "BUPO_CUDA_KERNELS" in os.environ:
    set_cuda_kernels(os.environ["BUPO_CUDA_KERNELS"])


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Returns op(*args). Raises what the extension cannot throw itself, because it is built on
    torch's stable interface: torch.OutOfMemoryError if the GPU has no memory left, and with torch
    2.15 the ValueError of an argument, which is named after the op."""
    if torch.compiler.is_compiling():
        return op(*args)
    if transforms_active():
        op = _TRANSFORMABLE.get(op, op)
    try:
        return op(*args)
    except RuntimeError as error:
        if "bupo.ops: out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        if str(error).startswith("bupo.ops."):
            raise ValueError(str(error)) from None
        raise


def transforms_active() -> bool:
    """Returns whether this runs within torch.func.grad, vjp, vmap or another of their kind."""
    return bool(torch._C._are_functorch_transforms_active())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of per-token results for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    acc = accumulator(hidden.dtype)
    per_token = (hidden.new_empty(targets.shape, dtype=acc) for _ in range(3))
    # A GPU keeps logits within the budget, but under torch.compile lm_head.py asks for none.
    return (*per_token, hidden.new_empty((0,), dtype=torch.uint8))


def _fake_grads(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = hidden.shape[1]
    return (
        hidden.new_empty((hidden.shape[0] if need_hidden else 0, width)),
        hidden.new_empty((weight.shape[0] if need_weight else 0, width)),
        hidden.new_empty((weight.shape[0] if need_bias else 0,)),
    )


def _fake_logprobs_backward(*args: Any) -> tuple[Tensor, ...]:
    hidden, weight = args[3:5]
    return _fake_grads(hidden, weight, *args[-3:])


def _fake_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    acc = accumulator(hidden.dtype)
    per_token = (hidden.new_empty(targets.shape, dtype=acc) for _ in range(2))
    metrics = hidden.new_empty((len(METRICS),), dtype=acc)
    grads = _fake_grads(hidden, weight, *args[-3:])
    losses = hidden.new_empty(targets.shape, dtype=acc)
    return (hidden.new_empty((), dtype=acc), *per_token, metrics, losses, *grads)


def _fake_divergence(*args: Any) -> tuple[Tensor, ...]:
    hidden, weight, teacher_hidden, teacher_weight, needs = (args[k] for k in (0, 1, 5, 6, -1))
    acc = accumulator(hidden.dtype)
    results = hidden.new_empty((), dtype=acc), hidden.new_empty(hidden.shape[:1], dtype=acc)
    teacher = _fake_grads(teacher_hidden, teacher_weight, *needs[3:])
    return (*results, *_fake_grads(hidden, weight, *needs[:3]), *teacher)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Adds a @ b to total, accumulating in total's float32 within the product. The extension calls
    this function because addmm takes numbers, which torch's stable interface cannot pass."""
    if a.dtype == total.dtype:
        return torch.addmm(total, a, b, out=total)
    return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


torch.library.define("bupo::add_product_", "(Tensor(a!) total, Tensor a, Tensor b) -> Tensor(a!)")
torch.library.impl("bupo::add_product_", "cuda", _add_product)
torch.library.register_fake("bupo::lm_head_logprobs", _fake_logprobs)
torch.library.register_fake("bupo::lm_head_logprobs_backward", _fake_logprobs_backward)
torch.library.register_fake("bupo::policy_loss", _fake_policy_loss)
torch.library.register_fake("bupo::lm_head_divergence", _fake_divergence)


def _double_backward(op: str) -> RuntimeError:
    return RuntimeError(
        f"bupo.ops.{op}: double backward is not supported (create_graph=True). "
        f"bupo.ops.reference.{op} supports it."
    )


def _refuse_double_backward(ctx: Any, op: str) -> None:
    # torch.func always makes a graph of the backward; there _Once refuses to go back through it.
    if torch.is_grad_enabled() and not ctx.transforms:
        raise _double_backward(op)


def _save_logprobs(
    ctx: Any, inputs: tuple[Any, ...], output: Any, transforms: bool = False
) -> None:
    ctx.transforms = transforms
    hidden, weight, targets, bias, temperature, ctx.softcap, ctx.ignore_index, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, temperature, output[3])
    ctx.set_materialize_grads(False)


def _backward_logprobs(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_double_backward(ctx, "lm_head_logprobs")
    if all(g is None for g in upstream):
        return (None,) * 8
    saved = ctx.saved_tensors  # read once, as checkpointing unpacks a tensor only once
    grads = (None if g is None else g.contiguous() for g in upstream[:3])
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    op, once = torch.ops.bupo.lm_head_logprobs_backward, (_Once.apply, "lm_head_logprobs")
    given = (*(once if ctx.transforms else ()), op, *grads, *saved)
    d_hidden, d_weight, d_bias = call(*given, ctx.softcap, ctx.ignore_index, *needs)
    picked = [g if need else None for g, need in zip((d_hidden, d_weight, d_bias), needs)]
    return picked[0], picked[1], None, picked[2], None, None, None, None


torch.library.register_autograd(
    "bupo::lm_head_logprobs", _backward_logprobs, setup_context=_save_logprobs
)


def _save_policy(ctx: Any, inputs: tuple[Any, ...], output: Any, transforms: bool = False) -> None:
    _save_grads(ctx, inputs[-3:], output[5:], transforms)


def _save_divergence(
    ctx: Any, inputs: tuple[Any, ...], output: Any, transforms: bool = False
) -> None:
    _save_grads(ctx, inputs[-1], output[2:], transforms)


def _save_grads(ctx: Any, needs: Any, grads: Any, transforms: bool) -> None:
    """Of an op that computes its gradients in the forward."""
    ctx.transforms, ctx.needs = transforms, tuple(needs)
    ctx.save_for_backward(*grads)
    ctx.set_materialize_grads(False)


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """Returns scale * grad, computed in place if the graph is freed by this backward: dW is often
    the largest tensor of a step, and a copy would double the op's memory. A scale of 1 is skipped;
    on a GPU the device checks for it, since the host would have to wait."""
    if type(grad) is not Tensor or torch.compiler.is_compiling():
        return grad * scale
    if torch._C._functorch.is_legacy_batchedtensor(scale):  # is_grads_batched
        return grad * scale
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return grad * scale
    if grad.device.type == "cuda":
        torch.ops.bupo.scale_(grad, scale)
        return grad
    if scale.device.type == "cpu" and scale.item() == 1:
        return grad
    return grad.mul_(scale)


def _scaled_grads(ctx: Any, op: str, grad_loss: Tensor | None) -> list[Tensor | None]:
    """Returns the gradients that the forward has computed, times that of the loss."""
    _refuse_double_backward(ctx, op)
    if grad_loss is None:
        return [None] * len(ctx.needs)
    found: list[Tensor | None] = []
    for grad, need in zip(ctx.saved_tensors, ctx.needs):
        if need and ctx.transforms:
            scaled = _Once.apply(op, torch.mul, grad, grad_loss)  # type: ignore[no-untyped-call]
            found.append(scaled)
        else:
            found.append(_scaled(grad.detach(), grad_loss) if need else None)
    return found


def _backward_policy(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = _scaled_grads(ctx, "policy_loss", grad_loss)
    return hidden, weight, *(None,) * 4, bias, *(None,) * 10


def _backward_divergence(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    found = _scaled_grads(ctx, "lm_head_divergence", grad_loss)
    return *found[:3], None, None, *found[3:], *(None,) * 6


torch.library.register_autograd("bupo::policy_loss", _backward_policy, setup_context=_save_policy)
torch.library.register_autograd(
    "bupo::lm_head_divergence", _backward_divergence, setup_context=_save_divergence
)


# ---- torch.func, whose transforms need another kind of autograd function than register_autograd
# makes: one with setup_context


class _Transformable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "bupo.ops: forward mode over reverse mode (torch.func.hessian) is not supported: use "
            "bupo.ops.reference"
        )


class _Logprobs(_Transformable):
    forward = staticmethod(torch.ops.bupo.lm_head_logprobs)
    setup_context = staticmethod(partial(_save_logprobs, transforms=True))
    backward = staticmethod(_backward_logprobs)


class _PolicyLoss(_Transformable):
    forward = staticmethod(torch.ops.bupo.policy_loss)
    setup_context = staticmethod(partial(_save_policy, transforms=True))
    backward = staticmethod(_backward_policy)


class _Divergence(_Transformable):
    forward = staticmethod(torch.ops.bupo.lm_head_divergence)
    setup_context = staticmethod(partial(_save_divergence, transforms=True))
    backward = staticmethod(_backward_divergence)


class _Once(_Transformable):
    """A part of the backward of bupo.ops.NAME: function(*args), which has no derivative itself."""

    @staticmethod
    def forward(name: str, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise _double_backward(ctx.name)


_TRANSFORMABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.bupo.lm_head_logprobs: _Logprobs.apply,
    torch.ops.bupo.policy_loss: _PolicyLoss.apply,
    torch.ops.bupo.lm_head_divergence: _Divergence.apply,
}
