"""A rank that trains nothing: it writes down what it was given, and ends as it was told.

WITNESS is the folder to write into. WITNESS_CODES tells how training ends in each life, such as `42,hang,save,0`: with
an exit code, not at all, or by SIGTERM or SIGUSR1 with a checkpoint of step 40. WITNESS_DRY_RUNS tells the same of dry
runs. What it does not tell of ends well.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ecdit_ds.errors import ExitCode
from ecdit_ds.slurm.completion import DRY_RUN, NODE_CHECK, mark_complete, training_to
from ecdit_ds.slurm.job_history import newest_step

KEPT = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURMD_NODENAME",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
)


def main() -> int:
    """Return the exit code that was asked for."""
    environment = {name: os.environ.get(name) for name in KEPT}
    life = int(environment["SLURM_RESTART_COUNT"] or 0)
    what = "dry_run" if "--dry-run" in sys.argv else Path(sys.argv[1]).stem
    name = f"{environment['SLURM_JOB_ID']}.{life}.{what}.{environment['RANK']}.json"
    seen = {"environment": environment, "arguments": sys.argv[1:]}
    (Path(os.environ["WITNESS"]) / name).write_text(json.dumps(seen))
    output = Path(sys.argv[sys.argv.index("--output") + 1])
    told = os.environ.get({"train": "WITNESS_CODES", "dry_run": "WITNESS_DRY_RUNS"}.get(what, ""))
    code = told.split(",")[life] if told else "0"
    if code == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
        time.sleep(600)
    if code == "save":
        signal.sigwait((signal.SIGTERM, signal.SIGUSR1))  # held back by slurm/rank.sh
        (output / "checkpoints" / "step_40").mkdir(parents=True)
        (output / "checkpoints" / "step_40" / "manifest.json").touch()
        return ExitCode.CHECKPOINTED
    if code == "0":
        mark_complete({"dry_run": DRY_RUN, "preflight": NODE_CHECK}.get(what) or training_to(newest_step(output)))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
