"""Checks and reshapes the arguments that both ops share."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from bupo.ops.registration import accumulator, build_info

DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "meta": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
_DEVICES = (*build_info()["devices"], "meta")


class Operands(NamedTuple):
    """The LM head's arguments in the form that the operators take, with tokens flattened to N."""

    hidden: Tensor
    """[N, D]"""
    weight: Tensor
    """[V, D]"""
    targets: Tensor
    """int64 [N]"""
    bias: Tensor | None
    """[V]"""
    temperature: Tensor | None
    """[N], or None for 1"""
    softcap: float
    """0 for no softcap"""


def describe(x: object) -> str:
    """Describes an argument for an error message."""
    if isinstance(x, Tensor):
        return (
            f"{str(x.dtype).removeprefix('torch.')} tensor of shape {list(x.shape)} on {x.device}"
        )
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def number(op: str, name: str, x: object, or_none: str = "") -> float:
    """Returns a number of Python, numpy, or a tensor without dimensions, as a float. Raises
    TypeError."""
    if isinstance(x, Tensor) and x.dim() == 0 and x.dtype != torch.bool and not x.requires_grad:
        return float(x)
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number{or_none}, got {describe(x)}")
    return float(x)


def per_token(
    op: str, name: str, x: object, targets: Tensor, dtype: torch.dtype, shape: str = "targets"
) -> Tensor:
    """Checks a tensor with the shape of targets, which is that of `shape` to the
    user, and returns it flattened and detached, in `dtype`.
    Raises TypeError and ValueError."""
    _refuse_forward_mode(op, (name, x))
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a float tensor, got {describe(x)}")
    if not x.is_floating_point() and x.dtype not in (torch.bool, torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be a float tensor, got {describe(x)}")
    if x.shape != targets.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {shape} {list(targets.shape)}, got {describe(x)}"
        )
    if x.device != targets.device:
        raise ValueError(f"{op}: {name} must be on {targets.device}, got {describe(x)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} is not differentiable, pass {name}.detach()")
    return x.detach().reshape(-1).to(dtype).contiguous()


def _refuse_forward_mode(op: str, *tensors: tuple[str, object]) -> None:
    """Raises NotImplementedError for tensors with a forward-mode tangent. torch.library's operators
    have no forward-mode derivative, and torch would silently take it to be 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name, x in tensors:
        if not isinstance(x, Tensor):
            continue
        if forward_ad.unpack_dual(x, level=0).tangent is not None:
            raise NotImplementedError(
                f"{op}: {name} has a forward-mode tangent (torch.func.jvp, jacfwd, dual tensors), "
                "which is not supported: use reverse mode, or bupo.ops.reference.lm_head_logprobs"
            )


def _matrix(op: str, name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {describe(x)}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{op}: {name} is a DTensor; gather it once with {name}.full_tensor() before the call, "
            f"or pass {name}.to_local() and group="
        )
    if x.device.type not in _DEVICES:
        cuda = ". Reinstall it with BUPO_CUDA=ON in the environment and nvcc on the PATH"
        raise ValueError(
            f"{op}: {name} is on {x.device}; this build of bupo runs on {', '.join(_DEVICES[:-1])} "
            f"(see bupo.ops.build_info()){cuda if x.is_cuda else ''}"
        )
    return x


def _temperature(
    op: str, temperature: object, targets: Tensor, dtype: torch.dtype
) -> Tensor | None:
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError(f"{op}: temperature is not differentiable, pass temperature.detach()")
        try:
            full = temperature.to(targets.device, dtype).expand(targets.shape)
        except RuntimeError:
            raise ValueError(
                f"{op}: temperature must be a number or broadcast to the shape of targets "
                f"{list(targets.shape)}, got {describe(temperature)}"
            ) from None
        return full.reshape(-1).contiguous()
    temperature = number(op, "temperature", temperature, " or a tensor")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")
    if temperature == 1:
        return None
    return torch.full((targets.numel(),), temperature, dtype=dtype, device=targets.device)


def _same_dtype(op: str, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if hidden.dtype != torch.float64:
            return hidden.to(dtype), weight.to(dtype)
    if hidden.dtype == torch.bfloat16 and weight.dtype == torch.float32:
        return hidden.float(), weight  # exact, and small compared with the weight
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{op}: hidden and weight must have one dtype (or bfloat16 hidden with float32 weight)"
            f", got {hidden.dtype} and {weight.dtype}: cast with hidden.to(weight.dtype)"
        )
    return hidden, weight


def prepare(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    divided: bool = False,
) -> Operands:
    """Checks everything that does not need the tensors' values, and returns the operands. divided:
    weight may have no rows, as other ranks have some. Raises TypeError, ValueError and
    NotImplementedError, naming the argument."""
    given = ("hidden", hidden), ("weight", weight), ("bias", bias), ("temperature", temperature)
    _refuse_forward_mode(op, *given)
    hidden, weight = _matrix(op, "hidden", hidden), _matrix(op, "weight", weight)
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: targets must be an int64 tensor, got {describe(targets)}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [V, D], got {describe(weight)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[1] == 0:
        raise ValueError(
            f"{op}: hidden must be [..., D] with D = {weight.shape[1]} > 0 as in weight "
            f"{list(weight.shape)}, got {describe(hidden)}"
        )
    if weight.shape[0] == 0 and not divided:
        raise ValueError(f"{op}: weight must have at least one row, got {describe(weight)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: targets must have the shape of hidden without its last dimension "
            f"{list(hidden.shape[:-1])}, got {describe(targets)}"
        )
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor or None, got {describe(bias)}")
    for name, x in (("weight", weight), ("targets", targets), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{op}: {name} must be on {hidden.device}, got {describe(x)}")
    hidden, weight = _same_dtype(op, hidden, weight)
    supported = DTYPES[hidden.device.type]
    if hidden.dtype not in supported:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in supported)
        raise TypeError(
            f"{op}: hidden on {hidden.device.type} must be {', '.join(others)} or {last}, "
            f"got {hidden.dtype}"
        )
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {describe(bias)}")
        bias = bias.to(weight.dtype).contiguous()
    if softcap is not None:
        softcap = number(op, "softcap", softcap, " or None")
    if softcap is not None and not 0 < softcap <= torch.finfo(accumulator(hidden.dtype)).max:
        raise ValueError(f"{op}: softcap must be positive and finite or None, got {softcap}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    return Operands(
        rows,
        weight,
        targets.reshape(-1).long().contiguous(),
        bias,
        _temperature(op, temperature, targets, accumulator(rows.dtype)),
        float(softcap or 0.0),
    )
