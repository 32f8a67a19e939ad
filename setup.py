"""Builds bupo/libbupo_ops.so and bupo/_C through CMake and Ninja (CMakeLists.txt).

The environment says what is built: BUPO_CUDA=ON adds the CUDA kernels, which takes minutes and is
therefore never done unasked; CHECK compiles them without linking them; CXX names the compiler.
"""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # its words for this: "2 matches found"
    found = f"setuptools {setuptools.__version__} is here, 77 or newer is needed"
    sys.exit(f"{found}: pip install -U 'setuptools>=77'")

ROOT = Path(__file__).resolve().parent
CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}:{CUDA_HOME}/bin"
MODE = os.environ.get("BUPO_CUDA", "").upper() or "OFF"


def torch_facts() -> dict[str, str | None]:
    """Version and CUDA of torch, which is not imported, as that takes seconds."""
    spec = find_spec("torch")
    places = spec.submodule_search_locations if spec else None
    return runpy.run_path(str(Path(places[0]) / "version.py")) if places else {}


def compiles() -> bool:
    """Whether the compiler takes C++20."""
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    try:
        return (
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
        )
    except OSError:
        return False


def missing(torch: dict[str, str | None]) -> list[str]:
    """What the build needs and this machine does not have, with the way to get it."""
    version = str(torch.get("__version__", "0.0")).split("+")[0].split(".")
    header = Path(sysconfig.get_path("include"), "Python.h")
    compiler = os.environ.get("CXX", "c++")
    needs = [
        ([int(part) for part in version[:2]] >= [2, 11], "torch 2.11 or newer: pip install torch"),
        (header.exists(), f"{header}: on Debian and Ubuntu apt install python3-dev"),
        (compiles(), f"a C++20 compiler ({compiler} is none): apt install g++, or set CXX"),
        (shutil.which("cmake"), "cmake: pip install cmake"),
        (shutil.which("ninja"), "ninja: pip install ninja"),
    ]
    if MODE == "ON":
        needs.append((torch.get("cuda"), "a torch with CUDA, which BUPO_CUDA=ON links"))
    if MODE != "OFF":
        needs.append((shutil.which("nvcc"), f"nvcc on PATH or in {CUDA_HOME}/bin, for BUPO_CUDA"))
    return [why for there, why in needs if not there]


class CMakeBuild(build_ext):
    """Builds in build/<mode>, which stays: the next build compiles only what changed."""

    def run(self) -> None:
        torch = torch_facts()
        if lacking := missing(torch):
            sys.exit("bupo cannot be built, for it needs\n  " + "\n  ".join(lacking))
        what = "CPU operators (about a minute)"
        if MODE == "OFF" and torch["cuda"]:
            what += "; with BUPO_CUDA=ON in the environment also the CUDA kernels (nvcc, minutes)"
        elif MODE != "OFF":
            what += f" and CUDA kernels (BUPO_CUDA={MODE}; several minutes)"
        print(f"bupo: building {what} for torch {torch['__version__']}", file=sys.stderr)
        in_place = self.inplace or self.editable_mode
        package = ROOT / "bupo" if in_place else Path(self.build_lib).resolve() / "bupo"
        build = ROOT / "build" / MODE.lower()
        ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
        options = [f"-DBUPO_CUDA={MODE}", f"-DBUPO_PYTHON={sys.executable}"]
        cmake("-S", ROOT, "-B", build, *ninja, *options)
        cmake("--build", build)
        cmake("--install", build, "--prefix", package)
        if not in_place:  # a source tree has them beside the package
            shutil.copytree(ROOT / "recipes", package / "recipes", dirs_exist_ok=True)


def cmake(*arguments: object) -> None:
    if subprocess.run(["cmake", *map(str, arguments)]).returncode:
        sys.exit(f"`cmake {' '.join(map(str, arguments))}` failed; its reason is above")


def local_version() -> dict[str, dict[str, str]]:
    """A package with CUDA kernels calls itself 0.1.0+cu13, after the CUDA of its torch."""
    cuda = str(torch_facts().get("cuda") or "").split(".")[0]
    return {"egg_info": {"tag_build": f"+cu{cuda}"}} if MODE == "ON" and cuda else {}


not_python = ["CMakeLists.txt", *glob("csrc/**/*.*", recursive=True), *glob("recipes/*.*")]
setup(
    ext_modules=[Extension("bupo._C", sources=[], depends=not_python)],  # depends: into the sdist
    cmdclass={"build_ext": CMakeBuild},
    options=local_version(),
)
