#!/usr/bin/env bash
# Trains: ./run_train.sh [TOML] [--section.key=value ...]
#
#   ./run_train.sh                                       train_configs/debug.toml, about a minute on a CPU
#   ./run_train.sh train_configs/shakespeare.toml --training.steps=100
#   NGPU=8 ./run_train.sh train_configs/gpt_oss_656m.toml
#   ./run_train.sh --help                                every option
#
# NGPU: processes on this machine (default: its GPUs, else 1). MAX_RESTARTS: times that a job which
# lost a rank begins again from its newest checkpoint (default 0). MICROTRON_VENV: where to install
# (default: .venv beside this file). The first call installs, later ones start at once.
#
# Several machines: call this on each with the same NNODES, MASTER_ADDR (the host of node 0) and
# MASTER_PORT (free there; default 29500), and its own NODE_RANK, from 0. Under SLURM, one task a
# node, all of this is taken from SLURM (examples/slurm.sh). A platform that starts one process a
# GPU, and says so (RANK and WORLD_SIZE, or SLURM with several tasks a node), needs no launcher:
# each of its processes becomes that rank.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
venv=${MICROTRON_VENV:-$here/.venv}

config=$here/train_configs/debug.toml
if [[ $# -gt 0 && $1 != -* ]]; then
  config=$1
  shift
fi
arguments=("--job.config_file=$config" "$@")
refuse() {
  echo "error: $1" >&2
  exit 1
}

gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
NGPU=${NGPU:-$((gpus > 0 ? gpus : 1))}
if [[ -n ${SLURM_NTASKS:-} && -n ${SLURM_PROCID:-} ]]; then
  if [[ -z ${MASTER_ADDR:-} && ${SLURM_JOB_NODELIST:-} =~ ^[^[,]+(\[([0-9]+)[^]]*\][^,]*)? ]]; then
    MASTER_ADDR=${BASH_REMATCH[0]} # node[07-09,12],other1: the first is node07
    [[ -n ${BASH_REMATCH[2]:-} ]] && MASTER_ADDR=${MASTER_ADDR/\[*\]/${BASH_REMATCH[2]}}
  fi
  MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-9500} % 20000))} # jobs may share a node
  if [[ -z ${NNODES:-} && $SLURM_NTASKS != "${SLURM_NNODES:-1}" ]]; then
    RANK=${RANK:-$SLURM_PROCID} WORLD_SIZE=${WORLD_SIZE:-$SLURM_NTASKS}
    LOCAL_RANK=${LOCAL_RANK:-${SLURM_LOCALID:-}}
  fi
  NNODES=${NNODES:-${SLURM_NNODES:-1}} NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
fi

if [[ -n ${RANK:-} && -n ${WORLD_SIZE:-} ]]; then # a process of a platform: this is one rank
  for name in RANK WORLD_SIZE; do
    [[ ${!name} =~ ^[0-9]+$ ]] || refuse "$name='${!name}' is not a number: the platform sets it, or unset RANK"
  done
  ((RANK < WORLD_SIZE)) || refuse "RANK=$RANK is not below WORLD_SIZE=$WORLD_SIZE: correct them, or unset RANK"
  [[ $WORLD_SIZE == 1 || -n ${MASTER_ADDR:-} ]] ||
    refuse "WORLD_SIZE=$WORLD_SIZE needs MASTER_ADDR: give every process the host of rank 0 (or unset RANK)"
  [[ ${NGPU} =~ ^[1-9][0-9]*$ ]] || refuse "NGPU='$NGPU' is not a number of processes: give 1 or more"
  export RANK WORLD_SIZE LOCAL_RANK=${LOCAL_RANK:-$((RANK % NGPU))}
  export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
  export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # its stack dumps drown the one line
  exec "$venv/bin/python" -m microtron.train "${arguments[@]}"
fi
alone=$NGPU/${NNODES:-1}/${NODE_RANK:-0}/${MAX_RESTARTS:-0}
if [[ $alone == 1/1/0/0 || " $* " =~ " --help " || " $* " =~ " -h " ]]; then
  exec "$venv/bin/python" -m microtron.train "${arguments[@]}" # no launcher to wait for
fi
exec "$venv/bin/python" -m microtron.launch --nproc-per-node="$NGPU" --nnodes="${NNODES:-1}" \
  --node-rank="${NODE_RANK:-}" --master-addr="${MASTER_ADDR:-}" --master-port="${MASTER_PORT:-}" \
  --max-restarts="${MAX_RESTARTS:-0}" -- "${arguments[@]}"
