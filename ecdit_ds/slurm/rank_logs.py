"""The logs of ranks, and what was said last in them; standard library only."""

import os
import sys
from pathlib import Path

from ecdit_ds.errors import ConfigError, escape_unprintable
from ecdit_ds.files.durable import own_file

LOGS_FLAG = "--logs"
"""Argument of slurm/rank.sh: the folder where the rank opens its own log."""
_TOLD_LINES = 20
_TAIL_BYTES = 65536


def flags_for_logs(logs: Path) -> tuple[list[str], list[str]]:
    """Return what srun, and what slurm/rank.sh is to be told, so that each rank writes into a log of its own.

    As a rule srun opens them, so that what stands before a rank and cannot start is told there. But which name it makes
    of one with a percent sign differs from version to version, also where all are doubled.
    """
    if "%" in str(logs):
        return [], [LOGS_FLAG, str(logs)]
    log = f"{logs}/rank_%4t.log"
    return [f"--output={log}", f"--error={log}", "--open-mode=append"], []


def write_into_log(logs: Path, rank: str) -> None:
    """Have all that this process and its successors say written into this rank's log.

    Raises:
        ConfigError: it cannot be opened; it may be a link to another file.
    """
    path = logs / f"rank_{rank:0>4}.log"
    try:
        with open(path, "ab", opener=own_file) as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def remove_links(logs: Path) -> None:
    """Remove links that have names of ranks' logs: srun would write through them.

    Raises:
        OSError: they cannot be removed.
    """
    for link in filter(Path.is_symlink, logs.glob("rank_*.log")):
        link.unlink()


def last_words(logs: Path, *, is_why_wanted: bool) -> list[str]:
    """Return why ranks ended, each line once, and where it was said.

    Args:
        logs: their folder.
        is_why_wanted: whether, where none says why, such as a shell that finds no program, it is each rank's last line.
    """
    told, last_lines = dict[str, Path](), dict[str, Path]()
    for log in sorted(logs.glob("rank_*.log")):
        lines = [line for line in _tail(log) if line.strip()]
        for line in lines:
            if line.startswith(("end: ", "error: ")):
                told.setdefault(line, log)
        for line in lines[-1:]:
            last_lines.setdefault(line, log)
    if not told and is_why_wanted:
        told = last_lines
    return [escape_unprintable(f"{log.name}: {line}") for line, log in list(told.items())[:_TOLD_LINES]]


def _tail(log: Path) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
