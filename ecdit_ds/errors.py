"""What a user can get wrong, one class for each place it is found, and how a run may end.

Entry points print these as one line and exit; anything else is a defect and keeps its traceback.
"""

import reprlib
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """How train.py ends; a batch script decides by these."""

    DONE = 0
    CRASHED = 1
    """A defect or a broken machine, with a traceback; started again, it goes on from the newest valid checkpoint."""
    USER_ERROR = 2
    """Something to mend first: started again as it is, it ends the same way."""
    UNRECOVERABLE = 3
    """Training cannot go on from here (steps skipped in a row, numbers not finite, or a newer attempt took over)."""
    CHECKPOINTED = 42
    """A signal asked for a stop: saved, and the same command goes on."""
    RETRY = 75
    """A rank was lost, or storage hung: nothing is wrong with the run, and the same command goes on."""
    INTERRUPTED = 130


def escape_unprintable(text: str) -> str:
    """Return text as one line for a terminal or a log, whatever it quotes.

    Names come from files of anybody's: a newline would forge a line of ours, an escape sequence hide or move one. What
    cannot be printed is written out, as `\\n` or `\\x1b`; a second call changes nothing.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 120, 120, 60


def shown(value: Any) -> str:
    """Return a user's value for a message: `repr` on one line, cut where it is long or deep.

    YAML's aliases let a small file stand for a value that would take years to write out.
    """
    return _SHORT.repr(value)


class EcditError(Exception):
    """Base class of user-fixable errors. The message names what is wrong, where, the values and the fix, in a line."""

    def __init__(self, message: str) -> None:
        super().__init__(escape_unprintable(message))


class ConfigError(EcditError):
    """A recipe or a DeepSpeed configuration that cannot work."""


class TopologyError(EcditError):
    """Ranks that do not factor into the asked layout."""


class DataError(EcditError):
    """A corpus, caption or cache that cannot be used."""


class CheckpointError(EcditError):
    """A checkpoint that is missing, damaged, or does not fit the recipe."""


class EvaluationError(EcditError):
    """Pictures, prompts or a judging model that no metric can be computed with."""


class NonFiniteError(EcditError):
    """NaN or infinity where a result was due: nothing is written or scored."""


class StaleRunError(CheckpointError):
    """A process of an earlier attempt of a run that a newer one has taken over: it may change nothing any more."""


class RankLostError(EcditError):
    """A run that another process ended by dying, or storage by hanging; started again, it goes on."""


class UnrecoverableError(EcditError):
    """A run that would end the same way if it were started again, such as one whose gradients stay non-finite."""


def exit_code_of(error: EcditError) -> ExitCode:
    """Return how a run ends that ends with `error`."""
    if isinstance(error, UnrecoverableError | StaleRunError):
        return ExitCode.UNRECOVERABLE
    return ExitCode.RETRY if isinstance(error, RankLostError) else ExitCode.USER_ERROR
