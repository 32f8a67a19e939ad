"""Decomposes a forward into what each layer's attention and FFN read and write.

    H^l = H^0 + sum_{i<=l} A^i + sum_{i<=l} F^i          (arXiv 2512.19673, section 2)

A^l and F^l are what the modules add to the residual stream, including the effect of a norm after
the module (Gemma, OLMo 2), of a residual multiplier (Granite) and of a residual that the module
adds itself (BLOOM). They are found by comparing tensors, not by the family's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bupo.policy import decoder_stack

ATTENTION = re.compile(r"attn|attention|mixer|linear_att", re.IGNORECASE)
FFN = re.compile(r"mlp|ffn|feed_?forward|moe|fc1", re.IGNORECASE)
NORM = re.compile(r"norm|^ln", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """The tensors that layer l read and wrote, each [B, T, D]."""

    index: int
    """l, counted from 1"""
    before: Tensor
    """H^{l-1}"""
    attention_input: Tensor
    """The input of attention, after a norm if there is one before it"""
    attention: Tensor
    """A^l"""
    ffn_input: Tensor
    ffn: Tensor
    """F^l"""
    after: Tensor
    """H^l"""
    parallel: bool
    """Whether attention and FFN read the same H^{l-1}; otherwise the FFN reads H^{l-1} + A^l"""
    error: float
    """|H^{l-1} + A^l + F^l - H^l| / |H^l|, Frobenius norms; at most the rounding of its dtype"""

    @property
    def ffn_stream(self) -> Tensor:
        """The residual stream that the FFN reads from."""
        return self.before if self.parallel else self.before + self.attention


class DecompositionError(ValueError):
    """Raised for a family whose layers cannot be decomposed; the message says which and why."""


@dataclass
class _Call:
    name: str
    source: Tensor
    result: Tensor
    value: Tensor
    """A copy of the result, because Falcon adds to its FFN's output in place"""


@dataclass
class _Trace:
    """The calls of one layer's direct children, in order."""

    before: Tensor | None = None
    calls: list[_Call] = field(default_factory=list)


@contextmanager
def decomposed(model: nn.Module, visit: Callable[[Layer], None]) -> Iterator[None]:
    """Inside, every forward of the model calls visit(Layer) at the end of each layer.

    Nothing is kept, so memory is that of one layer. Use torch.no_grad() and model.eval(); a cache
    of keys is allowed. Errors: DecompositionError naming family and layer; else those of
    bupo.policy.
    """
    layers = decoder_stack(model).layers
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    with ExitStack() as hooks:
        for index, layer in enumerate(layers, start=1):
            _watch(hooks, layer, index, f"model of family {family!r}, layer {index}", visit)
        yield


def _watch(
    hooks: ExitStack, layer: nn.Module, index: int, where: str, visit: Callable[[Layer], None]
) -> None:
    trace = _Trace()

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        trace.before, trace.calls = first_tensor(args, kwargs), []

    def call(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        source, result = first_tensor(args, kwargs), first_tensor((output,), {})
        if source is not None and result is not None:
            value = result.clone() if name in ("attention", "ffn") else result
            trace.calls.append(_Call(name, source, result, value))

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        after = first_tensor((output,), {})
        if trace.before is None or after is None:
            raise DecompositionError(f"{where}: no hidden states in its input or in its output")
        visit(_take_apart(trace, after, index, where))
        trace.before, trace.calls = None, []

    hooks.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
    for name, child in layer.named_children():
        note = partial(call, _label(name, child))
        hooks.callback(child.register_forward_hook(note, with_kwargs=True).remove)
    hooks.callback(layer.register_forward_hook(end, with_kwargs=True).remove)


def _label(name: str, child: nn.Module) -> str:
    """Returns the kind of a child module. Norms are recognised first, because the name
    `post_attention_layernorm` contains "attention"."""
    if NORM.search(name) or NORM.search(type(child).__name__):
        return "norm"
    for label, pattern in (("attention", ATTENTION), ("ffn", FFN)):
        if pattern.search(name) or pattern.search(type(child).__name__):
            return label
    return "other"


def first_tensor(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the hidden states among a call's arguments or in its output."""
    for x in (*args, *kwargs.values()):
        while isinstance(x, (tuple, list)) and x:
            x = x[0]
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2:
            return x
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same one, perhaps in another shape."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel())


def rounding(dtype: torch.dtype) -> float:
    """Returns the largest relative error allowed for a sum of writes in a model of this dtype:
    64 eps, or 8 eps in 16 bits, where 64 eps would be half of the sum."""
    info = torch.finfo(dtype)
    return (8 if info.bits == 16 else 64) * info.eps


def _take_apart(trace: _Trace, after: Tensor, index: int, where: str) -> Layer:
    before = trace.before
    assert before is not None
    attention = next((c for c in trace.calls if c.name == "attention"), None)
    ffn = next((c for c in trace.calls if c.name == "ffn"), None)
    if attention is None or ffn is None:
        missing = "attention" if attention is None else "FFN"
        seen = ", ".join(c.name for c in trace.calls) or "none"
        raise DecompositionError(f"{where}: found no {missing} among its modules (calls: {seen})")
    # The FFN reads the stream through a norm where one feeds it, else directly.
    norms = [c for c in trace.calls if c.name == "norm"]
    read_by_ffn = next((n.source for n in norms if _same(n.result, ffn.source)), ffn.source)
    read_by_ffn = read_by_ffn.reshape(before.shape)
    parallel = _same(read_by_ffn, before)
    if parallel:  # the stream changes by both writes at once, so use the modules' own outputs
        wrote, fed = (_outputs(c, norms)[0].reshape(before.shape) for c in (attention, ffn))
    else:
        wrote = _written(attention, norms, read_by_ffn - before)
        fed = _written(ffn, norms, after - read_by_ffn)
    rebuilt = before.double() + wrote.double() + fed.double()
    error = float((rebuilt - after.double()).norm() / after.double().norm().clamp(min=1e-30))
    if not error <= rounding(after.dtype):
        raise DecompositionError(
            f"{where}: expected H^(l-1) + A^l + F^l = H^l, got a relative error of {error:.1e}"
        )
    return Layer(
        index,
        before,
        attention.source.reshape(before.shape),
        wrote,
        ffn.source.reshape(before.shape),
        fed,
        after,
        parallel,
        error,
    )


def _outputs(call: _Call, norms: list[_Call]) -> list[Tensor]:
    """Returns the output of each norm that reads a module's output, then the module's own."""
    return [n.result for n in norms if _same(n.source, call.result)] + [call.value]


def _written(call: _Call, norms: list[_Call], change: Tensor) -> Tensor:
    """Returns what a module adds to the stream, given the change of the stream.

    It is the module's output, times a factor if the family has one, because in 16 bits the change
    of a large stream would be mostly rounding. If no output matches, it is the change itself:
    BLOOM's modules add the residual themselves, and OPT's FFN consists of three modules.
    """
    change = change.double()
    for output in _outputs(call, norms):
        if output.numel() != change.numel():
            continue
        output = output.reshape(change.shape)
        x = output.double()
        factor = float((x * change).sum() / (x * x).sum().clamp(min=1e-300))
        if factor > 0 and (x * factor - change).norm() <= 1e-2 * change.norm():
            return output if abs(factor - 1) < 1e-2 else output * factor
    return change.to(call.result.dtype)
