"""How the ranks of a step ended: marks that they leave as their last act; standard library only.

Where Slurm fails to start tasks (a SPANK or PMI plugin), srun says "task N launch failed" and exits with 0 even so.
Therefore a 0 is believed only where every rank of the step has left its mark, a small file with a token that this step
alone was given. A rank that never started leaves none, and an older life's or another job's has another token.

Where one rank ends for good, such as by a user error, srun kills its peers for it and returns their higher code.
Therefore such a rank leaves a mark as well, which decides.
"""

import hashlib
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ecdit_ds.errors import ConfigError, RankLostError
from ecdit_ds.files.durable import replace_durably
from ecdit_ds.slurm.job_history import NON_RETRYABLE

VARIABLE = "ECDIT_COMPLETION"
"""Environment variable: how the path of a mark begins, to which each rank adds its number."""
FLAG = "--completion"
"""Argument of slurm/rank.sh, which makes it that variable: sites and containers may hand none on to ranks."""
RANK_SCRIPT, HOLD = "slurm/rank.sh", "--hold-signals"
"""What starts ranks, and its argument that comes before FLAG, as in `rank.py`."""
DRY_RUN, NODE_CHECK, ARRAY_TASK = "dry run", "node check", "array task"
"""What may be complete, besides training."""
SIGHT_SECONDS = 5.0
"""How long marks may take until they are seen from another node, once srun has ended."""
_TRAINING, _ENDED = "training to step ", "end with exit code "
_LOOK_EVERY_S = 0.5
_NAMED_RANKS = 8


def training_to(step: int) -> str:
    """Return what is complete once a run's last step is published."""
    return f"{_TRAINING}{step}"


def is_watched() -> bool:
    """Return whether somebody reads what each rank leaves, its log among it, and tells what several say once."""
    return VARIABLE in os.environ


def mark_complete(work: str) -> None:
    """Leave this rank's mark, on the disk when this returns; nothing where nobody looks for one.

    To be called when all is published. A mark that cannot be written is told of, and leaves the work to be done again.
    """
    if not is_watched():
        return
    path = Path(os.environ[VARIABLE])
    # As srun has told: a dry run makes itself a rank of another world.
    rank, size = (int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    try:
        replace_durably(_path_of(path, rank), _text_of(path, rank, size, work).encode())
    except OSError as error:
        with suppress(OSError, ValueError):
            print(f"error: {_path_of(path, rank)}: cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def mark_ended(code: int) -> None:
    """Leave this rank's mark where it ends for good."""
    if code in NON_RETRYABLE:
        mark_complete(f"{_ENDED}{code}")


def tell_ranks(command: Sequence[str], *words: str) -> list[str]:
    """Return a command with words for slurm/rank.sh; as it is, where it starts no rank by that."""
    if RANK_SCRIPT not in command:
        return list(command)
    at = command.index(RANK_SCRIPT) + 1
    at += command[at : at + 1] == [HOLD]
    return [*command[:at], *words, *command[at:]]


def refuse_to_repeat(program: Sequence[str], *flags: str) -> None:
    """Refuse a program that is asked for --help, or by one of `flags`, to do none of its work: no rank would report it.

    Raises:
        ConfigError: naming the flag, which argparse lets users shorten.
    """
    for flag in ("--help", *flags):
        if any((len(word) > 2 and flag.startswith(word)) or (word, flag) == ("-h", "--help") for word in program[1:]):
            raise ConfigError(
                f"{Path(program[0]).name} {flag}: does none of the work, which this job would repeat; run it without "
                "sbatch"
            )


@dataclass(frozen=True)
class Completion:
    """The marks of one step."""

    path: Path
    """How theirs begin."""

    @property
    def environment(self) -> dict[str, str]:
        """Return what the step's ranks are to be told."""
        return {VARIABLE: str(self.path)}

    def told_to(self, command: Sequence[str]) -> list[str]:
        """Return a command with its ranks told, as by `tell_ranks`."""
        return tell_ranks(command, FLAG, str(self.path))

    def confirm(self, work: Callable[[], str], patience_s: float | None = None) -> None:
        """Return where every rank says that this work is complete; look again while they do not.

        Args:
            work: what is to be complete, asked at each look.
            patience_s: for how long; SIGHT_SECONDS by default.

        Raises:
            RankLostError: a rank says nothing or something else.
        """
        deadline = time.monotonic() + (SIGHT_SECONDS if patience_s is None else patience_s)
        while fault := self._fault(work()):
            if time.monotonic() > deadline:
                raise RankLostError(f"srun ended with exit code 0, but {fault}")
            time.sleep(_LOOK_EVERY_S)

    def judge(self, code: int) -> int:
        """Return how the step ended, given srun's code, which is not 0: a rank that ended for good decides."""
        ends = set(map(self._end_told_by, self._marks()))
        return next((end for end in NON_RETRYABLE if end in ends), code)

    def remove(self) -> None:
        """Remove all marks."""
        for mark in self._marks():
            with suppress(OSError):
                mark.unlink()

    def _marks(self) -> list[Path]:
        return list(self.path.parent.glob(f"{self.path.name}-*"))

    def _fault(self, work: str) -> str | None:
        first = re.fullmatch(r"rank 0 of ([0-9]{1,7}): (.+) [0-9a-f]{64}\n", self._read(0))
        size, told = (int(first[1]), first[2]) if first else (1, work)
        silent = [str(rank) for rank in range(size) if self._read(rank) != _text_of(self.path, rank, size, told)]
        if silent:
            more = f" and {len(silent) - _NAMED_RANKS} more" if len(silent) > _NAMED_RANKS else ""
            of_all = f" of {size}" if first else ""
            what = f"its {told} as complete"
            if not first and work.startswith(_TRAINING):  # nobody has said where it is to end
                what = f"that training is complete (newest checkpoint: step {work.removeprefix(_TRAINING)})"
            return (
                f"rank {', '.join(silent[:_NAMED_RANKS])}{more}{of_all} never reported {what}: not started by Slurm, "
                "or ended early"
            )
        return None if told == work else f"the ranks report a complete {told}, where {work} is what was to be found"

    def _end_told_by(self, mark: Path) -> int | None:
        rank = mark.name.rpartition("-")[2]
        told = re.fullmatch(rf"rank [0-9]+ of ([0-9]{{1,7}}): {_ENDED}([0-9]{{1,3}}) \w+\n", self._read(rank))
        is_true = told and told[0] == _text_of(self.path, rank, told[1], f"{_ENDED}{told[2]}")
        return int(told[2]) if told and is_true else None

    def _read(self, rank: int | str) -> str:
        try:
            return _path_of(self.path, rank).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


@contextmanager
def expect_completion(folder: Path) -> Iterator[Completion]:
    """Yield the marks of a step that is about to start; they are removed in the end.

    Args:
        folder: seen by all ranks and from here.

    Raises:
        ConfigError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}; ranks are to leave marks there") from None
    completion = Completion(folder / f".complete-{secrets.token_hex(16)}")
    try:
        yield completion
    finally:
        completion.remove()


def _path_of(path: Path, rank: int | str) -> Path:
    return path.with_name(f"{path.name}-{rank}")


def _text_of(path: Path, rank: int | str, size: int | str, work: str) -> str:
    """Return a line that nothing but a rank of this very step writes, and no damage to another one's gives."""
    text = f"rank {rank} of {size}: {work}"
    return f"{text} {hashlib.sha256(f'{path.name} {text}'.encode()).hexdigest()}\n"
