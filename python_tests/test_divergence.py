"""lm_head_divergence: three ways (ours, plain torch in the same dtype, float64), and what is
special to it. test_cuda_emulated.py runs this file on the CUDA sources too."""

import itertools
import math
from typing import Any

import pytest
import torch
from on_device import DEVICE
from sample_inputs import DTYPES, EMULATED, accumulator
from torch import Tensor

from bupo import ops
from bupo.ops.divergence import KINDS

N, D, TEACHER_D, V = 70, 16, 24, 1100
MATRICES = ("hidden", "weight", "teacher_hidden", "teacher_weight", "bias", "teacher_bias")


def arguments(name: str) -> dict[str, Any]:
    """In float64, exact in bfloat16. "far": two models; "near": a model and its small change."""
    g = torch.Generator().manual_seed(sum(name.encode()))

    def rand(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*shape, generator=g)).bfloat16().double()

    hidden, weight = rand(N, D), rand(V, D, std=0.6)
    weights = torch.rand(N, generator=g).double() * (torch.rand(N, generator=g) > 0.2) / N
    given = {"hidden": hidden, "weight": weight, "token_weights": weights}
    if name == "near":
        change = torch.nn.functional.pad(rand(N, D, std=2e-3), (0, TEACHER_D - D))
        wider = torch.nn.functional.pad(hidden, (0, TEACHER_D - D))
        head = torch.nn.functional.pad(weight, (0, TEACHER_D - D))
        return given | {
            "teacher_hidden": (wider + change).bfloat16().double(),
            "teacher_weight": head,
        }
    given |= {"teacher_hidden": rand(N, TEACHER_D), "teacher_weight": rand(V, TEACHER_D, std=0.5)}
    if name == "options":
        given |= {
            "bias": rand(V, std=0.3),
            "teacher_bias": rand(V, std=0.3),
            "temperature": 0.7,
            "teacher_temperature": torch.linspace(0.5, 2, N).double(),
            "softcap": 5.0,
            "teacher_softcap": 8.0,
        }
    if name == "masked":  # a third of the vocabulary, of both
        bias = torch.zeros(V, dtype=torch.float64)
        bias[::3] = -math.inf
        given |= {"bias": bias, "teacher_bias": bias.clone()}
    return given


def rounded(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def cast(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype if name in MATRICES else accumulator(dtype))

    return {name: cast(name, x) for name, x in given.items()}


def evaluate(module: Any, given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    leaves = {k: x.clone().requires_grad_() for k, x in given.items() if k in MATRICES}
    out = module.lm_head_divergence(**given | leaves, **options)
    grads = torch.autograd.grad(out.loss, [*leaves.values()], allow_unused=True)
    found = {f"d {name}": grad for name, grad in zip(leaves, grads) if grad is not None}
    return {"loss": out.loss.detach(), "divergence": out.divergence} | found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["far", "near", "options", "masked"])
def test_values_and_gradients(name: str, kind: str, dtype: torch.dtype) -> None:
    """Errors against the largest number of each result, at most twice plain torch's and four ulps;
    in float64, where plain torch is the truth, 1e-9 of a result that cancels there."""
    given = rounded(arguments(name), dtype)
    for teacher_grad in (False, True):
        options = {"kind": kind, "beta": 0.3, "teacher_grad": teacher_grad}
        truth = evaluate(ops.reference, rounded(given, torch.float64), **options)
        plain, ours = (evaluate(module, given, **options) for module in (ops.reference, ops))
        assert ours.keys() == truth.keys()
        assert ("d teacher_hidden" in ours) == teacher_grad
        floor = 1e-9 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        for result, exact in truth.items():
            unit = exact.abs().amax()
            errors = [((x[result].double() - exact) / unit).abs().amax() for x in (ours, plain)]
            assert errors[0] <= 2 * errors[1] + floor, (result, errors)
            assert ours[result].dtype == plain[result].dtype


@pytest.mark.parametrize("kind", KINDS)
def test_small_divergences_keep_their_digits(kind: str) -> None:
    """Where plain float32 has none left."""
    given = rounded(arguments("near"), torch.float32)
    truth = ops.reference.lm_head_divergence(**rounded(given, torch.float64), kind=kind).divergence
    ours, plain = (
        module.lm_head_divergence(**given, kind=kind).divergence for module in (ops, ops.reference)
    )
    keep = given["token_weights"] != 0
    error, peer = (((x.double() - truth) / truth)[keep].abs().max() for x in (ours, plain))
    assert truth[keep].max() < 1e-4
    assert error < 2e-3
    assert peer > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_equal_heads_have_no_divergence(kind: str) -> None:
    given = rounded(arguments("far"), torch.float32)
    same = {"teacher_hidden": given["hidden"], "teacher_weight": given["weight"]}
    found = evaluate(ops, given | same, kind=kind)
    assert found["loss"] == 0 and not found["divergence"].any()
    assert found["d hidden"].abs().max() < 1e-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_tokens_without_weight_may_hold_anything(garbage: float, dtype: torch.dtype) -> None:
    given = rounded(arguments("options"), dtype)
    excluded = given["token_weights"] == 0
    dirty = {
        name: given[name].masked_fill(excluded[:, None], garbage)
        for name in ("hidden", "teacher_hidden")
    }
    dirty["teacher_temperature"] = given["teacher_temperature"].masked_fill(excluded, garbage)
    clean = evaluate(ops, given, kind="jsd", teacher_grad=True)
    got = evaluate(ops, given | dirty, kind="jsd", teacher_grad=True)
    for name, x in clean.items():
        assert torch.equal(got[name], x), name
    assert not got["d hidden"][excluded].any()


def test_what_the_student_cannot_say_is_infinitely_far() -> None:
    given = rounded(arguments("far"), torch.float32)
    bias = torch.zeros(V)
    bias[::3] = -math.inf
    found = {k: ops.lm_head_divergence(**given, bias=bias, kind=k).divergence for k in KINDS}
    keep = given["token_weights"] != 0
    assert found["forward_kl"][keep].isinf().all()
    assert found["reverse_kl"][keep].isfinite().all()
    assert (found["jsd"][keep] < math.log(2)).all()


def test_a_nan_row_affects_no_other() -> None:
    given = rounded(arguments("far"), torch.float32)
    given["token_weights"] = torch.full((N,), 1 / N)
    clean = evaluate(ops, given)
    hidden = given["hidden"].clone()
    hidden[5] = math.nan
    got = evaluate(ops, given | {"hidden": hidden})
    others = torch.arange(N) != 5
    for name in ("divergence", "d hidden"):
        assert torch.equal(got[name][others], clean[name][others]), name
        assert got[name][5].isnan().all()
    assert got["loss"].isnan()


def test_shapes_and_the_head_of_the_student() -> None:
    """[B, T, D], one weight for both sides: its gradient is the student's, unless both are asked
    for."""
    given = rounded(arguments("far"), torch.float32)
    hidden, weights = given["hidden"].reshape(7, 10, D), given["token_weights"].reshape(7, 10)
    teacher = hidden.flip(0).contiguous()
    for both, module in itertools.product((False, True), (ops, ops.reference)):
        weight = given["weight"].clone().requires_grad_()
        out = module.lm_head_divergence(hidden, weight, teacher, weight, weights, teacher_grad=both)
        out.loss.backward()
        assert out.divergence.shape == (7, 10)
        if module is ops:
            ours = weight.grad
    torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-7)


def test_a_batch_of_nothing() -> None:
    for tokens in (0, 3):
        x = torch.ones(tokens, D, requires_grad=True)
        w = torch.ones(V, D, requires_grad=True)
        out = ops.lm_head_divergence(x, w, x, w, torch.zeros(tokens))
        out.loss.backward()
        assert out.loss == 0 and not x.grad.any() and not w.grad.any()


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "kind": (
        ValueError,
        "kind must be one of forward_kl, reverse_kl, jsd, got 'kl'",
        {"kind": "kl"},
    ),
    "beta": (ValueError, "beta must be between 0 and 1, got 1.0", {"kind": "jsd", "beta": 1}),
    "teacher_grad": (TypeError, "teacher_grad must be a bool, got int 1", {"teacher_grad": 1}),
    "tokens": (
        ValueError,
        r"teacher_hidden must have the shape of hidden.*\[70, 'D'\], got .*\[3, 24\]",
        {"teacher_hidden": torch.ones(3, TEACHER_D)},
    ),
    "vocabulary": (
        ValueError,
        "teacher_weight must have the vocabulary of weight, 1100 rows, got .*5, 24",
        {"teacher_weight": torch.ones(5, TEACHER_D)},
    ),
    "the teacher's width": (
        ValueError,
        r"\(teacher's side\): hidden must be \[..., D\] with D = 7",
        {"teacher_weight": torch.ones(V, 7)},
    ),
    "no tensor": (
        TypeError,
        "teacher_hidden must be a .* tensor, got None",
        {"teacher_hidden": None},
    ),
    "weights": (
        ValueError,
        r"token_weights must have the shape of hidden's tokens \[70\], got .*\[2\]",
        {"token_weights": torch.ones(2)},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str) -> None:
    error, message, change = WRONG[name]
    given = rounded(arguments("far"), torch.float32) | change
    with pytest.raises(error, match=f"bupo.ops.lm_head_divergence.*{message}"):
        ops.lm_head_divergence(**given)


@pytest.mark.skipif(bool(EMULATED) or DEVICE == "cuda", reason="no float64")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_opcheck(kind: str) -> None:
    given = {k: x[:4] if x.shape[:1] == (N,) else x[:9] for k, x in arguments("far").items()}
    names = [*MATRICES[:4]]
    leaves = [given[k].clone().requires_grad_() for k in names]

    def loss(*x: Tensor) -> Tensor:
        rest = {"token_weights": given["token_weights"] * N, "kind": kind, "teacher_grad": True}
        return ops.lm_head_divergence(**dict(zip(names, x)), **rest).loss

    assert torch.autograd.gradcheck(loss, leaves)
    x, w, y, u = leaves
    weights = given["token_weights"]
    call = (x, w, None, None, 0.0, y, u, None, None, 0.0, weights, KINDS.index(kind), 0.5)
    torch.library.opcheck(torch.ops.bupo.lm_head_divergence, (*call, [True, True, False] * 2))
    grads = torch.func.grad(loss, argnums=(0, 2))(*(x.detach() for x in leaves))
    for ours, truth in zip(grads, torch.autograd.grad(loss(*leaves), [x, y]), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.skipif(bool(EMULATED), reason="about the operator's graph")
def test_it_compiles() -> None:
    given = rounded(arguments("far"), torch.float32)
    compiled = torch.compile(ops.lm_head_divergence, fullgraph=True, backend="aot_eager")
    for kind in KINDS:
        assert torch.equal(
            compiled(**given, kind=kind).loss, ops.lm_head_divergence(**given, kind=kind).loss
        )


def test_many_tokens_are_their_parts() -> None:
    """More than one chunk: of 2048 tokens on the CPU, of some 400 of this size in the emulator."""
    tokens = 1030 if EMULATED else 2200
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(tokens, 8, generator=g) for _ in range(2))
    w, u = (torch.randn(33, 8, generator=g) for _ in range(2))
    given = {"hidden": x, "weight": w, "teacher_hidden": y, "teacher_weight": u}
    weights = torch.rand(tokens, generator=g)
    whole = evaluate(ops, given | {"token_weights": weights}, kind="jsd", teacher_grad=True)
    rows = [slice(0, 100), slice(100, 777), slice(777, tokens)]
    parts = []
    for part in rows:
        some = {"hidden": x[part], "teacher_hidden": y[part], "token_weights": weights[part]}
        parts.append(evaluate(ops, given | some, kind="jsd", teacher_grad=True))
    for name, together in (
        ("divergence", torch.cat([p["divergence"] for p in parts])),
        ("d hidden", torch.cat([p["d hidden"] for p in parts])),
        ("d teacher_hidden", torch.cat([p["d teacher_hidden"] for p in parts])),
        ("d weight", torch.stack([p["d weight"] for p in parts]).sum(0)),
        ("d teacher_weight", torch.stack([p["d teacher_weight"] for p in parts]).sum(0)),
    ):
        torch.testing.assert_close(whole[name], together, rtol=1e-5, atol=1e-5)
