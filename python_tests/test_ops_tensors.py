"""Both LM-head ops as tensors meet them: layouts, dtypes, torch.compile and other systems."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from on_device import DEVICE
from ops_samples import RecordBupo, assert_same, each_dtype, each_op, small
from sample_inputs import (
    OPS,
    Sample,
    evaluate,
    objective,
    sample,
    sample_inputs,
)
from torch import Tensor

import bupo.ops as ops

# ---- layouts -----------------------------------------------------------------------------------


def matrix_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views equal to x whose memory is arranged otherwise, with nan in between."""

    def holder(*shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=x.dtype)

    *lead, width = x.shape
    offset = holder(x.numel() + 3)[3:].view(x.shape)
    wide = holder(*lead, width + 5)[..., 1 : width + 1]
    every_second = holder(*lead[:-1], 2 * lead[-1], width)[..., ::2, :]
    inner_stride = holder(*lead, 3 * width)[..., ::3]
    columns = holder(width, *lead).movedim(0, -1)
    for name, view in locals().items():
        if name in ("offset", "wide", "every_second", "inner_stride", "columns"):
            view.copy_(x)
            yield name, view


@each_op
@each_dtype
@pytest.mark.parametrize("argument", ["hidden", "weight"])
def test_memory_layout_of_matrices(argument: str, op: str, dtype: torch.dtype) -> None:
    call = small(op, dtype)
    expected = evaluate(ops, call).results
    for name, view in matrix_layouts(call.arguments[argument]):
        leaf = view.detach().requires_grad_()
        assert leaf.stride() == view.stride()
        result = call.call(**{argument: leaf})
        objective(result).backward()
        got = {k: x.detach() for k, x in result._asdict().items() if isinstance(x, Tensor)}
        got[f"d {argument}"] = leaf.grad
        assert_same(got, {k: expected[k] for k in got}, f"{argument} {name}")


@each_op
@each_dtype
def test_expanded_matrices(op: str, dtype: torch.dtype) -> None:
    """Stride 0 between rows: all tokens share a hidden state, all entries share a weight row."""
    call = small(op, dtype)
    hidden, weight = call.arguments["hidden"], call.arguments["weight"]
    for name, x in {
        "hidden": hidden[:1, :1].expand_as(hidden),
        "weight": weight[:1].expand_as(weight),
    }.items():
        assert 0 in x.stride()
        results = []
        for copy in (x, x.contiguous()):
            leaf = copy.detach().requires_grad_()
            result = call.call(**{name: leaf})
            objective(result).backward()
            results.append({"grad": leaf.grad, "logprobs": result.logprobs.detach()})
        assert_same(*results, f"expanded {name}")


@each_op
def test_memory_layout_of_per_token_tensors(op: str) -> None:
    call = sample(op, "temperature per token" if op == OPS[0] else "every term").to(torch.float32)
    expected = evaluate(ops, call).results
    per_token = {
        name: x
        for name, x in call.arguments.items()
        if isinstance(x, Tensor) and x.shape == call.arguments["targets"].shape
    }
    assert len(per_token) == (2 if op == OPS[0] else 6)
    transposed = {name: x.T.contiguous().T for name, x in per_token.items()}
    strided = {name: torch.stack([x, 0 * x], -1)[..., 0] for name, x in per_token.items()}
    for layout in (transposed, strided):
        assert not any(x.is_contiguous() for x in layout.values())
        got = evaluate(ops, call.but(**layout)).results
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@each_op
def test_strided_bias(op: str) -> None:
    call = small(op)
    bias = torch.stack([call.arguments["bias"], torch.zeros(150)], -1)[:, 0].requires_grad_()
    assert bias.stride() == (2,)
    expected = evaluate(ops, call).results
    (grad,) = torch.autograd.grad(objective(call.call(bias=bias)), bias)
    assert torch.equal(grad, expected["d bias"])


@each_op
@each_dtype
def test_int32_targets(op: str, dtype: torch.dtype) -> None:
    call = small(op, dtype)
    expected = evaluate(ops, call).results
    got = evaluate(ops, call.but(targets=call.arguments["targets"].int())).results
    assert all(torch.equal(got[name], expected[name]) for name in expected)


# ---- dtypes ------------------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_equals_explicit_casts(op: str, dtype: torch.dtype) -> None:
    call = small(op, dtype)
    leaves = call.leaves()
    with torch.autocast(DEVICE, torch.bfloat16):
        result = call.call(**leaves)
    objective(result).backward()
    expected = evaluate(ops, call.to(torch.bfloat16)).results
    assert torch.equal(result.logprobs, expected["logprobs"])
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == dtype
        assert torch.equal(leaf.grad, expected[f"d {name}"].to(dtype)), name


@each_op
def test_autocast_leaves_float64_alone(op: str) -> None:
    call = small(op, torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(call.call().logprobs, call.call().logprobs)
        inside = call.call()
    assert inside.logprobs.dtype == torch.float64
    assert torch.equal(inside.logprobs, call.call().logprobs)


@each_op
def test_bfloat16_hidden_with_float32_weight_is_float32(op: str) -> None:
    call = small(op)
    hidden = call.arguments["hidden"].bfloat16().requires_grad_()
    weight = call.arguments["weight"].clone().requires_grad_()
    result = call.call(hidden=hidden, weight=weight)
    objective(result).backward()
    expected = evaluate(ops, call.but(hidden=hidden.detach().float())).results
    assert torch.equal(result.logprobs, expected["logprobs"])
    assert torch.equal(weight.grad, expected["d weight"])
    assert torch.equal(hidden.grad, expected["d hidden"].bfloat16())


# ---- torch's systems ---------------------------------------------------------------------------


OPCHECKED = ("7x8x7", "one token, no dimension", "no token", "everything", "every head option")


@pytest.mark.parametrize(
    "case",
    [s for op in OPS for s in sample_inputs(op) if s.name in OPCHECKED],
    ids=lambda s: f"{s.op}-{s.name}",
)
def test_opcheck(case: Sample) -> None:
    """Schema, autograd registration, fake function and AOT dispatch of the three operators."""
    call = case.to(torch.float32)
    with RecordBupo() as record:
        objective(call.call(**call.leaves())).backward()
    names = [func.overloadpacket.__name__ for func, _ in record.calls]
    assert names == (["policy_loss"] if case.op == OPS[1] else [OPS[0], OPS[0] + "_backward"])
    for func, args in record.calls:
        fresh = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
        if func.overloadpacket.__name__ in OPS:
            names = [a.name for a in func._schema.arguments]
            for i, name in enumerate(names):
                if name in ("hidden", "weight", "bias") and fresh[i] is not None:
                    fresh[i].requires_grad_()
        torch.library.opcheck(func, tuple(fresh))


@each_op
@each_dtype
def test_shapes_without_data(op: str, dtype: torch.dtype) -> None:
    """Meta tensors and FakeTensorMode give the shapes and dtypes of the real call."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = small(op, dtype)
    expected = evaluate(ops, call).results

    def check(to_fake: Callable[[Tensor], Tensor]) -> None:
        fake = {k: to_fake(x) if isinstance(x, Tensor) else x for k, x in call.arguments.items()}
        result = evaluate(ops, call.but(**fake)).results
        for name, x in expected.items():
            assert (result[name].shape, result[name].dtype) == (x.shape, x.dtype), name

    check(lambda x: x.to("meta"))
    with FakeTensorMode() as mode:
        check(mode.from_tensor)


def compiled_step(op: str, **options: Any) -> Callable:
    """loss and gradients of a small head around the op; arguments: N, then the call's tensors."""

    def step(hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        result = getattr(ops, op)(hidden=hidden.tanh(), **arguments, **options)
        return objective(result) * 2

    return step


@each_op
@each_dtype
def test_compile_with_any_number_of_tokens(op: str, dtype: torch.dtype) -> None:
    """One graph, no break, no second compilation, for every N >= 2; same gradients as eager."""
    check_compile(op, dtype, "aot_eager", softcap=8.0)


@each_op
def test_compile_with_inductor(op: str) -> None:
    check_compile(op, torch.float32, "inductor", temperature=0.7)


def check_compile(op: str, dtype: torch.dtype, backend: str, **options: Any) -> None:
    call = sample(op, "127 rows, odd width").to(dtype)
    step = compiled_step(op, **options)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for count in (5, 9, 127):
        arguments = {
            k: x[:count] if k != "weight" else x.clone().requires_grad_()
            for k, x in call.arguments.items()
        }
        hidden = arguments.pop("hidden").clone().requires_grad_()
        inputs = [hidden, arguments["weight"]]
        expected = torch.autograd.grad(step(hidden, arguments), inputs)
        with torch._dynamo.config.patch(error_on_recompile=count > 5):
            got = torch.autograd.grad(compiled(hidden, arguments), inputs)
        for name, x, y in zip(("hidden", "weight"), got, expected, strict=True):
            assert_same({name: x}, {name: y}, f"N = {count}")


@each_op
def test_dtensor_weight_is_refused(op: str, tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        call = small(op)
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(call.arguments["weight"], mesh, [Shard(0)])
        message = rf"bupo\.ops\.{op}: weight is a DTensor.*full_tensor\(\)"
        with pytest.raises(TypeError, match=message):
            call.call(weight=weight)
        assert torch.equal(call.call(weight=weight.full_tensor()).logprobs, call.call().logprobs)
    finally:
        dist.destroy_process_group()
