"""Who may publish: the newest attempt of a run, and no process of an earlier one that did not die.

A scheduler that loses sight of a machine starts the job again elsewhere, while the old ranks may still be saving. Each
attempt writes its name into a file of the run's folder; whoever publishes must find its own name there. Claiming and
publishing lock each other out where the file system has locks.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ecdit_ds.errors import CheckpointError, StaleRunError
from ecdit_ds.files.durable import is_still, private_file, put_on_disk

LEASE_NAME = ".attempt"
_PATIENCE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Lease:
    """One attempt's right to publish checkpoints of the run in `folder`, until another attempt claims it."""

    folder: Path
    attempt: str
    former: str = ""
    """The attempt that had it before, dead or not; empty where there was none."""

    def give_back(self) -> None:
        """Leave the right to whom it was taken from, unless a newer attempt has it: for a start that is refused."""
        with suppress(OSError, CheckpointError), _locked(self.folder) as file:
            if file.read().strip() != self.attempt:
                return
            if self.former:
                _write(file, self.former)
            else:
                (self.folder / LEASE_NAME).unlink()  # while it is locked: who waits for it sees that it is gone

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other attempts from claiming for as long as the context lasts.

        Raises:
            StaleRunError: one has claimed already.
        """
        with _locked(self.folder) as file:
            newest = file.read().strip()
            if newest not in ("", self.attempt):  # empty where somebody tidied up: nobody has taken over
                raise StaleRunError(
                    f"{self.folder}: attempt {newest} has taken over from this one, {self.attempt}; nothing was "
                    "published, and this process has no more to do"
                )
            yield


def attempt_name() -> str:
    """Return a new name for this start of a run; under Slurm it begins with the job and its restart count."""
    own = f"{time.time_ns():x}-{os.getpid():x}"
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}.{own}" if job else own


def claim(folder: Path, attempt: str) -> Lease:
    """Make `attempt` the one that publishes checkpoints of the run in `folder`, which exists.

    Raises:
        StaleRunError: a later start of the same job has claimed it.
        CheckpointError: the file cannot be written, or an earlier attempt is just publishing and does not end.
    """
    try:
        with _locked(folder) as file:
            held = file.read().strip()
            if is_successor(held, of=attempt):
                raise StaleRunError(f"{folder}: attempt {held} has taken over from this one, {attempt}")
            _write(file, attempt)
            put_on_disk(folder)
    except OSError as error:
        raise CheckpointError(f"{folder / LEASE_NAME}: cannot be written: {error.strerror or error}") from None
    return Lease(folder=folder, attempt=attempt, former=held)


def _write(file: IO[str], attempt: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(f"{attempt}\n")
    file.flush()
    os.fsync(file.fileno())


def is_successor(attempt: str, *, of: str) -> bool:
    """Return whether a scheduler started `attempt` after `of`, as a later life of the same job."""
    later, earlier = (re.fullmatch(r"([0-9]+)\.([0-9]+)\.\S+", name) for name in (attempt, of))
    return bool(later and earlier and later[1] == earlier[1] and int(later[2]) > int(earlier[2]))


@contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    path, deadline = folder / LEASE_NAME, time.monotonic() + _PATIENCE_S
    while True:
        with open(path, "a+", encoding="utf-8", errors="backslashreplace", opener=private_file) as file:
            _wait_for(file, deadline)
            if is_still(file, path):
                file.seek(0)
                yield file
                return


def _wait_for(file: IO[str], deadline: float) -> None:
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN) or time.monotonic() > deadline:
                raise CheckpointError(
                    f"{file.name}: cannot be locked within {_PATIENCE_S:.0f} s ({error.strerror}); another process "
                    "may be publishing"
                ) from None
            time.sleep(0.05)
