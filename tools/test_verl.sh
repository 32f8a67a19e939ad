#!/usr/bin/env bash
# bupo's engine in a real verl, on the CPU. verl and vLLM need different versions of transformers, so
# this makes an environment of its own, .venv-verl (a few minutes, once). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh  # the extension, for the same Python
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
py=.venv-verl/bin/python
if [ ! -e .venv-verl/ready ]; then
  .venv/bin/python -m venv --clear .venv-verl
  torch=$(.venv/bin/python -c 'import torch; print(torch.__version__)')
  printf 'torch==%s\n' "$torch" >.venv-verl/constraints.txt
  requirements=$(.venv/bin/python -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(project["optional-dependencies"]["verl"]))')
  mapfile -t wanted <<<"$requirements"
  "$py" -m pip install -qq -c .venv-verl/constraints.txt "torch==$torch" "${wanted[@]}" pytest
  touch .venv-verl/ready
fi
# What an installation would say of bupo's entry points.
.venv/bin/python setup.py -q egg_info --egg-base .venv-verl
PYTHONPATH="$PWD:$PWD/.venv-verl" "$py" -m pytest -q --noconftest -p no:cacheprovider -o addopts= -o timeout= \
  python_tests/verl_samples.py "$@"
