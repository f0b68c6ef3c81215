"""No rank outlives its launcher.

`deepspeed` starts a launcher, which starts the ranks. Kill one of the upper two with SIGKILL and the ranks would train
on, unseen, and hold the run's folder. So each rank watches those above it and dies with them, after it was given the
time to save: most who end a run signal the launcher only, and it may die of that without a word to its ranks.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

_SECONDS_BETWEEN_LOOKS = 0.2
_MINUTES_TO_LEAVE = 10


def exit_with_launcher(ask_to_leave: Callable[[], object] | None = None) -> None:
    """Start watching the launchers above this process; a process started by hand has none and is left alone.

    Call it first of all, before slow imports: a launcher that is killed meanwhile is not seen any more. A rank that
    `deepspeed` started but that has lost its launcher already ends here.

    Args:
        ask_to_leave: called when a launcher died; this process then has some minutes to save and leave. Without, it
            dies at once.
    """
    launchers = [process for process in psutil.Process().parents() if _is_launcher(process)]
    if launchers:
        threading.Thread(target=_watch, args=(launchers, ask_to_leave), name="lifeline", daemon=True).start()
    elif "--local_rank=" in " ".join(sys.argv) and {"RANK", "LOCAL_SIZE"} <= os.environ.keys():
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(launchers: list[psutil.Process], ask_to_leave: Callable[[], object] | None) -> None:
    while all(_is_alive(process) for process in launchers):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if ask_to_leave is not None:
        ask_to_leave()
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
