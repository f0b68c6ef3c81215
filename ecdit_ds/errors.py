"""What a user can get wrong, one class for each place it is found.

Entry points print these as one line and exit; anything else is a defect and keeps its traceback.
"""


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
    """A run that cannot go on, such as one whose gradients stay non-finite."""
