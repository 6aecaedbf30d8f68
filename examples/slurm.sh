#!/usr/bin/env bash
# A SLURM job on two nodes of eight GPUs: sbatch examples/slurm.sh [TOML] [--section.key=value ...]
#
# One task a node; run_train.sh there reads the number of nodes, this node's number and the first
# host from SLURM and starts a rank for each GPU. Submit from the repository's folder, after one
# ./run_train.sh --help on the login node has installed; code, data and outputs must lie on a file
# system that all nodes share. Two minutes before the time limit SLURM sends SIGTERM: the run saves
# and leaves, and the same sbatch goes on from there.
#SBATCH --job-name=microtron
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.out
set -euo pipefail
export NGPU=${NGPU:-8} MAX_RESTARTS=${MAX_RESTARTS:-2}
cd "${SLURM_SUBMIT_DIR:-.}"
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}" ./run_train.sh "$@"
