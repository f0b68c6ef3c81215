"""Being asked to stop: who asked, in words that stay short at any size."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ecdit_ds import train
from ecdit_ds.errors import ExitCode
from ecdit_ds.runtime.signals import StopSignal, format_stop_reasons
from tests.helpers.launch import ROOT


@pytest.mark.parametrize(
    ("reason_by_rank", "words"),
    [
        (["SIGTERM"], "SIGTERM on rank 0"),
        ([None, "SIGTERM", None], "SIGTERM on rank 1"),
        (["SIGUSR1"] * 512, "SIGUSR1 on all ranks"),
        ([None, "SIGUSR1", "SIGUSR1"], "SIGUSR1 on ranks 1, 2"),
        ([None] * 500 + ["SIGUSR1"] * 12, "SIGUSR1 on 12 of 512 ranks, rank 500 first"),
        (["the launcher died", "SIGTERM"], "the launcher died on rank 0; SIGTERM on rank 1"),
    ],
)
def test_whoever_was_asked_to_stop_is_named_in_few_words(reason_by_rank: list[str | None], words: str) -> None:
    assert format_stop_reasons(reason_by_rank) == words


PROGRAM = """
import os, signal, sys
from ecdit_ds.runtime.signals import StopSignal
number, stop = int(sys.argv[1]), StopSignal()
stop.listen()
if sys.argv[2] == "before":
    os.kill(os.getpid(), number)
stop.stand_down()
if sys.argv[2] == "after":
    os.kill(os.getpid(), number)
print("lived on", file=sys.stderr)
"""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_where_there_is_nothing_to_save_a_signal_ends_the_process(number: signal.Signals, moment: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(number)), moment], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (-number, "")


@pytest.fixture
def listening() -> Iterator[StopSignal]:
    """Return a request that has taken over both signals, for the length of a test."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    stop = StopSignal()
    stop.listen()
    yield stop
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_signals_end_a_dry_run(listening: StopSignal, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[Any] = []

    def look(*_: object, **__: object) -> tuple[str, bool]:
        handlers.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGUSR1)))
        return "in order", True

    monkeypatch.setattr("ecdit_ds.training.dry_run.dry_run", look)
    assert train.main(["--dry-run", "--world-size=1"], listening) == ExitCode.DONE
    assert handlers == [signal.SIG_DFL, signal.SIG_DFL]


def test_what_asked_first_stays_the_reason() -> None:
    stop = StopSignal()
    stop._note(signal.SIGUSR1, None)
    stop._note(signal.SIGTERM, None)
    stop.launcher_died()
    assert stop.reason == "SIGUSR1"
    alone = StopSignal()
    alone.launcher_died()
    assert alone.reason == "the launcher died"
