#!/bin/bash
# Pictures from a checkpoint, each task a share of them in a folder of its own, DIR/task_I_of_N:
#     sbatch --array=0-63 slurm/sample.sh --checkpoint RUN --prompts FILE --output DIR
# Arguments are those of tools/sample.py. Killed or submitted again, it goes on where it was; one task alone:
# sbatch --array=3 slurm/sample.sh ... --task 3/64. A model too large for one GPU, on eight a task:
#     sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/sample.sh --tp 2 --ep 4 --dtype bf16 --checkpoint RUN ...
#SBATCH --job-name=sample
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
confirm srun --kill-on-bad-exit=1 "${ECDIT_SRUN_FLAGS[@]}" "${ECDIT_WRAPPER[@]}" slurm/rank.sh tools/sample.py "$@"
