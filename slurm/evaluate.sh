#!/bin/bash
# Scores of a run's checkpoints, one a task, in RUN/evaluation/step_N/METRIC:
#     sbatch --array=50-800:50 slurm/evaluate.sh RUN METRIC
# Index 50 is step 50,000: an index counts thousands of steps, since Slurm's usual limit for it (MaxArraySize) is 1000.
# ECDIT_STEPS_PER_INDEX=1 counts single steps. After METRIC come its flags, those of tools/evaluate.py; ECDIT_SCORES
# names a place other than RUN/evaluation, for scores with other flags. Submitted again, it goes on where it was.
#SBATCH --job-name=evaluate
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

[ $# -ge 2 ] || refuse "$# arguments; give RUN METRIC and the metric's flags"
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || refuse "no array; name checkpoints by sbatch --array=50,100 (thousands of steps)"
[[ ${ECDIT_STEPS_PER_INDEX:=1000} =~ ^[1-9][0-9]*$ ]] || refuse "ECDIT_STEPS_PER_INDEX=$ECDIT_STEPS_PER_INDEX is no number"
run=${1%/} metric=$2 step=$((SLURM_ARRAY_TASK_ID * ECDIT_STEPS_PER_INDEX))
checkpoint=$run/checkpoints/step_$step
shopt -s nullglob extglob
held=("$run"/checkpoints/step_+([0-9])/manifest.json)
held=("${held[@]%/manifest.json}")
[ -f "$checkpoint/manifest.json" ] || refuse "no checkpoint $checkpoint (index $SLURM_ARRAY_TASK_ID x" \
    "ECDIT_STEPS_PER_INDEX=$ECDIT_STEPS_PER_INDEX); there are ${#held[@]}: ${held[*]##*/}"

confirm srun --kill-on-bad-exit=1 "${ECDIT_SRUN_FLAGS[@]}" "${ECDIT_WRAPPER[@]}" slurm/rank.sh tools/evaluate.py "$metric" \
    --checkpoint "$checkpoint" --output "${ECDIT_SCORES:-$run/evaluation}/step_$step/$metric" "${@:3}"
