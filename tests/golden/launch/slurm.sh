#!/bin/bash
# nestling launch slurm law-bge.yaml --nodes 2 --gpus-per-node 8 --spot train.learning_rate=1e-5
#SBATCH --job-name=law-bge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=h100:8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --partition=preemptible
#SBATCH --account=law
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@180
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -uo pipefail
module load cuda/13.0
export NCCL_SOCKET_IFNAME=ib0
NESTLING_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NESTLING_HEAD

# Slurm tells this shell to stop; it tells the run, which saves and ends with 75: queue it again.
trap 'scancel --signal=USR2 "$SLURM_JOB_ID.0"' USR2
srun --kill-on-bad-exit=0 --wait=180 --cpus-per-task=96 \
  .venv/bin/python -m launch.node --nodes 2 --gpus-per-node 8 law-bge.yaml train.learning_rate=1e-5 &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
  wait "$step"
  code=$?
done
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
