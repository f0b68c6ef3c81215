"""The lives of a job, and whether it gets another one: decisions only, standard library only.

OUTPUT/slurm/lives.jsonl holds a line at a life's beginning, one where it found the recipe in order, and one at its end;
a life that lost its first node has no end. A life made progress if the newest published checkpoint is a later one than
when it began. Job IDs are recycled, so only the lives since the most recent first one count.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ecdit_ds.checkpoint.naming import MANIFEST_NAME, list_checkpoints, step_of
from ecdit_ds.errors import CheckpointError, ExitCode
from ecdit_ds.files.durable import make_folders, own_file, put_on_disk, replace_durably

LOGS = "slurm"
"""Folder of a run's folder for what this package leaves."""
NON_RETRYABLE = {
    ExitCode.USER_ERROR: "there is something to mend first, which the log names",
    ExitCode.UNRECOVERABLE: "training gave up, and would again",
    ExitCode.INTERRUPTED: "somebody interrupted it",
}
"""Exit codes after which the job as it is would end the same way, and why."""


@dataclass(frozen=True, kw_only=True)
class AttemptStarted:
    """A life that began."""

    life: str
    """JOB.RESTARTS"""
    step: int
    """Step of the newest checkpoint then; 0 for none."""
    nodes: str
    ranks: int

    @property
    def job(self) -> str:
        return self.life.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class PreflightPassed:
    """A life that found the recipe in order."""

    life: str


@dataclass(frozen=True, kw_only=True)
class RequeueDecision:
    """What becomes of a job after one of its lives."""

    is_again: bool
    exit_code: int
    reason: str


def newest_step(output: Path) -> int:
    """Return the step of the newest published checkpoint of a run; 0 without any."""
    with contextlib.suppress(CheckpointError):
        return next((step_of(f) for f in list_checkpoints(output / "checkpoints") if (f / MANIFEST_NAME).is_file()), 0)
    return 0


class JobHistory:
    """The lives of all jobs that wrote into one run's folder."""

    def __init__(self, output: Path) -> None:
        self.folder = output / LOGS
        self._path, self._why = self.folder / "lives.jsonl", self.folder / "why_it_stopped.txt"

    def begin(self, beginning: AttemptStarted) -> None:
        """Write down that a life begins; what stopped an earlier one is over."""
        make_folders(self.folder)
        self._why.unlink(missing_ok=True)
        self._append({"event": "begin", "time": _now()} | asdict(beginning))

    def pass_check(self, life: str) -> None:
        """Write down that the recipe is in order, so that the job's later lives need not ask again."""
        self._append({"event": "checked", "time": _now(), "life": life})

    def end(self, life: str, code: int, step: int, verdict: RequeueDecision) -> None:
        """Write down how a life ended, and in why_it_stopped.txt for people, if there will be no other."""
        self._append({"event": "end", "time": _now(), "life": life, "code": code, "step": step} | asdict(verdict))
        if not (verdict.is_again or verdict.exit_code == ExitCode.DONE):
            self.tell_why(life, verdict.reason)

    def tell_why(self, life: str, reason: str) -> None:
        """Write why_it_stopped.txt."""
        replace_durably(self._why, f"{_now()} job {life}: {reason}\n".encode())

    def beginnings(self) -> list[AttemptStarted]:
        """Return all lives, the oldest first; a line that was cut off, or is no one's, is passed over."""
        return [event for event in self._events() if isinstance(event, AttemptStarted)]

    def lives_of(self, job: str) -> list[AttemptStarted]:
        """Return the lives of the job that has this number now, the oldest first."""
        return [event for event in self._events_of(job) if isinstance(event, AttemptStarted)]

    def is_checked(self, job: str) -> bool:
        """Return whether a life of the job that has this number now found the recipe in order."""
        return any(isinstance(event, PreflightPassed) for event in self._events_of(job))

    def _events_of(self, job: str) -> list[AttemptStarted | PreflightPassed]:
        events = [event for event in self._events() if event.life.partition(".")[0] == job]
        first_lives = [i for i, e in enumerate(events) if isinstance(e, AttemptStarted) and e.life == f"{job}.0"]
        return events[first_lives[-1] :] if first_lives else events

    def _events(self) -> Iterator[AttemptStarted | PreflightPassed]:
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                record = json.loads(line)
                if not re.fullmatch(r"[0-9]+\.[0-9]+", record["life"], re.ASCII):
                    continue
                if record["event"] == "begin":
                    yield AttemptStarted(
                        life=str(record["life"]),
                        step=int(record["step"]),
                        nodes=str(record["nodes"]),
                        ranks=int(record["ranks"]),
                    )
                elif record["event"] == "checked":
                    yield PreflightPassed(life=str(record["life"]))

    def _append(self, record: dict[str, Any]) -> None:
        with open(self._path, "ab+", opener=own_file) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                is_cut_off = file.read(1) != b"\n"  # as by a node's death: the next line is not to be lost with it
                file.write(b"\n" * is_cut_off)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        put_on_disk(self.folder)


def count_barren(lives: Iterable[AttemptStarted], step: int) -> int:
    """Return how many of the last lives of a job, in a row, made no progress.

    Args:
        step: of the newest checkpoint now, which is where the last one has come to.
    """
    barren = 0
    for before, after in pairwise([*(life.step for life in lives), step]):
        barren = 0 if after > before else barren + 1
    return barren


def decide_requeue(code: int, *, barren: int, allowed: int, cause: str = "") -> RequeueDecision:
    """Return what becomes of a job whose life ended with `code`.

    Args:
        barren: lives in a row without progress, this one among them if it made none.
        allowed: how many of those end the job.
        cause: of the exit code, where it is known here.
    """
    if code == ExitCode.DONE:
        return RequeueDecision(is_again=False, exit_code=code, reason="training is done")
    if code in NON_RETRYABLE:
        return RequeueDecision(
            is_again=False, exit_code=code, reason=f"exit code {code}: {NON_RETRYABLE[ExitCode(code)]}"
        )
    what = "saved" if code == ExitCode.CHECKPOINTED else f"exit code {code}" + (f" ({cause})" if cause else "")
    if barren >= allowed:
        reason = (
            f"{what}, and {barren} lives in a row published no later checkpoint (ECDIT_MAX_LIVES={allowed}); "
            "mend the cause and submit anew: it goes on from the newest checkpoint"
        )
        return RequeueDecision(is_again=False, exit_code=code, reason=reason)
    return RequeueDecision(
        is_again=True, exit_code=code, reason=f"{what}; {barren} of {allowed} lives without progress"
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
