"""A signal that comes while a rank starts waits until the program listens. Real processes through slurm/rank.sh."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 20.0
HOLD = "--hold-signals"
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_LOCALID": "1",
}

PROGRAM = f"""
import os, sys, time
print("started", flush=True)
sys.stdin.readline()
sys.path.insert(0, {str(ROOT)!r})
from ecdit_ds.runtime.signals import StopSignal
stop = StopSignal()
stop.listen()
print(stop.reason, os.environ["RANK"], sys.argv[1:], flush=True)
time.sleep(0.05)
"""

StartRank = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_rank(tmp_path: Path) -> Iterator[StartRank]:
    """Return `start_rank(*flags)`: a rank that says "started", and why it was stopped once it is written to."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="ascii")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = kept | TASK | {"ECDIT_PYTHON": sys.executable}
    started = []

    def start(*flags: str, starter: Path = ROOT / "slurm/rank.sh") -> subprocess.Popen[str]:
        command = [str(starter), *flags, str(tmp_path / "program.py"), "--of", "the program"]
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def started(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """Return the process once its program runs, and does not listen yet."""
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def words_when_listening(process: subprocess.Popen[str]) -> str:
    """Let the program listen, and return what it says then."""
    said, complaints = process.communicate("go on\n", timeout=SECONDS)
    assert process.returncode == 0, complaints
    return said.splitlines()[-1]


@pytest.mark.parametrize("flags", [[], [HOLD]])
def test_a_program_that_nobody_stops_gets_its_rank_and_its_arguments(flags: list[str], start_rank: StartRank) -> None:
    assert words_when_listening(start_rank(*flags)) == "None 1 ['--of', 'the program']"


@pytest.mark.parametrize(
    "sent",
    [
        [signal.SIGUSR1],
        [signal.SIGTERM],
        [signal.SIGUSR1, signal.SIGTERM],
        [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1],
    ],
)
def test_signals_before_a_program_listens_wait_for_it(sent: list[signal.Signals], start_rank: StartRank) -> None:
    process = started(start_rank(HOLD))
    for number in sent:
        process.send_signal(number)
        time.sleep(0.02)
    assert process.poll() is None
    reason = words_when_listening(process).split()[0]
    assert reason in [number.name for number in sent]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_without_being_held_a_signal_before_a_program_listens_ends_it(
    number: signal.Signals, start_rank: StartRank
) -> None:
    process = started(start_rank())
    process.send_signal(number)
    assert process.wait(SECONDS) == -number


def test_signals_that_are_not_to_be_held_end_a_program_all_the_same(start_rank: StartRank) -> None:
    process = started(start_rank(HOLD))
    process.send_signal(signal.SIGUSR2)  # not SIGINT, which whoever starts tests in the background has ignored
    assert process.wait(SECONDS) == -signal.SIGUSR2


def test_no_signal_of_the_first_milliseconds_ends_a_rank(tmp_path: Path, start_rank: StartRank) -> None:
    """From when bash holds them back: before that, no program could."""
    starter = tmp_path / "rank.sh"
    script = (ROOT / "slurm/rank.sh").read_text(encoding="utf-8")
    assert script.count("USR1 TERM\n") == 1
    starter.write_text(
        script.replace("USR1 TERM\n", "USR1 TERM\necho held\n").replace("ecdit_ds/", f"{ROOT}/ecdit_ds/")
    )
    starter.chmod(0o755)
    reasons = set[str]()
    for delay_ms in (0, 1, 2, 3, 5, 7, 10, 13, 16, 20, 25, 30, 40, 50, 100, 200, 400, 800, 1600, 3200, 6400):
        if delay_ms > 50 and reasons != {"None"}:
            break  # only on a busy machine rank.py comes later
        number = signal.SIGTERM if delay_ms % 2 else signal.SIGUSR1
        process = start_rank(HOLD, starter=starter)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        time.sleep(delay_ms / 1000)
        process.send_signal(number)
        reason = words_when_listening(process).split()[0]
        assert reason in (number.name, "None"), f"{number.name} after {delay_ms} ms"
        reasons.add(reason)
    assert reasons & {"SIGTERM", "SIGUSR1"}, "none of them came after rank.py held it"


@pytest.mark.parametrize(
    ("broken", "said"),
    [({"SLURM_PROCID": "x"}, "SLURM_PROCID: 'x'"), ({"SLURM_STEP_ID": None}, "SLURM_STEP_ID is missing")],
)
@pytest.mark.parametrize("flags", [[], [HOLD]])
def test_a_task_that_is_no_rank_ends_with_one_line(broken: dict[str, str | None], said: str, flags: list[str]) -> None:
    told = {name: value for name, value in (TASK | broken).items() if value is not None}
    ended = run_rank(*flags, "program.py", told=told)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize("flags", [[], [HOLD]])
def test_a_rank_without_a_program_is_refused(flags: list[str]) -> None:
    """Python without a program would take what comes on standard input for one."""
    ended = run_rank(*flags, told=TASK)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and "rank.sh" in line


def run_rank(*arguments: str, told: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run slurm/rank.sh to its end."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        [str(ROOT / "slurm/rank.sh"), *arguments],
        env=kept | told | {"ECDIT_PYTHON": sys.executable},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        input="print('read from standard input')",
    )
