"""Both LM-head ops in autograd: what has a gradient, how often, and who may change it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_samples import RecordBupo, each_dtype, each_op, gradients, small
from sample_inputs import (
    OPS,
    Sample,
    evaluate,
    head,
    objective,
    sample,
    with_policy,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bupo.ops as ops


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
