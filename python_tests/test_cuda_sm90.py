"""The Hopper path without a GPU: all of csrc/cuda/sm90 but the product itself, which a plain loop
replaces (emulator/head_scan.cpp; test_head_scan.py runs the real one). test_cuda_emulated.py runs
the operators' own tests on it; here is what only this path has: references, places, E kept for the
backward.
"""

from pathlib import Path

import pytest
from emulation import run_script

HOPPER = """
library.emulator_capability(90)
ops.set_workspace_bytes(1 << 30)
bf16 = torch.bfloat16
# Three roundings to bfloat16 (of E, of dz or of x times its scale, of the result), 1.7e-3 each in
# the mean, and a few entries that dominate these small samples.
LIMIT = 4e-3

def wide(**options):
    # Several tiles and splits of the vocabulary, several tiles of rows, targets in all of them.
    return sample(bf16, tokens=150, width=16, vocab=2600, scale=0.7, **options)

def head(call):
    return {name: call[name] for name in ("hidden", "weight", "targets", "bias")}

def near(call, gap=0.1):
    # old_logprobs near the present ones
    with torch.no_grad():
        logprobs = ops.lm_head_logprobs(**head(call)).logprobs
    noise = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(3))
    return call | {"old_logprobs": logprobs + gap * noise}
"""


def run(library: Path, text: str) -> str:
    return run_script(library, HOPPER + text)


def test_which_calls_it_serves(emulated: Path) -> None:
    """Hopper alone, bfloat16, no softcap, a weight that TMA can read."""
    text = """
def served(capability=90, dtype=bf16, width=16, offset=0, kernels="auto", **options):
    library.emulator_capability(capability)
    ops.set_cuda_kernels(kernels)
    weight = torch.randn(40 * width + 8).to(dtype)[offset:][: 40 * width].view(40, width)
    before = library.emulator_scans()
    ops.lm_head_logprobs(torch.randn(3, width).to(dtype), weight, torch.arange(3), **options)
    ops.set_cuda_kernels("auto")
    return library.emulator_scans() > before

assert served() and served(bias=torch.randn(40).to(bf16)) and served(offset=8)
assert served(kernels="sm90_cooperative") and served(kernels="sm90_pingpong")
assert not served(kernels="portable")
for capability in (80, 89, 100, 120):  # Blackwell has no wgmma
    assert not served(capability)
assert not served(dtype=torch.float32) and not served(softcap=5.0)
assert not served(width=12) and not served(offset=1)
"""
    run(emulated, text)


def test_log_probs_are_the_same_bits_in_any_call(emulated: Path) -> None:
    """Alone, elsewhere in a batch, with and without gradient, by either op, in other chunks."""
    text = """
call = wide()
with torch.no_grad():
    whole = ops.lm_head_logprobs(**head(call))
def same(got, rows):
    for x, y in zip(got, whole):
        assert torch.equal(x, y[rows])
everything = torch.arange(150)
same(ops.lm_head_logprobs(**head(call)), everything)
for rows in (everything[7:8], everything.flip(0), everything[100:141:3]):
    part = head(call) | {"hidden": call["hidden"][rows], "targets": call["targets"][rows]}
    same(ops.lm_head_logprobs(**part), rows)
    with torch.no_grad():
        same(ops.lm_head_logprobs(**part), rows)
for budget in (1 << 18, 1 << 30):
    ops.set_workspace_bytes(budget)
    policy = ops.policy_loss(**call)
    rows = call["token_weights"].nonzero().squeeze(1)
    same((policy.logprobs[rows], policy.entropy[rows]), rows)
    same(ops.lm_head_logprobs(**head(call)), everything)
assert library.emulator_scans() > 8
"""
    run(emulated, text)


def test_gradients_are_near_those_of_float64(emulated: Path) -> None:
    """Within the house's twice of plain torch's error, and the roundings that the path makes."""
    text = """
for budget in (1 << 19, 1 << 30):
    ops.set_workspace_bytes(budget)
    for options in ({}, {"clip_low": 0.02, "clip_high": 0.02}, {"entropy_coef": 0.3},
                    {"kl_coef": 0.2, "ref_logprobs": True}, {"temperature": 0.6},
                    {"temperature": torch.linspace(0.5, 1.5, 150)}):
        call = near(wide())
        if "ref_logprobs" in options:
            options = options | {"ref_logprobs": call["old_logprobs"] - 0.3}
        truth = run(double(call), ops.reference, **{
            k: x.double() if torch.is_tensor(x) else x for k, x in options.items()})
        got = run(call, **options)
        plain = run(call, ops.reference, **options)
        for x, y, z in zip(got[1], truth[1], plain[1]):
            limit = min(LIMIT, 2 * error([z], [y]))
            assert error([x], [y]) < limit, (budget, options, error([x], [y]), limit)
        live = float(got[0].metrics["live_fraction"])
        assert abs(live - float(truth[0].metrics["live_fraction"])) < 1e-6
"""
    run(emulated, text)


@pytest.mark.parametrize("gap", [0.0, 12.0, -12.0, 70.0, -70.0, 3000.0, -3000.0])
def test_any_old_log_prob_is_served(emulated: Path, gap: float) -> None:
    """A guess of L that is off by any number of nats: tiles find their own reference. cispo, whose
    gradient has no ratio that would overflow first."""
    text = f"""
call = near(wide(), 0.1)
call["old_logprobs"] += {gap}
truth = run(double(call), ops.reference, loss_type="cispo")
got = run(call, loss_type="cispo")
for x, y in zip(got[1], truth[1]):
    assert y.norm() == 0 or error([x], [y]) < LIMIT, error([x], [y])
"""
    run(emulated, text)


def test_kept_products_give_the_backward(emulated: Path) -> None:
    """Once kept, once recomputed; twice through a retained graph; upstream of every kind."""
    text = """
for capability, limit in ((90, LIMIT), (80, 3e-3)):
    library.emulator_capability(capability)
    for upstream in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -0.5, 0.3)):
        found = {}
        for budget in (1 << 30, 1 << 19):
            ops.set_workspace_bytes(budget)
            call = wide()
            call["targets"][5:40] = -100
            leaves = [call[name] for name in ("hidden", "weight", "bias")]
            weights = torch.randn(3, 150, generator=torch.Generator().manual_seed(5))
            def total(out):
                return sum((c * w * x).sum() for c, w, x in zip(upstream, weights, out))
            scans = library.emulator_scans()
            loss = total(ops.lm_head_logprobs(**head(call)))
            forward = library.emulator_scans() - scans
            first = torch.autograd.grad(loss, leaves, retain_graph=True)
            again = torch.autograd.grad(loss, leaves)
            assert all(torch.equal(x, y) for x, y in zip(first, again))
            backward = library.emulator_scans() - scans - forward
            if capability == 90:
                assert (backward == 0) == (budget == 1 << 30), (forward, backward, budget)
            exact = double(call)
            truth = torch.autograd.grad(
                total(ops.reference.lm_head_logprobs(**head(exact))),
                [exact[name] for name in ("hidden", "weight", "bias")])
            for x, y in zip(first, truth):
                assert error([x], [y]) < limit, (capability, upstream, budget, error([x], [y]))
            assert not first[0][5:40].any()
            found[budget] = first
        a, b = found.values()
        if capability == 80:  # the same products, the same bits: but dW is added up otherwise
            assert torch.equal(a[0], b[0])
"""
    run(emulated, text)


def test_clipped_rows_add_nothing(emulated: Path) -> None:
    """They have stored E, which the products read."""
    text = """
call = near(wide(), 0.5)
call["advantages"] = torch.ones(150)
for clip in (1e-3, 0.2, 1.0):
    options = {"clip_low": min(clip, 0.999), "clip_high": clip}
    truth = run(double(call), ops.reference, **options)
    got = run(call, **options)
    live = float(truth[0].metrics["live_fraction"])
    assert 0.3 < live < 0.9, live
    for x, y in zip(got[1], truth[1]):
        assert error([x], [y]) < LIMIT
    dead = truth[1][0].abs().sum(1) == 0
    assert dead.any() and not got[1][0][dead].any()
"""
    run(emulated, text)


def test_under_graph_capture_every_row_keeps_its_place(emulated: Path) -> None:
    """And masked rows may still hold anything."""
    text = """
call = near(wide())
with torch.no_grad():
    call["hidden"][call["token_weights"] == 0] = float("nan")
    call["old_logprobs"][call["token_weights"] == 0] = float("inf")
normal = run(call)
reads = library.emulator_reads()
library.emulator_capturing(True)
captured = run(call)
out = ops.lm_head_logprobs(**head(call))
grads = torch.autograd.grad(out.logprobs[call["token_weights"] != 0].sum(), [call["hidden"]])
library.emulator_capturing(False)
assert library.emulator_reads() == reads
assert torch.equal(normal[0].loss, captured[0].loss)
assert torch.isfinite(captured[1][1]).all()
assert error(captured[1], [x.double() for x in normal[1]]) < 5e-3
"""
    run(emulated, text)


def test_a_backward_may_be_captured_though_its_forward_was_not(emulated: Path) -> None:
    """The forward has put its rows in places, and under capture every row keeps its own."""
    text = """
call = wide()
call["targets"][5:100] = -100
leaves = [call[name] for name in ("hidden", "weight", "bias")]
def loss():
    out = ops.lm_head_logprobs(**head(call))
    return (out.logprobs * torch.arange(150) / 150).sum()
normal = torch.autograd.grad(loss(), leaves)
eager = loss()
library.emulator_capturing(True)
captured = torch.autograd.grad(eager, leaves)
library.emulator_capturing(False)
assert error(captured, [x.double() for x in normal]) < 5e-3
assert not captured[0][5:100].any()
"""
    run(emulated, text)


def test_what_is_kept_by_one_path_is_not_read_by_the_other(emulated: Path) -> None:
    """A weight that was offloaded may come back at an address that TMA cannot read."""
    text = """
call = wide()
leaves = [call[name] for name in ("hidden", "weight", "bias")]
normal = torch.autograd.grad(ops.lm_head_logprobs(**head(call)).logprobs.sum(), leaves)
for first, second in (("auto", "portable"), ("portable", "auto")):
    ops.set_cuda_kernels(first)
    loss = ops.lm_head_logprobs(**head(call)).logprobs.sum()
    ops.set_cuda_kernels(second)
    other = torch.autograd.grad(loss, leaves)
    assert error(other, [x.double() for x in normal]) < 5e-3
"""
    run(emulated, text)


def test_a_row_of_nan_spares_the_others(emulated: Path) -> None:
    text = """
call = wide()
with torch.no_grad():
    good = ops.lm_head_logprobs(**head(call))
    call["hidden"][7] = float("nan")
    call["hidden"][9, 0] = float("inf")
    got = ops.lm_head_logprobs(**head(call))
others = torch.tensor([i for i in range(150) if i not in (7, 9)])
for x, y in zip(got, good):
    assert torch.equal(x[others], y[others])
    assert x[7].isnan() and x[9].isnan()
targets = call["targets"].clone()
targets[3], targets[4] = 2600, -1
with torch.no_grad():
    got = ops.lm_head_logprobs(**head(call) | {"targets": targets})
assert all(x[3:5].isnan().all() for x in got)
"""
    run(emulated, text)


def test_half_of_the_vocabulary_masked_by_the_bias(emulated: Path) -> None:
    """Whole tiles without mass, before and after others; and a row without any."""
    text = """
for masked in (slice(0, 1400), slice(1100, 2600), slice(0, 2600, 2)):
    call = wide()
    with torch.no_grad():
        call["bias"][masked] = -float("inf")
    allowed = torch.ones(2600, dtype=torch.bool)
    allowed[masked] = False
    call["targets"] = allowed.nonzero().squeeze(1)[call["targets"] % int(allowed.sum())]
    call = near(call)
    truth, got = run(double(call), ops.reference), run(call)
    torch.testing.assert_close(got[0].logprobs.double(), truth[0].logprobs, rtol=1e-5, atol=1e-5)
    for x, y in zip(got[1], truth[1]):
        assert error([x], [y]) < LIMIT, (masked, error([x], [y]))
    assert not got[1][1][masked].any()
"""
    run(emulated, text)
