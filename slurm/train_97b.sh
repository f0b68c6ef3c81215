#!/bin/bash
# EC-DiT-M with 64 experts, 97 billion parameters:
#     sbatch slurm/train_97b.sh --set data.path=DIR --set data.heldout_path=DIR
# Arguments are train.py's. Flags of sbatch change any number below; docs/slurm.md tells the rest.
#SBATCH --job-name=train_97b
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
if ! cd "${ECDIT_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || [ ! -f slurm/env.sh ]; then
    echo "error: $PWD is not the repository; submit from it, or set ECDIT_ROOT to where it is" >&2
    exit 2
fi
source slurm/env.sh

supervise srun --kill-on-bad-exit=1 "${ECDIT_SRUN_FLAGS[@]}" "${ECDIT_WRAPPER[@]}" slurm/rank.sh --hold-signals -- \
    ecdit_ds/train.py --config "${ECDIT_RECIPE:-ecdit_m_64e}" --deepspeed ds_configs/zero2_overlap.json \
    --output "$ECDIT_OUTPUT" "$@"
