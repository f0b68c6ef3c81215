"""A rank dies with any launcher above it, and lives without one. Real processes; the launchers are stand-ins."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
SECONDS_TO_DIE = 3.0

RANK = """
import os, sys, time
from ecdit_ds.runtime.launcher_watch import exit_with_launcher
exit_with_launcher()
with open(sys.argv[1] + ".tmp", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(60)
"""
STARTER = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]]).wait())
"""

Chain = tuple[list[psutil.Process], psutil.Process]
StartChain = Callable[..., Chain]


@pytest.fixture
def start_chain(tmp_path: Path) -> Iterator[StartChain]:
    """Return `start_chain(*kinds)`: processes of these kinds, each starting the next, and at last a rank.

    `deepspeed` is a script of that name, `launch` the module deepspeed.launcher.launch, `shell` neither.
    """
    for place in ("bin/deepspeed", "bin/shell", "deepspeed/launcher/launch.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(STARTER, encoding="ascii")
    for package in ("deepspeed", "deepspeed/launcher"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "rank.py").write_text(RANK, encoding="ascii")
    commands = {
        "deepspeed": [str(tmp_path / "bin/deepspeed")],
        "shell": [str(tmp_path / "bin/shell")],
        "launch": ["-m", "deepspeed.launcher.launch"],
    }
    told = tmp_path / "pid"
    started: list[psutil.Process] = []

    def start(*kinds: str) -> Chain:
        words = [word for kind in kinds for word in commands[kind]]
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
        top = subprocess.Popen([sys.executable, *words, str(tmp_path / "rank.py"), str(told)], env=environment)
        started.append(psutil.Process(top.pid))
        deadline = time.monotonic() + 30
        while not told.exists():
            assert top.poll() is None and time.monotonic() < deadline, "the rank did not start"
            time.sleep(0.02)
        rank = psutil.Process(int(told.read_text()))
        launchers = list(reversed(rank.parents()[: len(kinds)]))
        started.extend([*launchers, rank])
        assert launchers[0].pid == top.pid
        return launchers, rank

    yield start
    for process in started:
        if process.is_running():
            process.kill()
    psutil.wait_procs(started, timeout=SECONDS_TO_DIE)


def is_gone(process: psutil.Process, within_s: float) -> bool:
    """Return whether a process ends in time; nobody may be left to reap it."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("kinds", "killed"),
    [
        (("deepspeed",), 0),
        (("launch",), 0),
        (("deepspeed", "shell", "launch"), 0),
        (("deepspeed", "shell", "launch"), 2),
    ],
)
def test_a_rank_dies_when_a_launcher_above_it_is_killed(
    start_chain: StartChain, kinds: tuple[str, ...], killed: int
) -> None:
    launchers, rank = start_chain(*kinds)
    assert not is_gone(rank, within_s=0.5)
    launchers[killed].send_signal(signal.SIGKILL)
    assert is_gone(rank, within_s=SECONDS_TO_DIE)


def test_a_process_without_launcher_outlives_who_started_it(start_chain: StartChain) -> None:
    launchers, rank = start_chain("shell")
    launchers[0].send_signal(signal.SIGKILL)
    assert not is_gone(rank, within_s=1.0)
    assert rank.num_threads() == 1


def test_a_rank_whose_launcher_died_while_it_started_ends_at_once(tmp_path: Path) -> None:
    """The rank starts with the launcher's environment and flag, but no launcher is above it any more."""
    script = tmp_path / "rank.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from ecdit_ds.runtime.launcher_watch import exit_with_launcher\nexit_with_launcher()\nprint('survived')\n"
    )
    environment = os.environ | {"RANK": "0", "LOCAL_SIZE": "1"}
    orphan = subprocess.run(
        [sys.executable, str(script), "--local_rank=0"], env=environment, capture_output=True, text=True, check=False
    )
    assert orphan.returncode == -signal.SIGKILL
    assert "survived" not in orphan.stdout
    by_hand = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    assert "survived" in by_hand.stdout
