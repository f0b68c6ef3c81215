"""The moments of a save at which a crash leaves different things behind; tests and drills break it there."""

from collections.abc import Callable

SAVE_PHASES = (
    "before-mkdir",
    "mid-shard",
    "before-manifest",
    "before-rename",
    "after-rename",
    "before-latest",
    "during-removal",
)
"""In the order in which one save passes them: every writer `mid-shard`, the first writer the others."""

PhaseHook = Callable[[str], None]
"""Called with each phase when it is reached."""


def no_hook(phase: str) -> None:
    """Do nothing, as in every run without a drill."""
