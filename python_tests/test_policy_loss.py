"""policy_loss: values, gradients, metrics, clip edges, masks, live tokens.

What both ops share is in test_ops_tensors.py (layouts, dtypes), test_ops_autograd.py,
test_ops_errors.py and test_ops_memory.py.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import DEVICE
from sample_inputs import (
    DTYPES,
    EMULATED,
    THREE_WAY_DTYPES,
    Sample,
    accumulator,
    check_three_way,
    evaluate,
    exact_logits,
    fuzzed_policy,
    head,
    sample,
    sample_inputs,
    with_policy,
)
from torch import Tensor

import bupo.ops as ops
from bupo.ops import policy_losses
from bupo.ops.results import METRICS

OP = "policy_loss"


@pytest.mark.parametrize("dtype", THREE_WAY_DTYPES, ids=str)
@pytest.mark.parametrize("case", sample_inputs(OP), ids=lambda s: s.name)
def test_values_and_gradients(case: Sample, dtype: torch.dtype) -> None:
    check_three_way(case, dtype)


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(arguments=fuzzed_policy(), dtype=st.sampled_from(THREE_WAY_DTYPES))
def test_any_shape_and_options(arguments: dict, dtype: torch.dtype) -> None:
    check_three_way(Sample(f"fuzz {arguments.keys()}", OP, arguments), dtype)


# ---- hard numbers ------------------------------------------------------------------------------


def one_policy(arguments: dict, ratio: float, advantage: float) -> dict:
    """The same old log-prob gap, advantage and weight 1 for every token."""
    logprobs = ops.reference.lm_head_logprobs(**arguments).logprobs
    return arguments | {
        "old_logprobs": logprobs - math.log(ratio),
        "advantages": torch.full_like(logprobs, advantage),
        "token_weights": torch.ones_like(logprobs),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_target_keeps_its_digits(dtype: torch.dtype) -> None:
    """1 - p_t from 1e-8 to 1e-33 reaches the gradient with all its digits, at ratio 1."""
    gap = torch.tensor([-20.0, -32.0, -50.0, -78.0], dtype=torch.float64)
    logits = gap[:, None].expand(4, 40).clone()
    logits[:, 5] = 0
    targets = torch.full((4,), 5)
    arguments = one_policy(exact_logits(logits, targets), 1.0, 2.0) | {
        "old_logprobs": torch.zeros(4, dtype=torch.float64)
    }
    got = evaluate(ops, Sample("confident", OP, arguments).to(dtype)).results
    rest = 39 * gap.exp()
    torch.testing.assert_close(got["logprobs"].double(), -torch.log1p(rest), rtol=1e-5, atol=0)
    dz = got["d weight"].T[:4].double()
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    p = torch.exp(gap) / (1 + rest)
    torch.testing.assert_close(dz[:, 5], -2 * rest / (1 + rest) ** 2, rtol=rtol, atol=0)
    torch.testing.assert_close(dz[:, 6], 2 * p / (1 + rest), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unlikely_target_has_the_whole_gradient(dtype: torch.dtype) -> None:
    """p_t = e^-200 to e^-131072 at ratio 1: dz_t = -A."""
    logits = torch.tensor([200.0, 5120.0, 131072.0], dtype=torch.float64)[:, None].repeat(1, 40)
    logits[:, 5] = 0
    call = Sample("unlikely", OP, one_policy(exact_logits(logits, torch.full((3,), 5)), 1.0, 2.0))
    got = evaluate(ops, call.to(torch.float64).to(dtype)).results
    # The old log-prob is rounded to float32, 0.004 of 131072; float64 keeps it.
    rtol = 1e-12 if dtype == torch.float64 else 0.008
    torch.testing.assert_close(
        got["d weight"].T.double()[:3, 5], torch.full((3,), -2.0).double(), rtol=rtol, atol=0
    )
    assert got["loss"].isfinite()


def test_ratio_beyond_every_float_is_clipped() -> None:
    """log ratio 1000: where the clip or the dual clip holds, loss and gradient are finite."""
    arguments = with_policy("overflow", head("overflow", (6,), 8, 20))
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    arguments |= {
        "old_logprobs": torch.full((6,), -1000.0),
        "advantages": sign,
        "token_weights": torch.ones(6),
        "dual_clip": 3.0,
    }
    got = evaluate(ops, Sample("overflow", OP, arguments).to(torch.float32)).results
    torch.testing.assert_close(got["loss"], torch.tensor(3 * (3.0 - 1.2)))
    assert not got["d hidden"].any()
    assert not got["d weight"].any()
    assert got["clip_fraction"] == 1
    assert got["live_fraction"] == 0


@pytest.mark.parametrize("api", [ops, ops.reference], ids=["ops", "reference"])
@pytest.mark.parametrize("loss_type", ["ppo", "cispo"])
def test_advantage_zero_beats_an_infinite_ratio_or_logprob(api: Any, loss_type: str) -> None:
    call = sample(OP, "masked vocabulary").to(torch.float32)
    a = {k: x.clone() for k, x in call.arguments.items() if isinstance(x, Tensor)}
    a["old_logprobs"][4], a["targets"][5] = -1000.0, 3  # ratio inf; log-prob -inf, ratio 0
    a["advantages"][4:6], a["token_weights"][4:6] = 0.0, 0.1
    call = call.but(**a, loss_type=loss_type)
    got = evaluate(api, call).results
    excluded = a["token_weights"].clone()
    excluded[4:6] = 0
    without = evaluate(api, call.but(token_weights=excluded)).results
    assert got["ratio_max"] == math.inf
    for name in ("loss", "d hidden", "d weight", "live_fraction"):
        assert torch.equal(got[name], without[name]), name


CLIPS: dict[str, dict[str, Any]] = {
    "ppo": {"clip_low": math.inf, "clip_high": math.inf},
    "cispo": {"loss_type": "cispo", "loss_options": {"ratio_max": math.inf}},
}


@pytest.mark.parametrize("loss_type", CLIPS)
def test_infinite_clip_range_is_no_clip(loss_type: str) -> None:
    call = sample(OP, "cispo" if loss_type == "cispo" else "dual clip").to(torch.float64)
    wide = call.but(**CLIPS[loss_type], dual_clip=None)
    got, truth = evaluate(ops, wide).results, evaluate(ops.reference, wide).results
    for name in ("loss", "d hidden", "d weight"):
        torch.testing.assert_close(got[name], truth[name])
    assert got["clip_fraction"] == 0
    assert evaluate(ops, call).results["clip_fraction"] > 0


def test_live_fraction_of_the_reference_does_not_need_grad_mode() -> None:
    call = sample(OP, "masked vocabulary").to(torch.float64)
    with torch.no_grad():
        quiet = call.call(ops.reference).metrics["live_fraction"]
    assert quiet == call.call(ops.reference).metrics["live_fraction"]
    assert 0 < quiet < 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_target_has_ratio_zero(dtype: torch.dtype) -> None:
    """A target with bias -inf: its loss is that of ratio 0, and it has no gradient."""
    call = sample(OP, "masked vocabulary").to(dtype)
    targets, weights = (call.arguments[k].clone() for k in ("targets", "token_weights"))
    advantages = call.arguments["advantages"].clone()
    targets[4:6], weights[4:6] = 3, 0.1
    advantages[4:6] = torch.tensor([1.5, -1.5])
    call = call.but(targets=targets, token_weights=weights, advantages=advantages)
    got = evaluate(ops, call).results
    assert (got["logprobs"][4:6] == -math.inf).all()
    assert not got["d hidden"][4:6].any()
    assert got["approx_kl"] == math.inf
    without = evaluate(ops, call.but(token_weights=weights * (weights != 0.1))).results
    torch.testing.assert_close(
        got["loss"] - without["loss"], torch.tensor(0.1 * 0.8 * 1.5).to(got["loss"])
    )
    assert torch.equal(got["d weight"], without["d weight"])


def spoiled(call: Sample, row: int, value: float) -> Sample:
    hidden = call.arguments["hidden"].clone()
    hidden[row, 0] = value
    return call.but(hidden=hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_row_spares_another_row(dtype: torch.dtype) -> None:
    call = sample(OP, "masked vocabulary").to(dtype)
    weights = call.arguments["token_weights"].clone()
    weights[20] = 0.1
    call = call.but(token_weights=weights)
    good, bad = evaluate(ops, call).results, evaluate(ops, spoiled(call, 20, math.nan)).results
    others = torch.arange(33) != 20
    for name in ("logprobs", "entropy", "d hidden"):
        assert torch.equal(good[name][others], bad[name][others]), name
    assert bad["loss"].isnan()
    assert bad["logprobs"][20].isnan()
    assert bad["d hidden"][20].isnan().all()


@pytest.mark.parametrize("position", [0, 20, 32])
def test_a_nan_row_shows_in_every_mean_and_maximum(position: int) -> None:
    call = sample(OP, "masked vocabulary").to(torch.float32)
    weights = torch.full_like(call.arguments["token_weights"], 0.1)
    metrics = spoiled(call.but(token_weights=weights), position, math.nan).call().metrics
    for name in ("ratio_mean", "ratio_max", "approx_kl", "entropy_mean"):
        assert metrics[name].isnan(), name


# ---- the loss by hand --------------------------------------------------------------------------

BY_HAND: list[tuple[str, float, float, dict, float]] = [
    # what, ratio, advantage, options, loss
    ("inside", 1.1, 2.0, {}, -2.2),
    ("clipped above", 1.5, 2.0, {}, -2.4),
    ("A < 0 is not clipped above", 1.5, -2.0, {}, 3.0),
    ("clipped below", 0.5, -2.0, {}, 1.6),
    ("A > 0 is not clipped below", 0.5, 2.0, {}, -1.0),
    ("another range", 1.5, 2.0, {"clip_high": 0.28, "clip_low": 0.1}, -2.56),
    ("dual clip", 4.0, -2.0, {"dual_clip": 3.0}, 6.0),
    ("dual clip not reached", 2.5, -2.0, {"dual_clip": 3.0}, 5.0),
    ("dual clip leaves A > 0", 4.0, 2.0, {"dual_clip": 3.0}, -2.4),
    ("cispo", 1.1, 2.0, {"loss_type": "cispo"}, 1.1 * 2 * math.log(2)),
    ("cispo bounded", 9.0, 2.0, {"loss_type": "cispo"}, 5 * 2 * math.log(2)),
    ("cispo has no lower bound", 0.1, -2.0, {"loss_type": "cispo"}, -0.1 * 2 * math.log(2)),
    ("importance", 1.1, 2.0, {"importance_weights": 0.5}, -1.1),
    ("entropy", 1.1, 0.0, {"entropy_coef": 0.1}, -0.1 * math.log(2)),
    # ref = log(1/4), logp = log(1/2): gap = -log 2
    ("k1", 1.1, 0.0, {"kl_coef": 0.1, "kl_estimator": "k1"}, 0.1 * math.log(2)),
    ("k2", 1.1, 0.0, {"kl_coef": 0.1, "kl_estimator": "k2"}, 0.05 * math.log(2) ** 2),
    ("k3", 1.1, 0.0, {"kl_coef": 0.1, "kl_estimator": "k3"}, 0.1 * (0.5 + math.log(2) - 1)),
    (
        "importance is not on KL and entropy",
        1.1,
        0.0,
        {"kl_coef": 0.1, "kl_estimator": "k1", "entropy_coef": 0.2, "importance_weights": 0.5},
        -0.1 * math.log(2),
    ),
]


@pytest.mark.parametrize("module", [ops, ops.reference], ids=["op", "reference"])
@pytest.mark.parametrize("case", BY_HAND, ids=lambda c: c[0])
def test_values_by_hand(case: tuple, module: Any) -> None:
    """One token of probability 1/2, with weight 3."""
    _, ratio, advantage, options, loss = case
    one = torch.ones(1, dtype=torch.float64)
    if "importance_weights" in options:
        options = options | {"importance_weights": options["importance_weights"] * one}
    if "kl_coef" in options:
        options = options | {"ref_logprobs": math.log(0.25) * one}
    result = module.policy_loss(
        one[None], one[None].repeat(2, 1), torch.tensor([1]), math.log(0.5 / ratio) * one,
        advantage * one, 3 * one, **options,
    )  # fmt: skip
    torch.testing.assert_close(result.loss, torch.tensor(3 * loss, dtype=torch.float64))
    torch.testing.assert_close(result.metrics["ratio_max"], ratio * one[0])
    log_ratio = math.log(ratio)
    torch.testing.assert_close(result.metrics["approx_kl"], (ratio - 1 - log_ratio) * one[0])


# ---- the clip ----------------------------------------------------------------------------------

LOG_2 = math.log(2)
# log ratio, clip_low, clip_high, dual_clip: the ratio is 1/2, 1 or 2 and sits on an edge (or on
# two), or one ulp of its logarithm beside it.
EDGES = [
    (LOG_2, 0.5, 1.0, None),
    (-LOG_2, 0.5, 1.0, None),
    (0.0, 0.0, 0.0, None),
    (LOG_2, 0.2, 0.2, 2.0),
    (LOG_2, 0.5, 1.0, 2.0),
    (0.0, 0.0, 0.0, 1.0),
    (0.0, 0.2, 0.2, 1.0),
    (LOG_2 * (1 + 1e-15), 0.5, 1.0, None),
    (LOG_2 * (1 - 1e-15), 0.5, 1.0, None),
    (-LOG_2 * (1 + 1e-15), 0.5, 1.0, None),
    (-LOG_2 * (1 - 1e-15), 0.5, 1.0, None),
    (LOG_2 * (1 + 1e-15), 0.2, 0.2, 2.0),
    (LOG_2 * (1 - 1e-15), 0.2, 0.2, 2.0),
]


@pytest.mark.parametrize(("edge", "advantage"), list(itertools.product(EDGES, [1.5, -1.5, 0.0])))
def test_clip_edges_have_their_gradient(edge: tuple, advantage: float) -> None:
    """A ratio at an edge of the range is in it; at the dual clip it has half its gradient, as
    torch.minimum gives at a tie."""
    log_ratio, clip_low, clip_high, dual_clip = edge
    one = torch.ones(1, dtype=torch.float64)
    arguments = {
        "hidden": 0 * one[None],
        "weight": torch.ones(2, 1, dtype=torch.float64),
        "targets": torch.tensor([1]),
        "bias": torch.zeros(2, dtype=torch.float64),
        "old_logprobs": -LOG_2 * one - log_ratio,
        "advantages": advantage * one,
        "token_weights": one,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
    }
    call = Sample("edge", OP, arguments)
    got, expected = evaluate(ops, call).results, evaluate(ops.reference, call).results
    if log_ratio in (LOG_2, 0.0, -LOG_2):
        assert float(expected["ratio_max"]) in (0.5, 1.0, 2.0)
    for name in ("loss", "d bias", "clip_fraction", "live_fraction"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-14, atol=0, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ratio_to_its_own_logprobs_is_exactly_one(dtype: torch.dtype) -> None:
    """So that a clip range without width clips nothing on-policy."""
    call = Sample("on-policy", OP, one_policy(head("on-policy", (40,), 16, 700), 1.0, 1.0))
    call = call.to(dtype).but(clip_low=0.0, clip_high=0.0)
    metrics = call.call(old_logprobs=call.call().logprobs).metrics
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
    assert metrics["clip_fraction"] == metrics["approx_kl"] == 0


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    """Its coefficient is min(r, ratio_max) A: never 0, and the ratio carries no gradient."""
    arguments = head("cispo", (5,), 8, 20)
    gradients = {}
    for ratio in (0.1, 1.0, 1.27, 1.28, 5.0):
        call = Sample("cispo", OP, one_policy(arguments, ratio, -0.5))
        call = call.but(loss_type="cispo", loss_options={"ratio_max": 1.28})
        result = evaluate(ops, call).results
        gradients[ratio] = result["d hidden"]
        assert result["clip_fraction"] == (1 if ratio == 5.0 else 0) or ratio == 1.28
    for ratio, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, gradients[1.0] * min(ratio, 1.28), rtol=1e-10, atol=1e-14
        )


# ---- masks and live tokens ---------------------------------------------------------------------

PER_TOKEN = ("old_logprobs", "advantages", "ref_logprobs", "importance_weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss_type", ["ppo", "cispo"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_excluded_tokens_may_hold_anything(
    garbage: float, loss_type: str, dtype: torch.dtype
) -> None:
    call = sample(OP, "every term" + ", cispo" * (loss_type == "cispo")).to(dtype)
    excluded = call.arguments["token_weights"] == 0
    assert 5 < excluded.sum() < 40
    dirty = {k: call.arguments[k].masked_fill(excluded, garbage) for k in PER_TOKEN}
    dirty["hidden"] = call.arguments["hidden"].masked_fill(excluded[..., None], garbage)
    dirty["targets"] = call.arguments["targets"].masked_fill(excluded, -100)
    dirty["targets"][0, excluded[0].nonzero()[0]] = 10**12
    clean = evaluate(ops, call).results
    got = evaluate(ops, call.but(**dirty)).results
    for name in clean:
        assert torch.equal(clean[name], got[name]), name
    assert all(not got[name][excluded].any() for name in ("logprobs", "entropy", "d hidden"))


@pytest.mark.parametrize("garbage", [math.nan, 0.0, -1.0, math.inf])
def test_excluded_tokens_may_hold_any_temperature(garbage: float) -> None:
    call = sample(OP, "temperature per token").to(torch.float32)
    excluded = call.arguments["token_weights"] == 0
    clean = evaluate(ops, call).results
    temperature = call.arguments["temperature"].masked_fill(excluded, garbage)
    got = evaluate(ops, call.but(temperature=temperature)).results
    for name in clean:
        assert torch.equal(clean[name], got[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_excluded_tokens_change_no_bit(dtype: torch.dtype) -> None:
    """A batch with excluded tokens strewn in is the batch without them."""
    call = sample(OP, "dual clip").to(dtype)
    keep = (call.arguments["token_weights"] != 0).reshape(-1)
    flat = {
        name: x.reshape(-1, *x.shape[2:])[keep] if name not in ("weight", "dual_clip") else x
        for name, x in call.arguments.items()
    }
    without = evaluate(ops, Sample("kept", OP, flat)).results
    got = evaluate(ops, call).results
    assert torch.equal(got["loss"], without["loss"])
    assert torch.equal(got["d weight"], without["d weight"])
    for name in ("logprobs", "entropy", "d hidden"):
        rows = got[name].reshape(-1, *got[name].shape[2:])
        assert torch.equal(rows[keep], without[name]), name


def dead_and_live(dtype: torch.dtype) -> tuple[Sample, Tensor]:
    """300 tokens of every sort; where there is a gradient."""
    base = head("live", (300,), 16, 60)
    logprobs = ops.reference.lm_head_logprobs(**base).logprobs
    sort = torch.arange(300) % 6
    log_ratio = torch.tensor([0.05, 0.05, 0.5, -0.5, 0.5, 0.05], dtype=torch.float64)[sort]
    advantage = torch.tensor([1.0, 0.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[sort]
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)[sort]
    arguments = base | {
        "old_logprobs": logprobs - log_ratio,
        "advantages": advantage,
        "token_weights": weight / 300,
    }
    return Sample("live", OP, arguments).to(dtype), (sort == 0) | (sort == 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_without_gradient_leave_exact_zeros(dtype: torch.dtype) -> None:
    """Weight 0, advantage 0, ratio clipped above (A > 0) and below (A < 0)."""
    call, live = dead_and_live(dtype)
    got = evaluate(ops, call).results
    assert torch.equal(got["d hidden"].any(-1), live)
    assert got["live_fraction"] == torch.tensor(100 / 300, dtype=accumulator(dtype))
    assert got["clip_fraction"] == torch.tensor(100 / 250, dtype=accumulator(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_without_gradient_leave_dw_alone(dtype: torch.dtype) -> None:
    """dW of the whole batch is dW of its live tokens; only the order of its sums may differ."""
    call, live = dead_and_live(dtype)
    rows = {k: x if k == "weight" else x[live] for k, x in call.arguments.items()}
    whole = evaluate(ops, call).results["d weight"].double()
    expected = evaluate(ops, Sample("live only", OP, rows)).results["d weight"].double()
    eps = torch.finfo(dtype).eps
    assert (whole - expected).norm() <= 4 * eps * expected.norm()


def test_an_entropy_or_kl_term_makes_every_included_token_live() -> None:
    call, _ = dead_and_live(torch.float32)
    share = torch.tensor(250 / 300)
    assert call.call(entropy_coef=0.01).metrics["live_fraction"] == share
    ref = call.arguments["old_logprobs"] - 0.3
    assert call.call(ref_logprobs=ref, kl_coef=0.1).metrics["live_fraction"] == share


def test_a_reference_without_coefficient_is_only_measured() -> None:
    call = sample(OP, "dual clip").to(torch.float32)
    nan = torch.full_like(call.arguments["advantages"], math.nan)
    found = call.call(ref_logprobs=nan)
    assert torch.equal(found.loss, call.call().loss)
    assert found.metrics["ref_kl"].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 9])
def test_a_batch_of_excluded_tokens_is_a_differentiable_zero(
    tokens: int, dtype: torch.dtype
) -> None:
    arguments = with_policy("none", head("none", (tokens,), 8, 11))
    arguments["token_weights"] = torch.zeros(tokens, dtype=torch.float64)
    call = Sample("none", OP, arguments).to(dtype)
    leaves = call.leaves()
    result = call.call(**leaves)
    (result.loss * 3).backward()
    assert result.loss == 0
    assert not leaves["hidden"].grad.any()
    assert not leaves["weight"].grad.any()
    assert leaves["weight"].grad.shape == (11, 8)
    assert all(x == 0 for x in result.metrics.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_micro_batches_sum_to_the_batch(parts: int, dtype: torch.dtype, tolerance: float) -> None:
    call = sample(OP, "1030 rows").but(entropy_coef=0.01).to(dtype)
    whole = evaluate(ops, call).results
    per_token = ("hidden", "targets", "old_logprobs", "advantages", "token_weights")
    splits = zip(*(call.arguments[k].chunk(parts) for k in per_token), strict=True)
    results = [
        evaluate(ops, call.but(**dict(zip(per_token, x, strict=True)))).results for x in splits
    ]
    assert len(results) == parts

    def near(got: Tensor, expected: Tensor) -> bool:
        return bool((got - expected).norm() <= tolerance * expected.norm())

    for name in ("loss", "d weight"):
        assert near(sum(r[name] for r in results), whole[name]), name
    for name in ("logprobs", "entropy", "d hidden"):
        assert near(torch.cat([r[name] for r in results]), whole[name]), name


def test_a_boolean_mask_is_a_weight() -> None:
    call = sample(OP, "dual clip").to(torch.float32)
    mask = call.arguments["token_weights"] != 0
    assert torch.equal(
        call.call(token_weights=mask).loss, call.call(token_weights=mask.float()).loss
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_loss_is_differentiable(dtype: torch.dtype) -> None:
    call = sample(OP, "dual clip").to(dtype)
    result = call.call(**call.leaves())
    assert result.loss.requires_grad
    assert result.loss.shape == ()
    assert result.loss.dtype == result.logprobs.dtype == accumulator(dtype)
    shape = call.arguments["targets"].shape
    for x in (result.logprobs, result.entropy, result.token_losses, *result.metrics.values()):
        assert not x.requires_grad
        assert x.dtype == accumulator(dtype)
    assert result.logprobs.shape == result.entropy.shape == shape
    assert tuple(result.metrics) == METRICS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_twice_is_bitwise_equal(dtype: torch.dtype) -> None:
    call = sample(OP, "every term").to(dtype)
    first, second = evaluate(ops, call).results, evaluate(ops, call).results
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---- sequences ---------------------------------------------------------------------------------


KL = {"kl_coef": 0.1, "kl_estimator": "k2"}
"""With it, the tokens of a sequence differ in their coefficients."""


def check_against_two_ops(lengths: list[int], vocab: int, kl: dict[str, Any]) -> None:
    """One call against lm_head_logprobs with the loss in torch on top, and against itself without
    gradients."""
    tokens = sum(lengths)
    call = Sample("sequences", OP, with_policy("sequences", head("sequences", (tokens,), 8, vocab)))
    call = call.to(torch.float32)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    options: dict[str, Any] = {"ratio_level": "sequence", "clip_low": 3e-3, "clip_high": 4e-3}
    options |= kl
    reference = {"ref_logprobs": call.arguments["old_logprobs"] - 0.3} if kl else {}
    call = call.but(sequence_ids=ids, **options, **reference)
    mine = evaluate(ops, call).results
    leaves = call.leaves()
    found = ops.lm_head_logprobs(**leaves, targets=call.arguments["targets"])
    names = ("old_logprobs", "advantages", "token_weights")
    given = [call.arguments[name] for name in names]
    settings = policy_losses.settings(**options)
    loss = ops.reference.loss_of_logprobs(
        found.logprobs, found.entropy, *given, settings, sequence_ids=ids, **reference
    )
    loss.loss.backward()
    assert 0 < mine["clip_fraction"] < 1
    assert 0 < mine["live_fraction"] < 1
    for name in ("hidden", "weight"):
        grad = leaves[name].grad
        assert (mine[f"d {name}"] - grad).norm() < 1e-5 * grad.norm(), name
    torch.testing.assert_close(mine["loss"], loss.loss.detach())
    for name, x in loss.metrics.items():
        torch.testing.assert_close(mine[name], x, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        quiet = call.call()
    assert torch.equal(quiet.loss, mine["loss"])
    assert torch.equal(quiet.metrics["clip_fraction"], mine["clip_fraction"])


@pytest.mark.parametrize("kl", [{}, KL], ids=["alone", "with KL"])
def test_sequences_over_several_chunks(kl: dict[str, Any]) -> None:
    """In the emulator 128 tokens fit into a chunk of this vocabulary; without gradients 256 do on
    the CPU."""
    check_against_two_ops([5, 400, 3, 140, 60], 700, kl)


def test_a_sequence_of_many_tokens_is_scanned_twice() -> None:
    """Its logits, of the four in five tokens that have weight, are more than the CPU's block for
    sequences, 256 MiB."""
    check_against_two_ops([200, 2900, 100], 32003, KL)


def test_sequences_are_in_order() -> None:
    """Else it is an error, or on a device whose values the host does not read, nan."""
    call = sample(OP, "sequence, packed").to(torch.float32)
    ids = call.arguments["sequence_ids"].clone()
    ids[1, -20:] = 1
    if EMULATED or DEVICE == "cuda":
        result = evaluate(ops, call.but(sequence_ids=ids)).results
        assert result["loss"].isnan() and result["d weight"].isnan().any()
        return
    with pytest.raises(
        ValueError, match=r"sequence_ids.flatten\(\)\[70\] must not be below.*9, got 1"
    ):
        call.call(sequence_ids=ids)
