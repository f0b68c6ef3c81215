"""No rank outlives its launcher.

`deepspeed` starts a launcher, which starts the ranks. Kill one of the upper two with SIGKILL and the ranks would train
on, unseen, and hold the run's folder. So each rank watches those above it and dies with them.
"""

import os
import signal
import sys
import threading
import time

import psutil

_SECONDS_BETWEEN_LOOKS = 0.2


def die_with_launcher() -> None:
    """Start watching the launchers above this process; a process started by hand has none and is left alone.

    Call it first of all, before slow imports: a launcher that is killed meanwhile is not seen any more. A rank that
    `deepspeed` started but that has lost its launcher already ends here.
    """
    launchers = [process for process in psutil.Process().parents() if _is_launcher(process)]
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), name="lifeline", daemon=True).start()
    elif "--local_rank=" in " ".join(sys.argv) and {"RANK", "LOCAL_SIZE"} <= os.environ.keys():
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(launchers: list[psutil.Process]) -> None:
    while all(_is_alive(process) for process in launchers):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
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
