#!/bin/bash
# EC-DiT-XL with 8 experts, 2.5 billion parameters, on one node:
#     sbatch slurm/train_xl_8e.sh --set data.path=DIR --set data.heldout_path=DIR
# Arguments are train.py's. Flags of sbatch change any number below; docs/slurm.md tells the rest.
#SBATCH --job-name=train_xl_8e
#SBATCH --nodes=1
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
    ecdit_ds/train.py --config "${ECDIT_RECIPE:-ecdit_xl_8e_node}" --deepspeed ds_configs/zero2_overlap.json \
    --output "$ECDIT_OUTPUT" "$@"
