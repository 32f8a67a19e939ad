"""Builds bupo._C through CMake and Ninja; every compiler flag is in CMakeLists.txt."""

import os
import runpy
import shutil
import subprocess
import sys
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


def cuda_mode() -> str:
    """$BUPO_CUDA (OFF, CHECK or ON), else ON exactly when torch has CUDA and nvcc is there."""
    torch = Path(find_spec("torch").submodule_search_locations[0])
    torch_cuda = runpy.run_path(str(torch / "version.py"))["cuda"]  # importing torch takes seconds
    default = "ON" if torch_cuda and shutil.which("nvcc") else "OFF"
    return os.environ.get("BUPO_CUDA", "").upper() or default


class CMakeBuild(build_ext):
    """Builds in build/<mode>, which stays: the next build compiles only what changed."""

    def run(self) -> None:
        mode = cuda_mode()
        in_place = self.inplace or self.editable_mode
        package = ROOT / "bupo" if in_place else Path(self.build_lib).resolve() / "bupo"
        build = ROOT / "build" / mode.lower()
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(f"{tool} not found: `pip install {tool}`, or use `make setup`")
        ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
        options = [f"-DBUPO_CUDA={mode}", f"-DBUPO_PYTHON={sys.executable}"]
        cmake("-S", ROOT, "-B", build, *ninja, *options)
        cmake("--build", build)
        cmake("--install", build, "--prefix", package)
        if not in_place:  # a source tree has them beside the package
            shutil.copytree(ROOT / "recipes", package / "recipes", dirs_exist_ok=True)


def cmake(*arguments: object) -> None:
    if subprocess.run(["cmake", *map(str, arguments)]).returncode:
        sys.exit(f"`cmake {' '.join(map(str, arguments))}` failed; its reason is above")


not_python = ["CMakeLists.txt", *glob("csrc/**/*.*", recursive=True), *glob("recipes/*.*")]
setup(
    ext_modules=[Extension("bupo._C", sources=[], depends=not_python)],  # depends: into the sdist
    cmdclass={"build_ext": CMakeBuild},
)
