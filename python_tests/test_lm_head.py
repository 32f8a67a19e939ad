"""lm_head_logprobs: values, gradients, hard numbers, sizes, reproducibility.

What both ops share is in test_ops_tensors.py (layouts, dtypes), test_ops_autograd.py,
test_ops_errors.py and test_ops_memory.py.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_inputs import (
    BFLOAT16_ROUNDINGS,
    DTYPES,
    THREE_WAY_DTYPES,
    Sample,
    accumulator,
    assert_near_truth,
    check_three_way,
    evaluate,
    exact_logits,
    fuzzed_head,
    head,
    sample,
    sample_inputs,
)
from torch import Tensor

import bupo.ops as ops

OP = "lm_head_logprobs"
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", THREE_WAY_DTYPES, ids=str)
@pytest.mark.parametrize("case", sample_inputs(OP), ids=lambda s: s.name)
def test_values_and_gradients(case: Sample, dtype: torch.dtype) -> None:
    check_three_way(case, dtype)


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(arguments=fuzzed_head(), dtype=st.sampled_from(THREE_WAY_DTYPES))
def test_any_shape_and_options(arguments: dict, dtype: torch.dtype) -> None:
    check_three_way(Sample(f"fuzz {arguments.keys()}", OP, arguments), dtype)


NARROWER = [bits for bits in (128, 256) if bits < ops.build_info()["cpu_vectors"]]


@pytest.mark.parametrize(
    "variable", ["BUPO_CPU_PRODUCTS=library", *(f"BUPO_CPU_VECTORS={bits}" for bits in NARROWER)]
)
def test_what_other_cpus_run(variable: str) -> None:
    """Products and vectors are chosen when the extension loads, hence a process of its own."""
    shapes = "batch or width or rows or buffers or tile or everything or term"
    numbers = "digits or float32_sums or another_row"
    chosen = f"build_info or ((bfloat16 or float32) and ({numbers} or (gradients and ({shapes}))))"
    files = ["test_lm_head.py", "test_policy_loss.py", "test_ops_errors.py::test_build_info"]
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", chosen]
    name, value = variable.split("=")
    environment = os.environ | {name: value}
    here = Path(__file__).parent
    files = [str(here / name) for name in files]
    done = subprocess.run(
        [*command, *files], env=environment, cwd=here.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20, done.stdout


def test_the_oracle_agrees_with_torch() -> None:
    """cross_entropy and Categorical know nothing of bupo.ops.reference."""
    call = sample(OP, "temperature").to(torch.float64)
    a = call.arguments
    logits = (a["hidden"] @ a["weight"].T / 0.7).flatten(0, 1)
    got = call.call(ops.reference)
    nll = torch.nn.functional.cross_entropy(logits, a["targets"].flatten(), reduction="none")
    torch.testing.assert_close(got.logprobs.flatten(), -nll)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(got.entropy.flatten(), entropy)
    torch.testing.assert_close(got.logsumexp.flatten(), logits.logsumexp(-1))


@pytest.mark.parametrize("tail", [1.0, 7.85, 12.0, 17.0])
def test_a_flat_tail_beside_one_large_entry_is_not_lost(tail: float) -> None:
    """Terms below half an ulp of a running sum vanish one by one: sums have to be short."""
    weight = torch.full((512, 1), -tail)
    weight[0] = 0
    arguments = {"hidden": torch.ones(1, 1), "weight": weight, "targets": torch.ones(1).long()}
    call = Sample("tail", OP, arguments)
    got = call.call()
    plain, truth = call.call(ops.reference), call.to(torch.float64).call(ops.reference)
    for name in ("logprobs", "entropy", "logsumexp"):
        x, y, z = (float(getattr(r, name)) for r in (got, plain, truth))
        assert abs(x - z) <= 2 * abs(y - z) + 4 * EPS * max(1, abs(z)), (name, x, y, z)


@pytest.mark.parametrize("same", [False, True])
def test_bias_gradient_of_many_tokens(same: bool) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5000, 8, generator=g), torch.randn(5, 8, generator=g) * 0.3
    targets = torch.zeros(5000).long() if same else torch.randint(5, (5000,), generator=g)
    upstream = torch.rand(5000, generator=g)  # of one sign: what a sum loses adds up

    def bias_gradient(module: Any, dtype: torch.dtype) -> torch.Tensor:
        bias = torch.zeros(5, dtype=dtype, requires_grad=True)
        out = module.lm_head_logprobs(hidden.to(dtype), weight.to(dtype), targets, bias=bias)
        (out.logprobs * upstream.to(dtype)).sum().backward()
        return bias.grad.double()

    truth = bias_gradient(ops.reference, torch.float64)
    ours, plain = (bias_gradient(m, torch.float32) for m in (ops, ops.reference))
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max()


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.3])
def test_saturated_softcap_has_no_slope(temperature: float) -> None:
    hidden = torch.full((1, 1), 100.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    options = {"softcap": 1.0, "temperature": temperature}
    ops.lm_head_logprobs(hidden, weight, torch.ones(1).long(), **options).logprobs.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


# ---- hard numbers ------------------------------------------------------------------------------


def dz_of(
    logits: Tensor, targets: Tensor, dtype: torch.dtype, module: Any = ops, **upstream: float
) -> tuple[ops.LogProbs, Tensor]:
    """Outputs at these exact logits, and the gradient in them of upstream . outputs, [N, V]."""
    call = Sample("exact", OP, exact_logits(logits, targets)).to(dtype)
    leaves = call.leaves()
    result = call.call(module, **leaves)
    total = sum(scale * getattr(result, name).sum() for name, scale in upstream.items())
    total.backward()
    dz = leaves["weight"].grad.T[: len(logits)].double()
    return ops.LogProbs(*(x.detach().double() for x in result)), dz


def gaps(*values: float, vocab: int = 40) -> tuple[Tensor, Tensor]:
    """Logits [N, V], one row per value: target 5 at 0, the others near the value."""
    g = torch.Generator().manual_seed(1)
    logits = torch.tensor(values)[:, None] + torch.randint(-2, 3, (len(values), vocab), generator=g)
    logits[:, 5] = 0
    return logits.double(), torch.full((len(values),), 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_target_keeps_its_digits(dtype: torch.dtype) -> None:
    """log p near -1e-12 (and -1e-33), entropy and 1 - p_t to five digits, where p_t rounds to 1."""
    logits, targets = gaps(-20, -32, -50, -78)
    others = torch.arange(40) != 5
    e = logits[:, others].exp()
    rest, dot = e.sum(1), (e * logits[:, others]).sum(1)
    entropy = torch.log1p(rest) - dot / (1 + rest)
    got, d_logprob = dz_of(logits, targets, dtype, logprobs=1.0)
    _, d_entropy = dz_of(logits, targets, dtype, entropy=1.0)

    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(got.logprobs, -torch.log1p(rest), **close)
    torch.testing.assert_close(got.logsumexp, torch.log1p(rest), **close)
    torch.testing.assert_close(got.entropy, entropy, **close)
    assert (got.logprobs < 0).all()
    p = e / (1 + rest)[:, None]
    mean = dot / (1 + rest)
    if dtype == torch.bfloat16:
        close["rtol"] = BFLOAT16_ROUNDINGS * 2**-8
    torch.testing.assert_close(d_logprob[:, 5], rest / (1 + rest), **close)
    torch.testing.assert_close(d_logprob[:, others], -p, **close)
    torch.testing.assert_close(d_entropy[:, 5], mean / (1 + rest), **close)
    torch.testing.assert_close(
        d_entropy[:, others], -p * (logits[:, others] - mean[:, None]), **close
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unlikely_target_has_the_whole_gradient(dtype: torch.dtype) -> None:
    """p_t far below the smallest float: log p is still exact, and dz_t is 1 - p_t = 1."""
    logits, targets = gaps(90, 200, 5120, 131072)
    got, dz = dz_of(logits, targets, dtype, logprobs=1.0)
    exact = logits.to(dtype).double()  # bfloat16 holds 131072 but not 131073
    expected = -exact.logsumexp(1)
    torch.testing.assert_close(got.logprobs, expected, rtol=1e-6, atol=0)
    # Hopper's path rounds it as the product of two numbers.
    rtol = (BFLOAT16_ROUNDINGS - 1) * 2**-8 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(dz[:, 5], torch.ones_like(dz[:, 5]), rtol=rtol, atol=0)
    p = exact.softmax(1)
    p[:, 5] = 0
    torch.testing.assert_close(dz[:, :5], -p[:, :5], rtol=BFLOAT16_ROUNDINGS * 2**-8, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_vocabulary_entries_take_no_part(dtype: torch.dtype) -> None:
    call = sample(OP, "masked vocabulary").to(dtype)
    masked = call.arguments["bias"].isinf()
    got = evaluate(ops, call).results
    assert not got["d weight"][masked].any()
    assert not got["d bias"][masked].any()
    smaller = call.arguments["targets"] - call.arguments["targets"] // 3 - 1
    without = call.but(weight=call.arguments["weight"][~masked], bias=None, targets=smaller)
    expected = evaluate(ops, without).results
    for name in ("logprobs", "entropy", "logsumexp"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_target_is_minus_infinity(dtype: torch.dtype) -> None:
    """Only its own row's log-prob: entropy and gradients stay finite and right."""
    call = sample(OP, "masked vocabulary").to(dtype)
    targets = call.arguments["targets"].clone()
    targets[4] = 3
    call = call.but(targets=targets)
    got = evaluate(ops, call).results
    assert got["logprobs"][4] == -math.inf
    assert got["logprobs"].isfinite().sum() == 32
    check_three_way(call, dtype)


def bad_row(kind: str, call: Sample, row: int) -> Sample:
    """The call with one more hidden direction (weight 1), which spoils one row's logits."""
    hidden, weight = call.arguments["hidden"], call.arguments["weight"]
    extra = torch.zeros_like(hidden[..., :2])
    extra[row, 0] = {"good": 0.0, "nan": math.nan, "all -inf": -math.inf, "all inf": math.inf}[kind]
    return call.but(
        hidden=torch.cat([hidden, extra], -1),
        weight=torch.cat([weight, torch.ones_like(weight[:, :2])], -1),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nan", "all -inf", "all inf"])
def test_a_row_without_a_distribution_spares_another_row(kind: str, dtype: torch.dtype) -> None:
    base = Sample(kind, OP, head("bad row", (33,), 24, 550)).to(dtype)
    good, bad = (evaluate(ops, bad_row(k, base, 20)).results for k in ("good", kind))
    others = torch.arange(33) != 20
    for name in ("logprobs", "entropy", "logsumexp", "d hidden"):
        assert torch.equal(good[name][others], bad[name][others]), name
    assert bad["logprobs"][20].isnan()
    assert bad["entropy"][20].isnan()
    assert bad["logsumexp"][20].isnan() or bad["logsumexp"][20] == -math.inf

    ignored = base.arguments["targets"].clone()
    ignored[20] = -100
    good, bad = (
        evaluate(ops, bad_row(k, base.but(targets=ignored), 20)).results for k in ("good", kind)
    )
    for name in good:
        assert torch.equal(good[name], bad[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_row_without_gradient_spares_another_row_of_dw(dtype: torch.dtype) -> None:
    base = Sample("nan", OP, head("bad row", (33,), 24, 550)).to(dtype)
    upstream = torch.linspace(-1, 1, 33, dtype=accumulator(dtype))
    upstream[20] = 0
    grads = []
    for kind in ("good", "nan"):
        call = bad_row(kind, base, 20)
        leaves = call.leaves()
        call.call(**leaves).logprobs.backward(upstream)
        grads.append(leaves)
    for name in ("hidden", "weight"):
        assert torch.equal(grads[0][name].grad, grads[1][name].grad), name
    assert not grads[1]["hidden"].grad[20].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 513, 3001])
def test_log_probs_and_entropy_stay_in_range(vocab: int, dtype: torch.dtype) -> None:
    highest = torch.tensor(math.log(vocab), dtype=accumulator(dtype))
    for std in (0.0, 1e-4, 1e-3, 1.0, 60.0):
        call = Sample("range", OP, head("range", (200,), 8, vocab, std)).to(dtype)
        got = call.call()
        assert (got.logprobs <= 0).all(), std
        assert (got.entropy >= 0).all() and (got.entropy <= highest).all(), std
        if std == 0:
            torch.testing.assert_close(got.entropy, highest.expand(200), rtol=1e-7, atol=0)
            torch.testing.assert_close(got.logprobs, -highest.expand(200), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", ["logprobs", "entropy"])
def test_every_row_of_dz_sums_to_zero(output: str, dtype: torch.dtype) -> None:
    """Adding a constant to a row of logits changes neither: dz is orthogonal to it."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randint(-64, 65, (9, 700), generator=g) / 8.0
    logits[:, 600] = 9.0
    targets = torch.tensor([600, 0, 699, 512, 511, 1, 2, 600, 4])
    _, dz = dz_of(logits, targets, dtype, **{output: 1.0})
    _, plain = dz_of(logits, targets, dtype, ops.reference, **{output: 1.0})
    ours, peer = (x.sum(1).to(dtype) for x in (dz, plain))
    assert_near_truth("sum of dz", ours, peer, torch.zeros(9), dz.abs().sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dw_of_many_chunks_has_float32_sums(dtype: torch.dtype) -> None:
    """24 buffers of 2048 tokens. p = 1/16 and dz are exact, so that only the sums round.

    A sum kept in bfloat16 drifts past the bound: the last line shows that it would be seen.
    """
    tokens, width, vocab = 24 * 2048, 8, 16
    g = torch.Generator().manual_seed(4)
    hidden = (torch.rand(tokens, width, generator=g) + 0.5).to(dtype)
    weight = torch.zeros(vocab, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (tokens,), generator=g)
    ops.lm_head_logprobs(hidden, weight, targets).logprobs.sum().backward()

    dz = torch.nn.functional.one_hot(targets, vocab) - 1 / 16
    truth = dz.double().T @ hidden.double()
    if dtype == torch.float32:
        magnitude = dz.double().abs().T @ hidden.double()
        return assert_near_truth("dW", weight.grad, dz.T @ hidden, truth, magnitude)
    drifting = torch.zeros_like(weight)
    for rows in torch.arange(tokens).split(2048):
        drifting = drifting + dz[rows].to(dtype).T @ hidden[rows]
    one_rounding = 1.01 * 2**-8 * truth.abs()
    assert ((weight.grad - truth).abs() <= one_rounding).all()
    assert not ((drifting - truth).abs() <= one_rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_ignored_tokens_may_hold_anything(garbage: float, dtype: torch.dtype) -> None:
    call = sample(OP, "ignored tokens").to(dtype)
    ignored = call.arguments["targets"] == -100
    hidden = call.arguments["hidden"].masked_fill(ignored[..., None], garbage)
    clean, got = (evaluate(ops, c).results for c in (call, call.but(hidden=hidden)))
    for name in clean:
        assert torch.equal(clean[name], got[name]), name
    for name in ("logprobs", "entropy", "logsumexp", "d hidden"):
        assert not got[name][ignored].any(), name
        assert got[name][~ignored].all(-1).any(), name


@pytest.mark.parametrize("garbage", [math.nan, 0.0, -1.0, math.inf])
def test_ignored_tokens_may_hold_any_temperature(garbage: float) -> None:
    call = sample(OP, "ignored tokens").to(torch.float32)
    ignored = call.arguments["targets"] == -100
    clean = call.but(temperature=torch.full(ignored.shape, 0.7))
    got = clean.but(temperature=clean.arguments["temperature"].masked_fill(ignored, garbage))
    expected, results = evaluate(ops, clean).results, evaluate(ops, got).results
    for name in expected:
        assert torch.equal(expected[name], results[name]), name


# ---- sizes and reproducibility -----------------------------------------------------------------


def test_more_logits_than_32_bits_count() -> None:
    rows, vocab = 65537, 32800
    assert rows * vocab > 2**31
    g = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(rows, 1, generator=g), torch.randn(vocab, 1, generator=g)
    targets = torch.randint(vocab, (rows,), generator=g)
    with torch.no_grad():
        got = ops.lm_head_logprobs(hidden, weight, targets)
    some = torch.tensor([0, 1, 30000, 65534, 65535, 65536])
    truth = ops.reference.lm_head_logprobs(hidden[some].double(), weight.double(), targets[some])
    for name, x in got._asdict().items():
        torch.testing.assert_close(
            x[some].double(), getattr(truth, name), rtol=1e-6, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_twice_is_bitwise_equal(dtype: torch.dtype) -> None:
    call = sample(OP, "batch 3x43").to(dtype)
    first, second = evaluate(ops, call).results, evaluate(ops, call).results
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["batch 3x43", "1030 rows", "two buffers"])
def test_log_probs_do_not_depend_on_the_number_of_threads(name: str, dtype: torch.dtype) -> None:
    call = sample(OP, name).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call.call())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for field, x in results[0]._asdict().items():
            assert torch.equal(x, getattr(other, field)), field
