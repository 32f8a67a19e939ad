#!/usr/bin/env bash
# Builds the documentation site into build/site; every warning is an error. Arguments go to mkdocs.
# The notebooks in docs/notebooks are run for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"  # ruff formats the signatures of the reference
export NO_MKDOCS_2_WARNING=1        # a notice of the theme, on standard error
python -m mkdocs build --strict "$@"  # not --quiet, with which warnings do not count
echo "[docs] ready: build/site/index.html; the search needs a server: python -m http.server -d build/site"
