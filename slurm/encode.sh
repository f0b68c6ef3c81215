#!/bin/bash
# Pictures with captions into a training set, a GPU a task:
#     sbatch --array=0-63 slurm/encode.sh SRC DST --vae VAE --text T5
# Arguments are those of `tools/encode_data.py encode`. Whichever task is last publishes DST. Submitted again, it goes on
# where it was, with any number of tasks; one task alone: sbatch --array=3 slurm/encode.sh SRC DST ... --task 3/64.
#SBATCH --job-name=encode
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=8G
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
if ! cd "${ECDIT_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || [ ! -f slurm/env.sh ]; then
    echo "error: $PWD is not the repository; submit from it, or set ECDIT_ROOT to where it is" >&2
    exit 2
fi
source slurm/env.sh

refuse_same_task "$@"
confirm srun --kill-on-bad-exit=1 "${ECDIT_SRUN_FLAGS[@]}" "${ECDIT_WRAPPER[@]}" slurm/rank.sh tools/encode_data.py encode "$@"
