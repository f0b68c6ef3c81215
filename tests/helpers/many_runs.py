"""Train every run of a plan, each on freshly forked ranks: a 2-rank run costs seconds, because imports are paid once.

    python tests/helpers/many_runs.py PLAN.json      # waves of runs, as `launch.train_many` writes them

A rank is a process with the environment that the `deepspeed` launcher gives it, and runs train.py's `main`. Besides
what every run leaves, `OUTPUT/rank_R.json` tells what rank R saw.
"""

import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}  # a fork cannot take a thread pool along

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # the engine's first use imports it, for seconds
import torch.utils.tensorboard  # noqa: F401

import ecdit_ds.training.setup
import ecdit_ds.training.trainer
from ecdit_ds.parallel import tensor_parallel  # noqa: F401
from ecdit_ds.runtime.signals import StopSignal
from ecdit_ds.train import main
from tests.helpers.launch import free_port
from tests.helpers.witness import SAMPLES_FILE, WitnessedDraw, WitnessedSaver, WitnessedTrainer

CORES = len(os.sched_getaffinity(0))


def run_waves(plan: Path) -> int:
    """Do what `launch` wrote down; return 0, or the first code that was not planned."""
    return next(filter(None, map(_run_wave, json.loads(plan.read_text()))), 0)


def _run_wave(waiting: list[dict[str, Any]]) -> int:
    """Train all runs, side by side while there are cores; return 0, or the first code that was not planned."""
    running: dict[int, dict[str, Any]] = {}
    while waiting or running:
        while waiting and (not running or len(running) + waiting[0]["ranks"] <= CORES):
            run, port = waiting.pop(0), free_port()
            running |= {fork_rank(rank, run, port): run for rank in range(run["ranks"])}
        process, status = os.wait()
        run, code = running.pop(process), os.waitstatus_to_exitcode(status)
        if code or run["codes"] != [0]:
            print(f"process {process} ended with {code} at {time.monotonic():.3f}", flush=True)
        if code not in run["codes"]:
            print(f"exit code {code}: {' '.join(run['arguments'])}", flush=True)
            for other in running:
                os.kill(other, signal.SIGKILL)
            return code
    return 0


def fork_rank(rank: int, run: dict[str, Any], port: int) -> int:
    """Start one rank of a run and return its process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["ranks"], "LOCAL_SIZE": run["ranks"]}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_PORT": str(port)}
        os.environ |= run["environment"]
        if SAMPLES_FILE in os.environ:
            ecdit_ds.training.setup.MakeBatch = WitnessedDraw  # type: ignore[misc]
        if run["tool"]:
            code = _run_tool(run["tool"], run["arguments"])
        else:
            stop = StopSignal()
            stop.listen()
            code = main(run["arguments"], stop)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _run_tool(name: str, arguments: list[str]) -> int:
    path = Path(sys.path[0]) / "tools" / name
    sys.argv = [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


if __name__ == "__main__":
    ecdit_ds.training.setup.Trainer = WitnessedTrainer  # type: ignore[misc]
    ecdit_ds.training.trainer.Checkpointer = WitnessedSaver  # type: ignore[misc]
    sys.exit(run_waves(Path(sys.argv[1])))
