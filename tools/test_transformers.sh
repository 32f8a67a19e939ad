#!/usr/bin/env bash
# What depends on transformers, with other versions of it than the one in .venv: the oldest that
# pyproject.toml allows, and the newest, or those that are named. Each is installed into a folder of
# its own, which comes first on the path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
py=.venv/bin/python
oldest=$(sed -n 's/^ *"transformers>=\([0-9.]*\)",$/\1/p' pyproject.toml)
newest=$("$py" -m pip index versions transformers 2>/dev/null | sed -n '1s/.*(\(.*\)).*/\1/p')
[ $# -gt 0 ] || set -- "$oldest" "$newest"
tests=(policy policy_head internal models transformers update decoding prompts two_turns)
failed=0
for version in "$@"; do
  folder=build/transformers-$version
  if [ ! -e "$folder/ready" ]; then
    rm -rf "$folder"
    "$py" -m pip install -qq --target "$folder" "transformers==$version.*"
    touch "$folder/ready"
  fi
  came=$(PYTHONPATH=$folder "$py" -c 'import transformers; print(transformers.__version__)')
  printf '== transformers %s\n' "$came"
  PYTHONPATH=$folder "$py" -m pytest -q -n 2 --dist worksteal -p no:cacheprovider \
    $(printf "python_tests/test_%s.py " "${tests[@]}") || failed=1
done
exit $failed
