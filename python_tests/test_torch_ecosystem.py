"""Both LM-head ops under torch.func, torch.export, DDP and FSDP2: the table of PyTorch's features
in docs/integrations.md names what tests the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_samples import each_op, small
from sample_inputs import objective
from test_ranks import finish, started
from torch import Tensor, func, nn

import bupo.ops as ops

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: func.grad(f)(x),
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.tensor(2.0, dtype=x.dtype))[0],
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "vmap": lambda f, x: func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: func.vmap(func.grad(f))(torch.stack([x, 2 * x])),
    "functional_call": lambda f, x: func.grad(lambda p: _call(f, p))({"x": x})["x"],
}
NOT_ONCE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad of grad": lambda f, x: func.grad(lambda y: func.grad(f)(y).sum())(x),
    "hessian": lambda f, x: func.hessian(f)(x),
}


class _Parameter(nn.Module):
    def __init__(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.x, self.f = nn.Parameter(x), f

    def forward(self) -> Tensor:
        return self.f(self.x)


def _call(f: Callable[[Tensor], Tensor], parameters: dict[str, Tensor]) -> Tensor:
    module = _Parameter(torch.zeros_like(parameters["x"]), f)
    found: Tensor = func.functional_call(module, parameters, ())
    return found


def function_of(op: str, module: Any, name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A scalar of one argument of the op, and a value of that argument."""
    call = small(op, torch.float32)
    return lambda x: objective(call.call(module, **{name: x})), call.arguments[name]


@each_op
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the op in a loop
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(op: str, transform: str, name: str) -> None:
    found, expected = (
        TRANSFORMS[transform](*function_of(op, module, name)) for module in (ops, ops.reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 1e-3


@each_op
@pytest.mark.parametrize("transform", NOT_ONCE)
def test_second_derivatives_are_refused_not_zero(op: str, transform: str) -> None:
    """The reference, which the message names, has them."""
    with pytest.raises((RuntimeError, NotImplementedError), match=r"bupo\.ops\.reference"):
        NOT_ONCE[transform](*function_of(op, ops, "hidden"))
    second = NOT_ONCE[transform](*function_of(op, ops.reference, "hidden"))
    assert second.abs().max() > 1e-3


@each_op
def test_several_upstream_gradients_at_once(op: str) -> None:
    """is_grads_batched, which jacobian(vectorize=True) uses too."""
    f, x = function_of(op, ops, "hidden")
    leaf = x.clone().requires_grad_()
    scales = torch.tensor([1.0, 3.0], dtype=x.dtype)
    (found,) = torch.autograd.grad(f(leaf), leaf, scales, is_grads_batched=True)
    torch.testing.assert_close(found[0], func.grad(f)(x))
    torch.testing.assert_close(found[1], 3 * found[0])


@each_op
def test_export(op: str) -> None:
    """With any number of tokens."""
    call = small(op, torch.float32)

    class Step(nn.Module):
        def forward(self, arguments: dict[str, Tensor]) -> Tensor:
            return objective(getattr(ops, op)(**arguments))

    tokens = torch.export.Dim("tokens", min=2)
    fixed = ("weight", "bias")
    tensors = {k: x for k, x in call.arguments.items() if isinstance(x, Tensor)}
    tensors = {k: x if k in fixed else x.flatten(0, 1) if k == "hidden" else x.flatten()
               for k, x in tensors.items()}  # fmt: skip
    dynamic = {k: None if k in fixed else {0: tokens} for k in tensors}
    exported = torch.export.export(Step(), (tensors,), dynamic_shapes=(dynamic,)).module()
    shorter = {k: x if k in fixed else x[:3] for k, x in tensors.items()}
    for given in (tensors, shorter):
        torch.testing.assert_close(exported(given), Step()(given))


def test_ddp_and_fsdp2() -> None:
    finish(started(2, str(Path(__file__).with_name("wrapped_samples.py"))))
