#!/usr/bin/env bash
# The checks of `make test`. All of them run, also after one has failed; arguments go to pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export OMP_WAIT_POLICY=PASSIVE  # threads that spin while they wait make a busy machine crawl
failed=()
skipped=()

check() {  # check NAME COMMAND...
  local name=$1 began=$SECONDS verdict=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || { verdict=FAILED; failed+=("$name"); }
  printf '== %s: %s, %d s\n' "$name" "$verdict" $((SECONDS - began))
}

clang_format() {
  find csrc -regex '.*\.\(h\|cpp\|cuh\|cu\)' -print0 |
    xargs -0 --no-run-if-empty clang-format --dry-run -Werror
}

compile_cuda() {
  mkdir -p build/check
  cmake -S . -B build/check -G Ninja -DBUPO_CUDA=CHECK -DBUPO_PYTHON="$PWD/.venv/bin/python" \
    >build/check/configure.log || { cat build/check/configure.log; return 1; }
  cmake --build build/check --target bupo_cuda
}

check "ruff check" python -m ruff check
check "ruff format" python -m ruff format --check
check "clang-format" clang_format
check "mypy" python -m mypy
if command -v nvcc >/dev/null; then
  check "CUDA sources compile (BUPO_CUDA=CHECK)" compile_cuda
else
  skipped+=("nvcc not found: CUDA sources not compiled")
fi
check "pytest" python -m pytest python_tests -q -n "${TEST_PROCESSES:-2}" --dist worksteal \
  --durations=10 "$@"

printf '\n== %d s in all\n' "$SECONDS"
for reason in "${skipped[@]}"; do printf 'skipped: %s\n' "$reason"; done
for name in "${failed[@]}"; do printf 'FAILED: %s\n' "$name"; done
[ ${#failed[@]} -eq 0 ]
