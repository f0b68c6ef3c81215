"""Real runs for tests: through the `deepspeed` launcher, or many of them from one warm process."""

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
    flags = ["--num_gpus", str(ranks), "--master_port", str(port)]
    return _start([sys.executable, str(launcher), *flags, str(script), *arguments])


def _start(command: list[str]) -> subprocess.Popen[str]:
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


def train_many(folder: Path, *waves: list[tuple[int, list[str]]]) -> str:
    """Train all runs, (ranks, arguments of train.py), from one warm process; return their output, or fail with it.

    A wave starts when the one before it has ended, so its runs may go on from that one's checkpoints.
    """
    return run_plan(folder, "many_runs.py", waves)


def run_plan(folder: Path, script: str, plan: Any) -> str:
    """Let a script of this folder do a plan, written to `folder`; return its output, or fail with it."""
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    code, output = finish(_start([sys.executable, str(ROOT / "tests" / "helpers" / script), str(path)]))
    assert code == 0, output
    return output


def train(ranks: int, arguments: list[str]) -> tuple[int, str]:
    """Train once through the owner's command and return (exit code, output)."""
    return finish(start(ranks, ROOT / "ecdit_ds" / "train.py", arguments))


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Return the run's metrics, one dict a step."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
