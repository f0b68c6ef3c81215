"""A rank that trains nothing: it writes down what it was given, and ends as it was told.

WITNESS is the folder to write into. WITNESS_CODES tells how training ends in each life, such as `42,hang,0`: with an
exit code, or not at all. What is no training (checks before it) ends well.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

KEPT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURMD_NODENAME",
        "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")  # fmt: skip


def main() -> int:
    """Return the exit code that was asked for."""
    environment = {name: os.environ.get(name) for name in KEPT}
    life = int(environment["SLURM_RESTART_COUNT"] or 0)
    what = "dry_run" if "--dry-run" in sys.argv else Path(sys.argv[1]).stem
    name = f"{environment['SLURM_JOB_ID']}.{life}.{what}.{environment['RANK']}.json"
    seen = {"environment": environment, "arguments": sys.argv[1:]}
    (Path(os.environ["WITNESS"]) / name).write_text(json.dumps(seen))
    code = os.environ["WITNESS_CODES"].split(",")[life] if what == "train" else "0"
    if code == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
        time.sleep(600)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
