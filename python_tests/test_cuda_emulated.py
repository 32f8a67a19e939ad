"""The CUDA operators without a GPU: their sources, kernels included, compiled for the host.

emulator/ plays the device: a block's threads are fibers, products come from torch's CPU library.
The result then takes over the operators' CPU key in a process of its own, and the tests of the CPU
operators run again, with a workspace so small that every call has several chunks.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from emulation import HERE, ROOT, run_script

POLICY, HEAD, DIVERGENCE = "test_policy_loss.py", "test_lm_head.py", "test_divergence.py"
# What takes minutes here, or is about the CPU's own products.
SLOW = "micro_batches or many or more_logits or number_of_threads or buffers or what_other"
SMALL, LARGE = 300_000, 1 << 24


@pytest.mark.parametrize(
    ("capability", "file", "workspace", "at_least"),
    [
        (80, POLICY, SMALL, 150),
        (80, POLICY, LARGE, 150),
        (80, HEAD, SMALL, 110),
        (80, HEAD, LARGE, 110),
        (90, POLICY, SMALL, 90),
        (90, POLICY, LARGE, 90),
        (90, HEAD, SMALL, 60),
        (90, HEAD, LARGE, 60),
        (80, DIVERGENCE, SMALL, 30),
    ],
)
def test_the_tests_of_the_cpu_operators(
    emulated: Path, capability: int, file: str, workspace: int, at_least: int
) -> None:
    """With the large workspace a forward keeps its products for the backward."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", str(HERE / file)]
    environment = {
        "BUPO_EMULATED": str(emulated),
        "BUPO_WORKSPACE": str(workspace),
        "BUPO_CAPABILITY": str(capability),
    }
    # Hopper's own path is of bfloat16; float32 takes the other there too.
    left_out = f"{SLOW} or float32" if capability == 90 else SLOW
    if (capability, workspace) != (80, SMALL):  # the formulas of losses are the same everywhere
        left_out += " or sapo or dppo or dro or vespo or cispo"
    done = subprocess.run(
        [*command, "-k", f"not ({left_out})"],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= at_least, done.stdout[-500:]


def test_float16(emulated: Path) -> None:
    """Small coefficients and small probabilities survive 5 bits of exponent."""
    text = """
for scale in (1.0, 1e-5):
    for workspace in (1 << 17, 1 << 30):
        ops.set_workspace_bytes(workspace)
        call = sample(torch.float16)
        call["token_weights"] *= scale
        truth = run(double(call), ops.reference)
        got = run(call)
        assert got[1][0].dtype == torch.float16
        # With small weights float16 cannot hold the results themselves.
        limit = 2e-3 + 1.5 * error([x.half() for x in truth[1]], truth[1])
        assert error(got[1], truth[1]) < limit, (scale, workspace, error(got[1], truth[1]))
        logprobs = got[0].logprobs.double()
        torch.testing.assert_close(logprobs, truth[0].logprobs, rtol=1e-5, atol=1e-5)
"""
    run_script(emulated, text)


def test_graph_capture_reads_nothing_and_gives_the_same(emulated: Path) -> None:
    text = """
for dtype in (torch.float32, torch.bfloat16):
    ops.set_workspace_bytes(1 << 17)
    call = sample(dtype)
    before = library.emulator_reads()
    normal = run(call)
    chunks = library.emulator_reads() - before
    assert chunks > 1, chunks
    library.emulator_capturing(True)
    captured = run(call)
    library.emulator_capturing(False)
    assert library.emulator_reads() == before + chunks
    assert torch.equal(normal[0].loss, captured[0].loss)
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    assert error(captured[1], [x.double() for x in normal[1]]) < limit
"""
    run_script(emulated, text)


def test_a_gradient_is_scaled_by_what_the_device_reads(emulated: Path) -> None:
    text = """
for dtype, count in ((torch.float32, 5), (torch.bfloat16, 300_000), (torch.float16, 1000)):
    x = torch.randn(count).to(dtype)
    for scale in (1.0, 0.5, -3.0):
        y = x.clone()
        torch.ops.bupo.scale_(y, torch.tensor(scale))
        assert torch.equal(y, (x.float() * scale).to(dtype)), (dtype, scale)
"""
    run_script(emulated, text)


@pytest.mark.parametrize(("capability", "path"), [(80, "portable"), (90, "pingpong")])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_call_takes_the_memory_that_was_planned(
    emulated: Path, plan: Callable[..., dict[str, int]], capability: int, path: str, gradients: bool
) -> None:
    """The chunks are cut by a formula, the memory is laid out piece by piece: they must agree, or a
    call takes more than its budget."""
    text = f"""
library.emulator_capability({capability})
ops.set_workspace_bytes(1 << 18)
call = sample(torch.bfloat16, tokens=700, width=64, vocab=800)
with torch.set_grad_enabled({gradients}), torch.profiler.profile(profile_memory=True) as seen:
    ops.policy_loss(**call)
print(max(event.cpu_memory_usage for event in seen.events()))
"""
    planned = plan(
        700, 64, 800, budget=1 << 18, path=path, gradients=gradients, weight_gradient=gradients
    )["bytes"]
    taken = int(run_script(emulated, text).split()[-1])
    pieces = 16  # at most, each rounded up to 256 bytes
    assert planned / 2 < taken <= planned + 256 * pieces


def test_masked_tokens_are_not_multiplied(emulated: Path) -> None:
    text = """
for workspace in (1 << 17, 1 << 30):
    ops.set_workspace_bytes(workspace)
    call = sample(torch.float32)
    before = library.emulator_logit_rows()
    run(call)
    assert library.emulator_logit_rows() - before == int((call["token_weights"] != 0).sum()) < 300
"""
    run_script(emulated, text)


def test_targets_out_of_range_give_nan_and_spare_other_rows(emulated: Path) -> None:
    text = """
call = sample(torch.float32)
good = ops.lm_head_logprobs(call["hidden"], call["weight"], call["targets"])
for wrong in (-1, -(2**40), 151, 2**40):
    targets = call["targets"].clone()
    targets[7] = wrong
    got = ops.lm_head_logprobs(call["hidden"], call["weight"], targets)
    assert all(x[7].isnan() for x in got)
    others = torch.arange(300) != 7
    assert all(torch.equal(x[others], y[others]) for x, y in zip(got, good))
"""
    run_script(emulated, text)


def test_a_row_does_not_depend_on_its_batch(emulated: Path) -> None:
    """Statistics of a row are a function of its products alone. (On a GPU the products' own batch
    invariance is the library's affair; here they are the same.)"""
    text = """
call = sample(torch.float32)
whole = ops.lm_head_logprobs(call["hidden"].detach(), call["weight"], call["targets"])
ops.set_workspace_bytes(1 << 17)
parts = ops.lm_head_logprobs(call["hidden"].detach(), call["weight"], call["targets"])
assert all(torch.equal(x, y) for x, y in zip(whole, parts))
"""
    run_script(emulated, text)


def test_a_flat_tail_beside_one_large_entry_is_not_lost(emulated: Path) -> None:
    """Hundreds of terms of one thread, each below half an ulp of its running sum."""
    text = """
weight = torch.full((40001, 1), -17.0)
weight[0] = 0
got = ops.lm_head_logprobs(torch.ones(1, 1), weight, torch.ones(1).long())
truth = torch.logsumexp(weight.double(), 0).item()
assert abs(got.logsumexp.item() - truth) < 5e-7, (got.logsumexp.item(), truth)
"""
    run_script(emulated, text)


def test_float64_is_refused(emulated: Path) -> None:
    text = """
try:
    run(double(sample(torch.float32)))
except ValueError as error:
    assert "bupo.ops.policy_loss: hidden of Double is not supported on this device" in str(error)
else:
    raise AssertionError("accepted")
"""
    run_script(emulated, text)


def test_the_emulator_notices_a_barrier_that_not_all_threads_reach(tmp_path: Path) -> None:
    """What would hang a GPU must not pass here."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler
    source = tmp_path / "kernel.cpp"
    source.write_text(
        """
#include "emulator.h"
extern "C" int missed() {
  try {
    emulator::run(1, 64, [] { if (threadIdx.x < 32) __syncthreads(); });
  } catch (const std::logic_error&) { return 1; }
  return 0;
}
"""
    )
    shared = tmp_path / "kernel.so"
    subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-shared",
            "-fPIC",
            "-U_FORTIFY_SOURCE",
            f"-I{HERE / 'emulator'}",
            f"-I{HERE / 'emulator' / 'cuda'}",
            source,
            "-o",
            shared,
        ],
        check=True,
    )
    assert ctypes.CDLL(str(shared)).missed() == 1
