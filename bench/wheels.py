"""What a machine without a network lacks for gpu_check.py: how to get it, and how to use it."""

import sys
from pathlib import Path

from conduct import Command, Failed

WHEELS = """\
# the build
pybind11 'setuptools>=77' 'cmake>=3.25' ninja nvidia-cutlass==4.2.0.0
# the tests
pytest pytest-timeout pluggy iniconfig packaging pygments hypothesis sortedcontainers
pytest-xdist execnet
# the training loop
'omegaconf==2.4.*' math-verify==0.9.0 latex2sympy2-extended==1.11.0
antlr4-python3-runtime==4.13.2 rich markdown-it-py mdurl
# peers (all optional; the kernels alone, without what their trainers need)
liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0 verl==0.9.1
# liger's and QuACK's Hopper kernels by CuTe (optional, 100 MB)
nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1
nvidia-cutlass-dsl-libs-cu13==4.8.1 apache-tvm-ffi
quack-kernels==0.6.5 torch-c-dlpack-ext einops
# liger's native kernels (optional, 84 MB; nvshmem is on a machine with torch's CUDA 13)
liger-cute-kernels==0.8.5 apache-tvm-ffi
"""
# The versions of the peers are those that peers.py was written for.
PLATFORMS = ("_2_28", "_2_27", "_2_24", "_2_17", "2014")
"""Of manylinux: pip takes a wheel for exactly the platforms that are named."""


def download_commands() -> str:
    """For Python 3.12 on x86-64. What the machine has already can be left out."""
    platforms = " ".join(f"--platform manylinux{name}_x86_64" for name in PLATFORMS)
    fixed = f"--no-deps --only-binary=:all: --python-version 3.12 --implementation cp {platforms}"
    lines = WHEELS.splitlines()
    command = f"python3 -m pip download {fixed} -d wheels"
    return "\n".join(line if line.startswith("#") else f"{command} {line}" for line in lines)


def install_command(wheels: Path, site: Path) -> Command:
    """Installs into a private folder, so that nothing that is installed already changes."""
    found = sorted(str(path.resolve()) for path in wheels.glob("*.whl"))
    if not found:
        raise Failed(f"--wheels {wheels}: no wheel in it; --list-wheels says how to get them")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    return [*pip, "--upgrade", "--target", str(site), *found]
