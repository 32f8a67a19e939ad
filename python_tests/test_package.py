"""The package as pip meets it: its libraries, its source distribution, and what a build says."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from torch_abi_audit import inspect_package

from bupo import ops

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "bupo" / "libbupo_ops.so"


def test_the_operators_need_no_python_and_only_what_torch_keeps_stable() -> None:
    report = inspect_package(str(ROOT / "bupo"))
    assert report.torch_verdict == "torch-stable"
    assert report.min_torch_version == ops.build_info()["torch_target"] + ".0"
    command = ["nm", "-D", "--undefined-only", LIBRARY]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "torch_library_impl" in symbols
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]


def test_a_source_distribution_has_all_that_cmake_reads(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.glob("bupo-*/"))
    assert not (source / "python_tests").exists()
    configure = ["cmake", "-S", source, "-B", tmp_path / "build", "-G", "Ninja"]
    done = subprocess.run(
        [*configure, f"-DBUPO_PYTHON={sys.executable}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (source / "recipes" / "arithmetic.yaml").exists()


def build(folder: Path, *programs: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py where torch has CUDA and there are these programs, which say what they are told
    and fail."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda = '13.0'\n")
    for name in programs:
        (folder / name).write_text('#!/bin/sh\necho "told $*"\nexit 1\n')
        (folder / name).chmod(0o755)
    lines = [
        f"import runpy, sys; sys.path.insert(0, {str(folder)!r})",
        f"sys.executable = {str(folder / 'python')!r}",  # whose folder is the first on the PATH
        "sys.argv = ['setup.py', 'build_ext', '--inplace']",
        "runpy.run_path('setup.py', run_name='__main__')",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("cuda", "built"), [("", "OFF"), ("OFF", "OFF"), ("on", "ON")])
def test_kernels_are_compiled_only_if_asked_for(tmp_path: Path, cuda: str, built: str) -> None:
    done = build(tmp_path, "cmake", "ninja", "nvcc", BUPO_CUDA=cuda)
    assert f"-DBUPO_CUDA={built}" in done.stdout
    advice = "with BUPO_CUDA=ON in the environment also the CUDA kernels"
    assert (advice in done.stderr) == (built == "OFF")


def test_what_is_missing_is_said_before_anything_is_built(tmp_path: Path) -> None:
    there = dict(PATH=str(tmp_path), CUDA_HOME=str(tmp_path), CXX="no-compiler")
    done = build(tmp_path, "cmake", BUPO_CUDA="ON", **there)
    assert done.returncode == 1 and "told" not in done.stdout
    *_, said = done.stderr.partition("bupo cannot be built, for it needs\n")
    missing = [
        "a C++20 compiler (no-compiler is none)",
        "ninja: ",
        f"nvcc on PATH or in {tmp_path}",
    ]
    assert all(m in line for m, line in zip(missing, said.splitlines(), strict=True))
