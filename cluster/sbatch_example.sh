#!/bin/bash
# Training on SLURM without submitit: a minimal script that saves, is requeued and resumes exactly. cluster/launch.py
# does more (a plan, checks of the nodes, tracebacks, giving up after two failures at the same step).
#
#   sbatch --nodes 4 --partition gpu cluster/sbatch_example.sh configs/dico_xl_t2i.yaml [key.path=value ...]
#
# Run it in the repository's root. It has one task per GPU: give --ntasks-per-node and --gpus-per-node the same value.
#SBATCH --job-name=dico
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

config=${1:?give a config: sbatch cluster/sbatch_example.sh CONFIG [key.path=value ...]}
shift

# Activates the environment, unless it was active when sbatch was called. Load the site's modules here, too.
[ -n "${VIRTUAL_ENV:-}" ] || source .venv/bin/activate

# The ranks connect to the first node. If names of nodes do not resolve, set MASTER_ADDR to an address.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK > 4 ? 4 : SLURM_CPUS_PER_TASK))}
export HF_HUB_OFFLINE=1  # weights: export DICO_WEIGHTS=FOLDER, see `dico prefetch`

# SIGUSR2 reaches the ranks 300 s before the limit; they save and exit with code 75.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python -m dico_t2i train --config "$config" "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
