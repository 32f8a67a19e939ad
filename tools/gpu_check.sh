#!/usr/bin/env bash
# Runs bench/gpu_check.py with a Python that has a CUDA torch: $PYTHON or python3 as it is, so that a
# machine without a network will do, else the one of `make setup`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has_cuda_torch() {  # without importing torch, which takes seconds
  "$1" -c '
import importlib.util, runpy, sys
spec = importlib.util.find_spec("torch")
if spec is None: sys.exit(1)
facts = runpy.run_path(spec.submodule_search_locations[0] + "/version.py")
sys.exit(not facts.get("cuda"))' 2>/dev/null
}

python=.venv/bin/python
if [ ! -x "$python" ] || ! has_cuda_torch "$python"; then
  python=${PYTHON:-python3}
  case " $* " in
    *" --dry_run "* | *" --list-wheels "* | *" --help "*) ;;
    *)
      if ! has_cuda_torch "$python"; then
        echo "[gpu-check] $python has no CUDA torch: make setup (needs a network)"
        tools/setup.sh
        python=.venv/bin/python
      fi
      ;;
  esac
fi
exec "$python" bench/gpu_check.py "$@"
