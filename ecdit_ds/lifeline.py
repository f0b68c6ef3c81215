"""No rank outlives its launcher.

`deepspeed` starts a launcher, which starts the ranks. Kill one of the upper two with SIGKILL and the ranks would train
on, unseen, and hold the run's folder. So each rank watches those above it and dies with them. But a signal to the whole
job, of which the launcher dies, also asks the ranks to save and leave: they are given the time for it.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_UNTIL_SIGNALS_ARRIVED = 0.5
_MINUTES_TO_LEAVE = 10


def die_with_launcher(is_leaving: Callable[[], bool] = lambda: False) -> None:
    """Start watching the launchers above this process; a process started by hand has none and is left alone.

    Call it first of all, before slow imports: a launcher that is killed meanwhile is not seen any more. A rank that
    `deepspeed` started but that has lost its launcher already ends here.

    Args:
        is_leaving: whether this process was asked to save and leave, and may do so before it dies.
    """
    launchers = [process for process in psutil.Process().parents() if _is_launcher(process)]
    if launchers:
        threading.Thread(target=_watch, args=(launchers, is_leaving), name="lifeline", daemon=True).start()
    elif "--local_rank=" in " ".join(sys.argv) and {"RANK", "LOCAL_SIZE"} <= os.environ.keys():
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(launchers: list[psutil.Process], is_leaving: Callable[[], bool]) -> None:
    while all(_is_alive(process) for process in launchers):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    time.sleep(_SECONDS_UNTIL_SIGNALS_ARRIVED)
    if is_leaving():
        time.sleep(60 * _MINUTES_TO_LEAVE)  # this thread ends with the process
    os.kill(os.getpid(), signal.SIGKILL)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_launcher(process: psutil.Process) -> bool:
    try:
        # `python .../bin/deepspeed ...` or `python -m deepspeed.launcher.launch ...`
        return any(part == "deepspeed.launcher.launch" or part.endswith("/deepspeed") for part in process.cmdline()[:4])
    except psutil.Error:
        return False
