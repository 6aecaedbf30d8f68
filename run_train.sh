#!/usr/bin/env bash
# Trains: ./run_train.sh [TOML] [--section.key=value ...]
#
#   ./run_train.sh                                       train_configs/debug.toml, about a minute on a CPU
#   ./run_train.sh train_configs/shakespeare.toml --training.steps=100
#   NGPU=8 ./run_train.sh train_configs/gpt_oss_656m.toml
#   ./run_train.sh --help                                every option
#
# NGPU: processes on this machine (default: its GPUs, else 1). MICROTRON_VENV: where to install
# (default: .venv beside this file). The first call installs, later ones start at once.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
venv=${MICROTRON_VENV:-$here/.venv}

config=$here/train_configs/debug.toml
if [[ $# -gt 0 && $1 != -* ]]; then
  config=$1
  shift
fi
gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
NGPU=${NGPU:-$((gpus > 0 ? gpus : 1))}
if ! [[ $NGPU =~ ^[1-9][0-9]*$ ]]; then
  echo "error: NGPU='$NGPU' is not a number of processes: give 1 or more" >&2
  exit 1
fi

arguments=("--job.config_file=$config" "$@")
if [[ $NGPU == 1 ]]; then
  exec "$venv/bin/python" -m microtron.train "${arguments[@]}" # no launcher to wait for
fi
exec "$venv/bin/torchrun" --nproc-per-node "$NGPU" --standalone --local-ranks-filter 0 \
  -m microtron.train "${arguments[@]}"
