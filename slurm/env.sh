# shellcheck shell=bash
# What all jobs of this folder need to know of a cluster; sourced by their scripts, from the repository.
# Set a variable before `sbatch`, or for good in slurm/site.sh (not in git), which is also the place for `module load`.

# refuse WORDS: say what is to be mended, and end the job for good.
refuse() {
    echo "error: $*" >&2
    exit 2
}

# A job that was submitted by a job inherits what that one was told of itself: its place in an array, and its lives.
forget_others() {
    local told
    # Lines of this job alone. Names and comments may look like anything of Slurm's, but have lines that begin otherwise.
    told=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n "/^JobId=${SLURM_JOB_ID:-} /,/^\$/p")
    [ -n "$told" ] || return 0
    [[ $told == "JobId=$SLURM_JOB_ID ArrayJobId=${SLURM_ARRAY_JOB_ID:-} ArrayTaskId=${SLURM_ARRAY_TASK_ID:-} "* ]] ||
        unset "${!SLURM_ARRAY_@}"
    ! grep -Eq '^ *Requeue=[01] Restarts=0 ' <<<"$told" || unset SLURM_RESTART_COUNT
}
forget_others

if [ -f slurm/site.sh ]; then
    set -a # what it sets, the supervisor and the ranks are to see
    # shellcheck source=/dev/null
    source slurm/site.sh
    set +a
fi

# The environment that `make demo` makes, on a file system that all nodes see.
export ECDIT_PYTHON=${ECDIT_PYTHON:-$PWD/.venv/bin/python}

# A container: what stands before each rank, such as "apptainer exec --nv /images/ecdit.sif", or flags of srun, such as
# "--container-image=/images/ecdit.sqsh --container-mounts=$PWD". ECDIT_PYTHON is then the one inside, and
# ECDIT_HOST_PYTHON (3.11 or later, nothing installed) supervises from outside. With pyxis, "--container-name=..." has an
# image unpacked once a job and not for each of three steps; docs/slurm.md, "Sites that differ", says when to.
read -ra ECDIT_WRAPPER <<<"${ECDIT_WRAPPER:-}"
read -ra ECDIT_SRUN_FLAGS <<<"${ECDIT_SRUN_FLAGS:-}"
ECDIT_HOST_PYTHON=${ECDIT_HOST_PYTHON:-$ECDIT_PYTHON}

# Where the run is kept. A job of the same name goes on with it; tasks of an array have one each.
job=${SLURM_JOB_NAME:-run}
[[ ! ${job%.sh} =~ ^\.*$ ]] || refuse "--job-name=$job: names no folder; choose another, or set ECDIT_OUTPUT"
ECDIT_OUTPUT=${ECDIT_OUTPUT:-runs/${job%.sh}}
ECDIT_OUTPUT+=${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

# A rehearsal is the same job on CPU ranks, with a model that has everything but size.
if [ "${ECDIT_REHEARSAL:-0}" = 1 ]; then
    ECDIT_RECIPE=${ECDIT_RECIPE:-rehearsal}
    export ECDIT_REHEARSAL CUDA_VISIBLE_DEVICES=
fi

# What sbatch was told to keep from the job (--export) srun would keep from the ranks, and this file's variables with it.
export SLURM_EXPORT_ENV=ALL
# Slurm 22.05 and later do not hand the processors of a task on to srun by themselves.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
# Sockets of ranks by their node's fast network where the site has told (slurm/site.sh): NCCL's own guess may be the
# slow one, and gloo takes the one that the host name resolves to. Data goes over InfiniBand all the same.
if [ -n "${ECDIT_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$ECDIT_INTERFACE GLOO_SOCKET_IFNAME=$ECDIT_INTERFACE
fi
# Warnings of NCCL tell which link or peer failed; its default is silence.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A collective that fails or hangs ends its process, so that the job ends within minutes instead of at its time limit.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# What each rank was doing then, for finding the one that did not come: one file a rank in the run's folder.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$ECDIT_OUTPUT/slurm/nccl_trace_rank_}
# Kernels of collectives and of the model in the order in which they were called, so that sums of gradients start early.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Masked and unmasked phases, and evaluation, have other sizes: segments that grow keep memory from fragmenting.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# Hundreds of ranks that ask a hub at once are blocked by it; everything is on the disk.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# supervise COMMAND -- TRAIN.py ARGUMENTS: checks, the one srun of a script, and another life where there should be one.
supervise() {
    on_host ecdit_ds/slurm/supervise.py "$@"
}

# confirm COMMAND: the one srun of an array's script, whose 0 is 75 unless every rank has reported that its work is complete.
confirm() {
    on_host ecdit_ds/slurm/run_task.py "${ECDIT_COMPLETION_DIR:-runs/.completion}" "$@"
}

on_host() {
    command -v "$ECDIT_HOST_PYTHON" >/dev/null || refuse "ECDIT_HOST_PYTHON: $ECDIT_HOST_PYTHON cannot be run; $ways_to_python"
    exec "$ECDIT_HOST_PYTHON" "$@"
}

# refuse_same_task ARGUMENTS: tasks of an array that are all told to be the same --task would write over one another.
refuse_same_task() {
    local argument
    for argument; do
        [[ ! $argument =~ ^--task(=|$) || ${SLURM_ARRAY_TASK_COUNT:-1} -le 1 ]] ||
            refuse "--task: names one task, and this array has $SLURM_ARRAY_TASK_COUNT; submit with --array=0"
    done
}

ways_to_python="make .venv/installed makes the environment, or name another in slurm/site.sh"
[ -n "${ECDIT_WRAPPER[*]}${ECDIT_SRUN_FLAGS[*]}" ] || command -v "$ECDIT_PYTHON" >/dev/null ||
    refuse "ECDIT_PYTHON: $ECDIT_PYTHON cannot be run; $ways_to_python"
