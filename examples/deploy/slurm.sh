#!/usr/bin/env bash
# Peers on a SLURM cluster, one for each node, each with all GPUs of its node. They join a run whose
# coordinator is elsewhere, together with machines that are not in the cluster at all. An array
# instead of one large job: each peer starts when a node is free, and leaves when its time is over.
#
#   sbatch --array=1-8 slurm.sh coordinator.example.org:29400 train.py --lr 3e-4
#
#SBATCH --job-name=decotrain
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
set -euo pipefail

join=$1
shift
# Compute nodes usually cannot be dialled from outside: --dial-only says so at once.
decotrain run --join "$join" --run home --token-file "$HOME/.decotrain/run.token" \
  --name "slurm-${SLURM_ARRAY_TASK_ID:-0}-$(hostname -s)" --dial-only --nproc-per-node gpu "$@" &
peer=$!
trap 'kill -TERM "$peer"' TERM  # SLURM's signal goes to this shell; the peer leaves in order
wait "$peer" || true
wait "$peer"
