"""Names of a run's checkpoints; torch is not needed to know where they lie."""

import re
from pathlib import Path

from ecdit_ds.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
"""In a checkpoint's folder; a folder without is none yet."""

_STEP = re.compile("step_(0|[1-9][0-9]*)")
_PADDED = re.compile("step_0+([0-9]+)")


def step_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"step_{step}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder, by its name; -1 for any other name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1


def misnamed_checkpoints(root: Path) -> dict[Path, str]:
    """Return folders with a manifest that are named after a step with zeros before, and their right names.

    They are no checkpoints of the run: beside the right one, one would count twice.
    """
    padded = ((path, _PADDED.fullmatch(path.name)) for path in sorted(root.glob("step_0*")))
    return {path: step_name(int(match[1])) for path, match in padded if match and (path / MANIFEST_NAME).is_file()}


def list_checkpoints(root: Path) -> list[Path]:
    """Return the folders named `step_<whole number>` in `root`, newest (largest step) first; [] without a root.

    Raises:
        CheckpointError: the root cannot be looked into.
    """
    try:
        if not root.is_dir():
            return []
        folders = [path for path in root.iterdir() if step_of(path) >= 0 and path.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error.strerror}") from None
    return sorted(folders, key=step_of, reverse=True)
