"""Train every run of a plan, each on freshly forked ranks: a 2-rank run costs seconds, because imports are paid once.

    python tests/helpers/many_runs.py PLAN.json      # waves of runs: [[[ranks, [argument, ...]], ...], ...]

A rank is a process with the environment that the `deepspeed` launcher gives it, and runs train.py's `main`. Besides
what every run leaves, `OUTPUT/rank_R.json` tells what rank R saw.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}  # a fork cannot take a thread pool along

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # the engine's first use imports it, for seconds
import torch.utils.tensorboard  # noqa: F401

import ecdit_ds.build
import ecdit_ds.trainer
from ecdit_ds.parallel import tensor_parallel  # noqa: F401
from ecdit_ds.train import main
from tests.helpers.witness import WitnessedSaver, WitnessedTrainer

CORES = len(os.sched_getaffinity(0))


def train_wave(waiting: list[tuple[int, list[str]]]) -> int:
    """Train all runs, side by side while there are cores; return 0, or the first code that is not."""
    running: dict[int, list[str]] = {}
    while waiting or running:
        while waiting and (not running or len(running) + waiting[0][0] <= CORES):
            ranks, arguments = waiting.pop(0)
            port = _free_port()
            running |= {_fork(rank, ranks, port, arguments): arguments for rank in range(ranks)}
        process, status = os.wait()
        arguments = running.pop(process)
        if code := os.waitstatus_to_exitcode(status):
            print(f"exit code {code}: {' '.join(arguments)}", flush=True)
            for other in running:
                os.kill(other, signal.SIGKILL)
            return code
    return 0


def _fork(rank: int, ranks: int, port: int, arguments: list[str]) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_PORT": str(port)}
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    ecdit_ds.build.Trainer = WitnessedTrainer  # type: ignore[misc]
    ecdit_ds.trainer.Saver = WitnessedSaver  # type: ignore[misc]
    sys.exit(next(filter(None, map(train_wave, json.loads(Path(sys.argv[1]).read_text()))), 0))
