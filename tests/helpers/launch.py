"""Real runs for tests: through the `deepspeed` launcher, or many of them from one warm process."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS_AT_MOST = 540


def start(ranks: int, script: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """Start `deepspeed --num_gpus ranks script arguments`, in a process group of its own."""
    port = free_port()
    launcher = Path(sys.executable).with_name("deepspeed")
    flags = ["--num_gpus", str(ranks), "--master_port", str(port)]
    return _start([sys.executable, str(launcher), *flags, str(script), *arguments])


def _start(command: list[str]) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = SECONDS_AT_MOST) -> tuple[int, str]:
    """Wait and return (exit code, output); whatever is left of its process group is killed."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@dataclass(frozen=True)
class Planned:
    """A run of `train_many`."""

    ranks: int
    arguments: list[str]
    """Of train.py."""
    environment: dict[str, str] = field(default_factory=dict)
    codes: tuple[int, ...] = (0,)
    """How its ranks may end; -N is by signal N."""
    tool: str = ""
    """Of tools/, to run instead of train.py."""


def finish_group(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait until all that hold the output have ended, though the launcher may have died first; as `finish`."""
    assert process.stdout is not None
    output = process.stdout.read()  # ends when nobody can write any more
    return process.wait(), output


def free_port() -> int:
    """Return a port that nobody listens on, and that the system gives to no connection meanwhile."""
    while True:
        port = random.SystemRandom().randrange(30000, 32768)  # systems hand out those above
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


Waves = Sequence[Sequence[Planned | tuple[int, list[str]]]]
"""Wave by wave, runs that go side by side."""


def train_many(folder: Path, *waves: Sequence[Planned | tuple[int, list[str]]]) -> str:
    """Train all runs from one warm process; return their output, or fail with it.

    A wave starts when the one before it has ended, so its runs may go on from that one's checkpoints.
    """
    return run_plan(folder, "many_runs.py", waves)


def run_plan(folder: Path, script: str, waves: Waves) -> str:
    """As `train_many`, with a script of this folder that does something else on each rank."""
    code, output = finish(_start_plan(folder, script, waves))
    assert code == 0, output
    return output


def start_many(folder: Path, *waves: Sequence[Planned | tuple[int, list[str]]]) -> subprocess.Popen[str]:
    """Start what `train_many` waits for."""
    return _start_plan(folder, "many_runs.py", waves)


def _start_plan(folder: Path, script: str, waves: Waves) -> subprocess.Popen[str]:
    plan = folder / f"plan-{time.monotonic_ns()}.json"
    planned = [[run if isinstance(run, Planned) else Planned(*run) for run in wave] for wave in waves]
    plan.write_text(json.dumps([[asdict(run) for run in wave] for wave in planned]))
    return _start([sys.executable, str(ROOT / "tests" / "helpers" / script), str(plan)])


def train(ranks: int, arguments: list[str]) -> tuple[int, str]:
    """Train once through the owner's command and return (exit code, output)."""
    return finish(start(ranks, ROOT / "ecdit_ds" / "train.py", arguments))


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Return the run's metrics, one dict a step."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
