"""Both LM-head ops as tensors meet them: layouts, dtypes, autograd, torch.compile, errors."""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from on_device import DEVICE
from sample_inputs import (
    DTYPES,
    OPS,
    Sample,
    evaluate,
    head,
    objective,
    sample,
    sample_inputs,
    with_policy,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bupo.ops as ops
from bupo.ops.registration import CUDA_KERNELS

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


# ---- autograd ----------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["logprobs", "entropy", "logsumexp"])
def test_gradient_of_one_output_alone(output: str) -> None:
    """The other outputs' upstream gradients are None, and this one's has stride 0."""
    call = small("lm_head_logprobs", torch.float64)
    grads = []
    for module in (ops, ops.reference):
        leaves = call.leaves()
        getattr(call.call(module, **leaves), output).sum().backward()
        grads.append({name: leaf.grad for name, leaf in leaves.items()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-12, atol=1e-13)


@each_op
@pytest.mark.parametrize(
    "frozen",
    [("weight", "bias"), ("hidden",), ("bias",), ("hidden", "bias"), ("hidden", "weight")],
    ids=" and ".join,
)
def test_frozen_operands_get_no_gradient_and_cost_none(op: str, frozen: tuple[str, ...]) -> None:
    """The others' gradients are those of the full call; nothing of a frozen one's size is made."""
    call = small(op)
    full = evaluate(ops, call).results
    leaves = call.leaves()
    for name in frozen:
        leaves[name].requires_grad_(False)
    with RecordBupo() as record:
        objective(call.call(**leaves)).backward()
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None, name
        else:
            assert torch.equal(leaf.grad, full[f"d {name}"]), name
    made = dict(zip(("hidden", "weight", "bias"), record.outputs[-1][-3:], strict=True))
    for name, grad in made.items():
        assert (grad.numel() == 0) == (name in frozen), name


@each_op
def test_everything_frozen(op: str) -> None:
    call = small(op)
    with RecordBupo() as record:
        result = call.call()
    assert not objective(result).requires_grad
    assert len(record.outputs) == 1
    if op == "policy_loss":
        assert all(x.numel() == 0 for x in record.outputs[0][-3:])
    assert torch.equal(result.logprobs, evaluate(ops, call).results["logprobs"])


@each_op
@each_dtype
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode(op: str, dtype: torch.dtype, mode: Callable) -> None:
    expected = evaluate(ops, small(op, dtype)).results
    with mode(), RecordBupo() as record:
        call = small(op, dtype)  # in inference mode its tensors are inference tensors
        result = call.call(**call.leaves())
    assert result.logprobs.is_inference() == (mode is torch.inference_mode)
    assert not objective(result).requires_grad
    assert torch.equal(result.logprobs, expected["logprobs"])
    if op == "policy_loss":
        assert torch.equal(result.loss, expected["loss"])
        assert all(x.numel() == 0 for x in record.outputs[0][-3:])


@each_op
@each_dtype
@pytest.mark.parametrize("scale", [1.0, 8.0, 0.3])
def test_three_backward_calls_add_up(scale: float, op: str, dtype: torch.dtype) -> None:
    call = small(op, dtype)
    leaves = call.leaves()
    loss = objective(call.call(**leaves)) * scale
    loss.backward(retain_graph=True)
    first = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    loss.backward(retain_graph=True)
    loss.backward()
    for name, leaf in leaves.items():
        g = first[name]
        assert torch.equal(leaf.grad, g + g + g), name
        assert g.any(), name


@each_op
def test_zeroing_gradients_in_place_between_backward_calls(op: str) -> None:
    call = small(op)
    leaves = call.leaves()
    loss = objective(call.call(**leaves))
    expected = gradients(call)
    for last in (False, False, True):
        loss.backward(retain_graph=not last)
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, expected[f"d {name}"]), name
            leaf.grad.zero_()


@each_op
def test_gradients_handed_out_are_not_touched_by_a_later_backward(op: str) -> None:
    call = small(op)
    leaves = call.leaves()
    loss = objective(call.call(**leaves))
    inputs = list(leaves.values())
    handed_out = torch.autograd.grad(loss, inputs, retain_graph=True)
    copies = [g.clone() for g in handed_out]
    (loss * 3).backward()
    assert all(torch.equal(g, c) for g, c in zip(handed_out, copies, strict=True))


@each_op
@each_dtype
def test_a_scaled_loss_scales_gradients_exactly(op: str, dtype: torch.dtype) -> None:
    """By a power of two, as a GradScaler does; and the unscaled graph is untouched."""
    call = small(op, dtype)
    leaves = call.leaves()
    (objective(call.call(**leaves)) * 1024).backward()
    for name, x in gradients(call).items():
        assert torch.equal(leaves[name[2:]].grad, x * 1024), name


@each_op
def test_double_backward_is_refused_by_name(op: str) -> None:
    call = small(op)
    leaves = call.leaves()
    loss = objective(call.call(**leaves))
    with pytest.raises(RuntimeError, match=rf"bupo\.ops\.{op}: double backward is not supported"):
        torch.autograd.grad(loss, list(leaves.values()), create_graph=True)


def test_a_policy_output_without_use_gives_no_gradient() -> None:
    call = small("policy_loss")
    leaves = call.leaves()
    call.call(**leaves)
    assert all(leaf.grad is None for leaf in leaves.values())


@each_op
def test_tied_weights_add_their_gradients(op: str) -> None:
    """The unembedding is the embedding too."""
    call = sample(op, "softcap").to(torch.float64)
    tokens = call.arguments["targets"].roll(1)
    grads = []
    for module in (ops, ops.reference):
        weight = call.arguments["weight"].clone().requires_grad_()
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        objective(call.call(module, hidden=hidden, weight=weight)).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


@each_op
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(op: str, reentrant: bool) -> None:
    call = small(op)
    leaves = call.leaves()

    def block(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return objective(call.call(hidden=hidden * 1.0, weight=weight, bias=bias))

    loss = checkpoint(block, *leaves.values(), use_reentrant=reentrant)
    (2 * loss).backward()
    for name, x in gradients(call).items():
        assert torch.equal(leaves[name[2:]].grad, 2 * x), name


@each_op
def test_saved_tensors_may_live_elsewhere(op: str) -> None:
    """torch.autograd.graph.save_on_cpu and the like hand other tensors to backward."""
    call = small(op)
    leaves = call.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        loss = objective(call.call(**leaves))
    loss.backward()
    for name, x in gradients(call).items():
        assert torch.equal(leaves[name[2:]].grad, x), name


def gradcheck_options(op: str) -> dict[str, dict[str, Any]]:
    """Settings whose loss is a differentiable function (cispo's stop-gradient is none)."""
    shape = (2, 4)
    g = torch.Generator().manual_seed(2)
    per_token = torch.rand(*shape, dtype=torch.float64, generator=g) + 0.5
    found: dict[str, dict[str, Any]] = {
        "plain": {},
        "softcap": {"softcap": 3.0},
        "temperature": {"softcap": 3.0, "temperature": per_token},
    }
    if op == "policy_loss":
        old = with_policy("gradcheck", head("gradcheck", shape, 5, 7))["old_logprobs"]
        found |= {
            "entropy": {"entropy_coef": 0.3, "temperature": 0.8},
            "importance": {"importance_weights": per_token, "dual_clip": 1.5},
        }
        for estimator in ("k1", "k2", "k3"):
            kl = {"ref_logprobs": old + 0.2 * per_token, "kl_coef": 0.7}
            found[estimator] = kl | {"kl_estimator": estimator}
    return found


@pytest.mark.parametrize(
    ("op", "options"), [(op, name) for op in OPS for name in gradcheck_options(op)]
)
def test_gradcheck(op: str, options: str) -> None:
    arguments = head("gradcheck", (2, 4), 5, 7, std=2.0)
    arguments["bias"] = torch.linspace(-1, 1, 7, dtype=torch.float64)
    if op == "policy_loss":
        arguments = with_policy("gradcheck", arguments)
    call = Sample(options, op, arguments | gradcheck_options(op)[options])

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        result = call.call(hidden=hidden, weight=weight, bias=bias)
        return result.loss if op == "policy_loss" else tuple(result)

    torch.autograd.gradcheck(function, list(call.leaves().values()))


# ---- torch's systems ---------------------------------------------------------------------------


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


# ---- errors ------------------------------------------------------------------------------------

WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "target below 0": (ValueError, r"targets\[1\].*\[0, 150\).*-7", {"targets": [3, -7]}),
    "target at V": (ValueError, r"targets\[0\].*\[0, 150\).*150", {"targets": [150, 3]}),
    "float targets": (TypeError, "targets.*int64.*float32", {"targets": [1.0, 2.0]}),
    "targets of another shape": (ValueError, r"targets.*\[2\].*\[3\]", {"targets": [1, 2, 3]}),
    "weight of another width": (ValueError, "hidden.*D = 23", {"weight": torch.ones(150, 23)}),
    "weight of three dimensions": (ValueError, "weight", {"weight": torch.ones(2, 150, 24)}),
    "no vocabulary": (ValueError, "weight", {"weight": torch.ones(0, 24)}),
    "no width": (ValueError, "hidden", {"weight": torch.ones(9, 0), "hidden": torch.ones(2, 0)}),
    "weight is a list": (TypeError, "weight", {"weight": [[1.0]]}),
    "hidden is a number": (TypeError, "hidden", {"hidden": 1.0}),
    "bias of another length": (ValueError, r"bias.*\[150\].*149", {"bias": torch.ones(149)}),
    "bias is a list": ((TypeError, ValueError), "bias", {"bias": [0.0] * 150}),
    "temperature 0": (ValueError, "temperature.*positive", {"temperature": 0.0}),
    "temperature nan": (ValueError, "temperature.*positive", {"temperature": math.nan}),
    "temperature tensor 0": (ValueError, "temperature", {"temperature": torch.tensor([1.0, 0.0])}),
    "temperature of another shape": (ValueError, "temperature", {"temperature": torch.ones(3)}),
    "temperature with gradient": (
        ValueError,
        "temperature.*not differentiable",
        {"temperature": torch.ones(2, requires_grad=True)},
    ),
    "temperature is text": (TypeError, "temperature", {"temperature": "1"}),
    "softcap 0": (ValueError, "softcap", {"softcap": 0.0}),
    "softcap below 0": (ValueError, "softcap", {"softcap": -1.0}),
    "softcap is text": (TypeError, "softcap", {"softcap": "30"}),
    "float16": (
        TypeError,
        "float32, float64 or bfloat16.*float16",
        {"hidden": torch.ones(2, 24).half(), "weight": torch.ones(150, 24).half()},
    ),
    "float32 hidden, bfloat16 weight": (
        TypeError,
        "float32.*bfloat16",
        {"weight": torch.ones(150, 24).bfloat16()},
    ),
    "float64 hidden, float32 weight": (
        TypeError,
        "float64",
        {"hidden": torch.ones(2, 24).double()},
    ),
    "integer hidden": (TypeError, "hidden", {"hidden": torch.ones(2, 24).long()}),
    "another device": (
        ValueError,
        f"weight.*{DEVICE}.*meta",
        {"weight": torch.ones(150, 24).to("meta")},
    ),
}
WRONG_POLICY: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "one advantage": (ValueError, r"advantages.*\[2\].*\[1\]", {"advantages": torch.ones(1)}),
    "old_logprobs is a list": (TypeError, "old_logprobs", {"old_logprobs": [0.0, 0.0]}),
    "complex weights": (TypeError, "token_weights", {"token_weights": torch.ones(2) * 1j}),
    "loss_type": (ValueError, "loss_type.*ppo, cispo.*'grpo'", {"loss_type": "grpo"}),
    "kl_estimator": (ValueError, "kl_estimator.*k1, k2, k3", {"kl_estimator": "k4"}),
    "no reference": (ValueError, "ref_logprobs.*kl_coef", {"kl_coef": 0.1}),
    "clip_low": (ValueError, "clip_low.*-0.1", {"clip_low": -0.1}),
    "clip_high": (ValueError, "clip_high.*nan", {"clip_high": math.nan}),
    "clip_high is text": (TypeError, "clip_high", {"clip_high": "0.2"}),
    "dual_clip": (ValueError, "dual_clip.*0.5", {"dual_clip": 0.5}),
    "entropy_coef": (ValueError, "entropy_coef", {"entropy_coef": math.inf}),
}


@pytest.mark.parametrize("change", [{"temperature": 1e-39}, {"softcap": 1e300}])
def test_numbers_that_float32_cannot_divide_by(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}.* must be positive and finite"):
        small("lm_head_logprobs").to(torch.float32).call(**change)


@pytest.mark.parametrize("index", [1.5, "x", True, None])
def test_ignore_index_must_be_an_integer(index: Any) -> None:
    with pytest.raises(
        TypeError, match=r"bupo\.ops\.lm_head_logprobs: ignore_index must be an int"
    ):
        small("lm_head_logprobs").call(ignore_index=index)


@pytest.mark.parametrize(
    ("op", "case"),
    [(op, name) for op in OPS for name in WRONG] + [(OPS[1], n) for n in WRONG_POLICY],
)
def test_errors_name_the_op_and_the_argument(op: str, case: str) -> None:
    kind, message, changes = (WRONG | WRONG_POLICY)[case]
    arguments: dict[str, Any] = {
        "hidden": torch.ones(2, 24),
        "weight": torch.ones(150, 24),
        "targets": torch.tensor([1, 2]),
    }
    if op == "policy_loss":
        names = ("old_logprobs", "advantages", "token_weights")
        arguments |= {name: torch.ones(2) for name in names}
    if isinstance(changes.get("targets"), list):
        changes = {"targets": torch.tensor(changes["targets"])}
    with pytest.raises(kind, match=rf"bupo\.ops\.{op}: .*{message}"):
        getattr(ops, op)(**arguments | changes)


def full_call(op: str) -> Sample:
    """Every tensor argument given."""
    temperature = torch.full((2, 45), 0.7, dtype=torch.float64)
    call = sample("policy_loss", "every head option").but(temperature=temperature)
    if op == "policy_loss":
        importance = torch.ones(2, 45, dtype=torch.float64)
        return call.but(importance_weights=importance).to(torch.float32)
    names = ("hidden", "weight", "targets", "bias", "temperature")
    arguments = {name: call.arguments[name] for name in names}
    return Sample("full", op, arguments).to(torch.float32)


@each_op
def test_operators_refuse_tensors_that_do_not_fit(op: str) -> None:
    """Called directly, past the Python checks: an error, never a read beyond the end."""
    call = full_call(op)
    with RecordBupo() as record:
        objective(call.call(**call.leaves())).backward()
    count = 0
    for func, args in record.calls:
        args = [x.detach() if isinstance(x, Tensor) else x for x in args]
        func(*args)
        for i, x in enumerate(args):
            if not isinstance(x, Tensor):
                continue
            other = x.int() if x.dtype == torch.int64 else x.double()
            shorter, strided = x[:-1], torch.stack([x, x], -1)[..., 0]
            if not x.numel():  # what the CPU keeps for its backward
                shorter = strided = x.new_zeros(1)
            for wrong in (shorter, x[..., None], other, strided):
                with pytest.raises(ValueError, match=rf"bupo\.ops\.{op}"):
                    func(*args[:i], wrong, *args[i + 1 :])
                count += 1
    assert count == 4 * (10 if op == "policy_loss" else 5 + 9)


@each_op
def test_autocast_to_float16_is_refused(op: str) -> None:
    call = small(op)
    with (
        torch.autocast(DEVICE, torch.float16),
        pytest.raises(TypeError, match=r"bfloat16.*float16"),
    ):
        call.call()


def test_excluded_targets_may_be_out_of_range() -> None:
    call = small("lm_head_logprobs")
    targets = call.arguments["targets"].clone()
    targets[0, :5] = -(10**12)
    got = call.call(targets=targets, ignore_index=-(10**12))
    assert not got.logprobs[0, :5].any()
    assert torch.equal(got.logprobs[1], call.call().logprobs[1])


def test_workspace_budget() -> None:
    before = ops.build_info()["workspace_bytes"]
    for size in (2**28, None):
        ops.set_workspace_bytes(size)
        assert ops.build_info()["workspace_bytes"] == (size or 0)
    ops.set_workspace_bytes(before or None)
    for wrong, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="set_workspace_bytes: size must be"):
            ops.set_workspace_bytes(wrong)


def test_choice_of_kernels() -> None:
    assert ops.build_info()["cuda_kernels"] == "auto"
    for name in (*CUDA_KERNELS[1:], "auto"):
        ops.set_cuda_kernels(name)
        assert ops.build_info()["cuda_kernels"] == name
    with pytest.raises(ValueError, match=r"set_cuda_kernels: name must be one of auto.*got 'sm80'"):
        ops.set_cuda_kernels("sm80")


@pytest.mark.parametrize("op", OPS)
def test_gradients_end_the_graph(op: str) -> None:
    """What torch.autograd.grad returns holds on to nothing."""
    call = small(op)
    leaves = call.leaves()
    result = call.call(**leaves)
    total = result.loss if op == "policy_loss" else result.logprobs.sum()
    for gradient in torch.autograd.grad(total, list(leaves.values())):
        assert not gradient.requires_grad and gradient.grad_fn is None


@pytest.mark.parametrize("op", OPS)
def test_out_of_memory_is_torch_s_own_error(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """The extension can only say it in words."""

    def fail(*_: object) -> None:
        raise RuntimeError("bupo.ops: out of memory for a tensor of shape [5], type Byte: none")

    call = small(op)
    monkeypatch.setattr(torch.ops.bupo, op, fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory .* of shape .5., type Byte"):
        call.call()


def test_build_info() -> None:
    info = ops.build_info()
    assert {"version", "cuda", "archs", "torch_target", "devices", "cpu_products"} <= info.keys()
    assert "cpu" in info["devices"]
    assert info["cuda"] in ("OFF", "CHECK", "ON")
    forced = os.environ.get("BUPO_CPU_PRODUCTS") == "library"
    assert info["cpu_products"].keys() == {"float32", "bfloat16"}
    assert set(info["cpu_products"].values()) <= ({"library"} if forced else {"library", "block"})
    assert info["cpu_vectors"] in (128, 256, 512)
    assert info["cpu_vectors"] <= int(os.environ.get("BUPO_CPU_VECTORS", 512))


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("lm_head_logprobs", name) for name in ("hidden", "weight", "bias")),
        *(("policy_loss", name) for name in ("hidden", "weight", "bias", "advantages")),
    ],
)
def test_forward_mode_is_refused_not_zero(op: str, name: str) -> None:
    """torch would answer 0 without a word; the reference has the derivative."""
    arguments = dict(sample(op, "bias").arguments)
    primal = arguments.pop(name)

    def first(module: Any, x: Tensor) -> Tensor:
        return getattr(module, op)(**arguments | {name: x})[0].sum()

    tangent = torch.linspace(0, 1, primal.numel(), dtype=primal.dtype).view_as(primal)
    with pytest.raises(NotImplementedError, match=f"bupo.ops.{op}: {name} has a forward-mode"):
        torch.func.jvp(lambda x: first(ops, x), (primal,), (tangent,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="which is not supported: use reverse"),
    ):
        first(ops, torch.autograd.forward_ad.make_dual(primal, tangent))
    if op == "lm_head_logprobs":
        _, derivative = torch.func.jvp(lambda x: first(ops.reference, x), (primal,), (tangent,))
        assert derivative.abs() > 1e-6
