#!/usr/bin/env bash
# Sets up what is missing, then runs all tests: tests/run.sh [pytest arguments]
#   tests/run.sh -m slow        the slow ones      tests/run.sh -m gpu      those that need a GPU
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
./setup.sh dev
venv=${MICROTRON_VENV:-$here/.venv}
# More threads than free cores make small tensors many times slower; tests need no network.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$venv/bin/ruff" check . && "$venv/bin/ruff" format --check .
"$venv/bin/python" -m pytest "$@"
