"""Real `deepspeed` launches for tests: many runs in one launch, so that a 2-rank comparison costs seconds."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS_AT_MOST = 540


def start(ranks: int, script: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """Start `deepspeed --num_gpus ranks script arguments`, in a process group of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        sys.executable, str(launcher), "--num_gpus", str(ranks), "--master_port", str(port), str(script), *arguments,
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = SECONDS_AT_MOST) -> tuple[int, str]:
    """Wait and return (exit code, output); whatever is left of its process group is killed."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def train_many(ranks: int, runs: list[list[str]], folder: Path) -> None:
    """Train each of `runs` (argument lists of train.py) in turn, in the same processes; fail with their output."""
    plan = folder / f"plan_{ranks}.json"
    plan.write_text(json.dumps(runs))
    code, output = finish(start(ranks, ROOT / "tests" / "helpers" / "many_runs.py", [str(plan)]))
    assert code == 0, output


def train(ranks: int, arguments: list[str]) -> tuple[int, str]:
    """Train once through the owner's command and return (exit code, output)."""
    return finish(start(ranks, ROOT / "ecdit_ds" / "train.py", arguments))


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Return the run's metrics, one dict a step."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
