"""How a run ended, in one line: why, on which rank, at which step, and what the next life can go on from."""

import contextlib
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from ecdit_ds.checkpoint.naming import list_checkpoints
from ecdit_ds.errors import CheckpointError, ExitCode, escape_unprintable

_PATIENCE_S = 3.0
_LOOK_EVERY_S = 0.5
_SECONDS_TO_LEAVE = 60.0


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """Where one rank runs."""

    host: str
    process: int
    born: float
    """When the process began: its number may be another's later."""

    def is_empty(self) -> bool:
        """Return whether the process is gone; only its own machine can tell."""
        try:
            process = psutil.Process(self.process)
            return process.create_time() != self.born or process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return True


def current_process() -> ProcessInfo:
    """Return where this process runs."""
    return ProcessInfo(host=socket.gethostname(), process=os.getpid(), born=psutil.Process().create_time())


@dataclass
class RunStatus:
    """What this process knows of the run, for its last line; filled in as the run goes."""

    rank: int = 0
    checkpoints: Path = Path()
    step: int | None = None
    """None until training begins: before, a refusal says it all."""
    seats: list[ProcessInfo] = field(default_factory=list)
    """The processes of all ranks, by rank."""
    stop_reason: str = ""
    """Why and on which ranks, where it was; all ranks say the same."""
    is_exiting: bool = False
    """Whether this rank leaves of its own accord, so that nobody need end it."""
    has_exited: bool = False
    """Whether it has: there is nothing more that could keep it."""

    def watch_peers(self) -> None:
        """End this process soon after a rank of this machine has died.

        Usually a collective fails at once and tells more. But one that waits for the dead to connect, or NCCL's, may
        wait for minutes.
        """
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _watch(self) -> None:
        here = current_process().host
        peers = {rank: seat for rank, seat in enumerate(self.seats) if seat.host == here and rank != self.rank}
        while not self.is_exiting:
            lost = [rank for rank, seat in peers.items() if seat.is_empty()]
            if not lost:
                time.sleep(_LOOK_EVERY_S)
                continue
            time.sleep(_PATIENCE_S)
            if not self.is_exiting:
                if self.is_reporter(lost):
                    print_quietly(exit_summary(self, "retry", f"rank {', '.join(map(str, lost))} died"), sys.stderr)
                os._exit(ExitCode.RETRY)
        time.sleep(_SECONDS_TO_LEAVE)
        if not self.has_exited:  # such as where a killed loader worker held a lock: its peers still wait
            os._exit(ExitCode.RETRY)

    def lost_ranks(self) -> list[int]:
        """Return the ranks of this machine whose process died, after giving a dying one a moment to be gone."""
        here = current_process()
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            lost = [rank for rank, seat in enumerate(self.seats) if seat.host == here.host and seat.is_empty()]
            if lost or time.monotonic() > deadline:
                return lost
            time.sleep(0.05)

    def is_reporter(self, lost: list[int]) -> bool:
        """Return whether this rank prints the summary: the lowest surviving rank on its host."""
        here = current_process().host
        left = [rank for rank, seat in enumerate(self.seats) if seat.host == here and rank not in lost]
        return not left or self.rank == min(left)


def exit_summary(status: RunStatus, verdict: str, cause: str) -> str:
    """Return the summary, such as `end: crashed | cause: ... | rank 0 | step 7 | last valid checkpoint: ...`."""
    from ecdit_ds.checkpoint.retention import (
        find_damage,  # with torch, which a recipe that is refused does not wait for
    )

    newest = None
    with contextlib.suppress(CheckpointError):
        newest = next((folder for folder in list_checkpoints(status.checkpoints) if find_damage(folder) is None), None)
    return (
        f"end: {verdict} | cause: {' '.join(cause.split())[:500]} | rank {status.rank} | step {status.step} | "
        f"last valid checkpoint: {newest or 'none'}"
    )


def print_quietly(text: str, stream: IO[str]) -> None:
    """Print, where that is possible: nobody may be reading any more, and a run does not end for that."""
    with contextlib.suppress(OSError, ValueError):
        print(escape_unprintable(text), file=stream, flush=True)


def ignore_broken_pipes() -> None:
    """Keep Python from failing at its end because nobody reads its output any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
