"""What a user can get wrong, one class for each place it is found, and how a run may end.

Entry points print these as one line and exit; anything else is a defect and keeps its traceback.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """How train.py ends; a batch script decides by these. Others, such as 1 of a traceback, may be tried again."""

    DONE = 0
    USER_ERROR = 2
    """Something to mend first: started again as it is, it ends the same way."""
    GAVE_UP = 3
    """Training cannot go on from here (train.max_skipped_steps); started again, it would end the same way."""
    SAVED = 42
    """A signal asked for a stop: saved, and the same command goes on."""
    INTERRUPTED = 130


class EcditError(Exception):
    """Base of all errors that a user can mend; the message says what, where, the numbers and the way out."""


class ConfigError(EcditError):
    """A recipe or a DeepSpeed configuration that cannot work."""


class TopologyError(EcditError):
    """Ranks that do not factor into the asked layout."""


class DataError(EcditError):
    """A corpus, caption or cache that cannot be used."""


class CheckpointError(EcditError):
    """A checkpoint that is missing, damaged, or does not fit the recipe."""


class TrainingError(EcditError):
    """A run that cannot go on, such as one whose logs cannot be written."""


class GaveUpError(TrainingError):
    """A run that would end the same way if it were started again, such as one whose gradients stay non-finite."""
