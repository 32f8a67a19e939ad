"""The CUDA operators without a GPU: their sources, kernels included, compiled for the host.

emulator/ plays the device: a block's threads are fibers, products come from torch's CPU library.
The result then takes over the operators' CPU key in a process of its own, and the tests of the CPU
operators run again, with a workspace so small that every call has several blocks and chunks.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent


@pytest.fixture(scope="session")
def library() -> Path:
    tools = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    build = ROOT / "build" / "emulated"
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DBUPO_PYTHON={sys.executable}"]
    for command in (configure, ["cmake", "--build", build, "--target", "bupo_emulated"]):
        done = subprocess.run(command, env=tools, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build / "libbupo_emulated.so"


@pytest.mark.parametrize(
    ("file", "left_out", "workspace", "at_least"),
    [
        ("test_policy_loss.py", "micro_batches", 300_000, 150),
        ("test_policy_loss.py", "micro_batches or buffers", 1 << 24, 150),
        (
            "test_lm_head.py",  # what takes minutes here, or is about the CPU's own products
            "many or more_logits or number_of_threads or buffers or without_block_products",
            300_000,
            110,
        ),
    ],
)
def test_the_tests_of_the_cpu_operators(
    library: Path, file: str, left_out: str, workspace: int, at_least: int
) -> None:
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", str(HERE / file)]
    environment = {"BUPO_EMULATED": str(library), "BUPO_WORKSPACE": str(workspace)}
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


SCRIPT = """
import ctypes, os, sys, torch
import bupo.ops as ops
from bupo.ops import operands
operands.DTYPES["cpu"] += (torch.float16,)
torch.ops.load_library(sys.argv[1])
library = ctypes.CDLL(sys.argv[1])
library.emulator_reads.restype = ctypes.c_int64

def sample(dtype, seed=0, tokens=300, width=24, vocab=151):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, generator=g) / tokens
    return dict(
        hidden=torch.randn(tokens, width, generator=g).to(dtype).requires_grad_(),
        weight=(torch.randn(vocab, width, generator=g) * 0.8).to(dtype).requires_grad_(),
        targets=torch.randint(vocab, (tokens,), generator=g),
        old_logprobs=-8 * torch.rand(tokens, generator=g),
        advantages=torch.randn(tokens, generator=g) * (torch.rand(tokens, generator=g) < 0.5),
        token_weights=weights * (torch.rand(tokens, generator=g) < 0.8),
        bias=torch.randn(vocab, generator=g).to(dtype).requires_grad_(),
    )

def run(call, api=ops, **options):
    result = api.policy_loss(**call, **options)
    leaves = [call[name] for name in ("hidden", "weight", "bias")]
    return result, torch.autograd.grad(result.loss, leaves)

def error(got, truth):
    return max(
        float((a.double() - b).norm() / b.norm().clamp(min=1e-300)) for a, b in zip(got, truth)
    )

def double(call):
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in call.items()
    }
"""


def run_script(library: Path, text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT + text, str(library)],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_float16(library: Path) -> None:
    """Small coefficients and small probabilities survive 5 bits of exponent."""
    text = """
for scale in (1.0, 1e-5):
    for workspace in (1 << 17, 1 << 30):
        library.emulator_workspace(ctypes.c_int64(workspace))
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
    run_script(library, text)


def test_graph_capture_reads_nothing_and_gives_the_same(library: Path) -> None:
    text = """
for dtype in (torch.float32, torch.bfloat16):
    library.emulator_workspace(ctypes.c_int64(1 << 17))
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
    run_script(library, text)


def test_targets_out_of_range_give_nan_and_spare_other_rows(library: Path) -> None:
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
    run_script(library, text)


def test_a_row_does_not_depend_on_its_batch(library: Path) -> None:
    """Statistics of a row are a function of its products alone. (On a GPU the products' own batch
    invariance is the library's affair; here they are the same.)"""
    text = """
call = sample(torch.float32)
whole = ops.lm_head_logprobs(call["hidden"].detach(), call["weight"], call["targets"])
library.emulator_workspace(ctypes.c_int64(1 << 17))
parts = ops.lm_head_logprobs(call["hidden"].detach(), call["weight"], call["targets"])
assert all(torch.equal(x, y) for x, y in zip(whole, parts))
"""
    run_script(library, text)


def test_a_flat_tail_beside_one_large_entry_is_not_lost(library: Path) -> None:
    """Hundreds of terms of one thread, each below half an ulp of its running sum."""
    text = """
weight = torch.full((40001, 1), -17.0)
weight[0] = 0
got = ops.lm_head_logprobs(torch.ones(1, 1), weight, torch.ones(1).long())
truth = torch.logsumexp(weight.double(), 0).item()
assert abs(got.logsumexp.item() - truth) < 5e-7, (got.logsumexp.item(), truth)
"""
    run_script(library, text)


def test_float64_is_refused(library: Path) -> None:
    text = """
try:
    run(double(sample(torch.float32)))
except ValueError as error:
    assert "bupo.ops.policy_loss: hidden of float64 is not supported on this device" in str(error)
else:
    raise AssertionError("accepted")
"""
    run_script(library, text)


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
            f"-I{HERE / 'emulator'}",
            source,
            "-o",
            shared,
        ],
        check=True,
    )
    assert ctypes.CDLL(str(shared)).missed() == 1
