"""The CUDA sources compiled for the host: how tests build and run them (emulator/)."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parent


BUILD = ROOT / "build" / "emulated"
PATH = os.pathsep.join(
    [
        str(Path(sys.executable).parent),
        os.environ["PATH"],
        f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin",
    ]
)


def build(target: str) -> None:
    """Builds it if it is not. bupo_emulated: the library that takes over the operators' CPU key."""
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DBUPO_PYTHON={sys.executable}"]
    BUILD.parent.mkdir(exist_ok=True)
    with FileLock(BUILD.parent / "emulated.lock"):  # tests run in several processes
        for command in (configure, ["cmake", "--build", BUILD, "--target", target]):
            done = subprocess.run(
                command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


TILE_COLUMNS = {"portable": 0, "cooperative": 256, "pingpong": 192}
"""of the paths of a CUDA call"""


def cuda_plan(
    library: ctypes.CDLL,
    tokens: int,
    width: int,
    vocab: int,
    *,
    element: int = 2,
    gradients: bool = True,
    weight_gradient: bool = True,
    half: bool = False,
    budget: int = 4 << 30,
    path: str = "pingpong",
) -> dict[str, int]:
    """How a call would be cut (csrc/cuda/choose.h)."""
    shape = (tokens, width, vocab, element, gradients, weight_gradient, half)
    out = (ctypes.c_int64 * 3)()
    library.bupo_plan(
        ctypes.c_int64(TILE_COLUMNS[path]),
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_int64(budget),
        out,
    )
    return dict(zip(("chunk", "accumulate", "bytes"), out))


SCRIPT = """
import ctypes, os, sys, torch
import bupo.ops as ops
from bupo.ops import operands
operands.DTYPES["cpu"] += (torch.float16,)
torch.ops.load_library(sys.argv[1])
library = ctypes.CDLL(sys.argv[1])
for count in (library.emulator_reads, library.emulator_scans, library.emulator_logit_rows):
    count.restype = ctypes.c_int64

def sample(dtype, seed=0, tokens=300, width=24, vocab=151, scale=0.8):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, generator=g) / tokens
    return dict(
        hidden=torch.randn(tokens, width, generator=g).to(dtype).requires_grad_(),
        weight=(torch.randn(vocab, width, generator=g) * scale).to(dtype).requires_grad_(),
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
    """Runs text in a process of its own, after SCRIPT."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT + text, str(library)],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout
