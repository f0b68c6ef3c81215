"""Tending a folder of checkpoints: what may go, what is kept, what a crash left, what proved damaged.

Only names that saving makes are ever touched: `step_<number>`, `step_<number>.tmp-*`, `.trash-step_<number>*`.
"""

import re
import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ecdit_ds.checkpoint.fault_points import PhaseHook, no_hook
from ecdit_ds.checkpoint.finite import require_finite_tensors
from ecdit_ds.checkpoint.manifest import read_manifest
from ecdit_ds.checkpoint.naming import list_checkpoints, step_of
from ecdit_ds.errors import CheckpointError
from ecdit_ds.files.durable import replace_durably

LATEST_NAME = "latest"
"""A hint for people and scripts: the name of the newest checkpoint. Nothing here reads it."""


def apply_retention(
    root: Path,
    keep: int,
    *,
    keep_every: int = 0,
    verified: Collection[Path] | None = None,
    reached: PhaseHook = no_hook,
) -> list[Path]:
    """Remove all but the newest `keep` checkpoints, and return what was removed.

    Whatever is a link, has no valid manifest or is not finite is left alone and does not count: what this program
    cannot prove to be its own whole checkpoint is evidence for a person, not waste. A folder is renamed before it is
    deleted, so that a half-deleted one never looks like a checkpoint.

    Args:
        keep: 2 or more, since one may prove damaged.
        keep_every: checkpoints of steps that are a multiple of it stay for ever; 0 for none.
        verified: those whose every byte was compared with its checksum; only they count towards `keep`, so that none
            goes before enough newer ones are proven. None takes valid manifests for proof.

    Raises:
        CheckpointError: keep is below 2, or a folder cannot be renamed.
    """
    if keep < 2:
        raise CheckpointError(f"{root}: asked to keep {keep} checkpoints; keep 2 or more: one may prove damaged")
    ours = [folder for folder in list_checkpoints(root) if not folder.is_symlink() and find_damage(folder) is None]
    proven = [folder for folder in ours if verified is None or folder in verified]
    if len(proven) < keep:
        return []
    is_older = {folder: place for place, folder in enumerate(ours)}
    old = [folder for folder in ours[is_older[proven[keep - 1]] + 1 :] if not _is_anchor(folder, keep_every)]
    for folder in old:
        _remove(folder, reached)
    return old


def write_latest(root: Path, folder: Path) -> None:
    """Leave the hint; a hint that cannot be written is no harm."""
    with suppress(OSError):
        replace_durably(root / LATEST_NAME, f"{folder.name}\n".encode())


def quarantine(folder: Path) -> Path:
    """Rename a damaged `step_N` to `step_N.damaged-...`, so that the step can be saved again; return its new path.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns():x}")
    try:
        return folder.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{folder}: is damaged and cannot be moved aside: {error.strerror}; move it") from None


def remove_incomplete_saves(root: Path) -> list[Path]:
    """Remove what interrupted saves and removals left, `step_N.tmp-*` and `.trash-step_N*`; return what was removed.

    Only for when no save is under way, such as at the start of a run.
    """
    left = [path for path in root.glob("*") if re.fullmatch(r"step_[0-9]+\.tmp-.+|\.trash-step_[0-9]+.*", path.name)]
    stale = [path for path in left if path.is_dir() and not path.is_symlink()]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def find_damage(folder: Path) -> CheckpointError | None:
    """Return what is wrong with a checkpoint's manifest, the sizes of its files, or its numbers by what it says."""
    try:
        require_finite_tensors(folder, read_manifest(folder).nonfinite)
    except CheckpointError as error:
        return error
    return None


def _is_anchor(folder: Path, keep_every: int) -> bool:
    return keep_every > 0 and step_of(folder) % keep_every == 0


def _remove(folder: Path, reached: PhaseHook) -> None:
    trash = folder.with_name(f".trash-{folder.name}-{time.time_ns():x}")
    try:
        folder.rename(trash)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be removed: {error.strerror}; check its owner") from None
    reached("during-removal")
    shutil.rmtree(trash, ignore_errors=True)
