#!/usr/bin/env bash
# A wheel from a source distribution, and what somebody has who installs it alone, without vLLM, with
# the oldest torch that bupo supports and with the newest. Arguments: other versions of torch. From
# PyPI a torch is gigabytes. The wheel lies in dist/; its platform is this machine's glibc, so the
# ones to publish are made in a manylinux container (.github/workflows/wheels.yml). Environment:
# WHEEL, one that is there already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
root=$PWD
py=$root/.venv/bin/python
[ $# -gt 0 ] || set -- 2.11.0 2.15.0

if [ -z "${WHEEL:-}" ]; then
  rm -rf dist build/wheel
  PATH="$root/.venv/bin:$PATH" "$py" -m build --no-isolation --outdir build/wheel .
  PATH="$root/.venv/bin:$PATH" "$py" -m auditwheel repair --wheel-dir dist \
    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcud*' build/wheel/*.whl
fi
wheel=$(echo ${WHEEL:-$root/dist/*.whl})

for version in "$@"; do
  folder=$root/build/wheel-torch-$version
  if [ ! -e "$folder/ready" ]; then
    rm -rf "$folder"
    "$py" -m venv "$folder"
    "$folder/bin/python" -m pip install -qq "torch==$version" pytest pytest-timeout hypothesis filelock
    touch "$folder/ready"
  fi
  "$folder/bin/python" -m pip install -qq --force-reinstall --no-deps "$wheel"
  "$folder/bin/python" -m pip install -qq "$wheel"
  cd "$folder"  # away from the sources
  echo "== torch $("$folder/bin/python" -c 'import torch; print(torch.__version__)')," \
    "$("$folder/bin/python" -c 'import bupo; print(bupo.__file__)')"
  "$root/.venv/bin/torch-abi-audit" --check torch "$folder"/lib/python3*/site-packages/bupo
  "$folder/bin/pytest" -q -c "$root/pyproject.toml" "$root"/python_tests/test_{lm_head,policy_loss}.py \
    "$root"/python_tests/test_ops_{errors,autograd,tensors}.py
  rm -rf run
  "$folder/bin/bupo" run steps=2 bupo.steps=1 out=run
  cd "$root"
done
