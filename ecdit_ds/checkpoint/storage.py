"""Saving a checkpoint and tending the folder of checkpoints; reading is in `reader.py`, the format in `manifest.py`.

Every writer puts its pieces of global tensors into one safetensors file of a temporary folder. Once all are on the
disk the first writer checks that the pieces tile every tensor, adds the manifest and renames the folder to `step_N`.
So a folder with that name is whole, or was damaged later, and nothing on disk says which rank held what.
"""

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.manifest import (
    DTYPES,
    MANIFEST_NAME,
    Manifest,
    StoredFile,
    StoredSlice,
    StoredTensor,
    check_tensor_cover,
    encode_manifest,
    header_xxh3,
    list_checkpoints,
    read_manifest,
    shard_name,
    tensor_xxh3,
)
from ecdit_ds.checkpoint.peers import Peers, SoloPeers
from ecdit_ds.checkpoint.reader import Reader, newest_valid
from ecdit_ds.durable import put_on_disk, write_durably
from ecdit_ds.errors import CheckpointError

__all__ = [
    "Manifest",
    "Peers",
    "Piece",
    "Reader",
    "SoloPeers",
    "list_checkpoints",
    "newest_valid",
    "read_manifest",
    "remove_old",
    "remove_stale_attempts",
    "save_checkpoint",
]

_FREE_SPACE_FACTOR = 1.05  # headers, file system blocks, and whoever else writes meanwhile
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A box of a named global tensor, held by this writer.

    Raises:
        ValueError: data is not contiguous or not of the box's shape.
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    """In global coordinates."""
    data: Tensor
    """Contiguous, of `box.shape`, on any device; usually a view of a larger fragment."""

    def __post_init__(self) -> None:
        if tuple(self.data.shape) != self.box.shape or not self.data.is_contiguous():
            raise ValueError(f"{self.name}: data of shape {tuple(self.data.shape)} is not a contiguous {self.box}")


def save_checkpoint(root: Path, step: int, pieces: Iterable[Piece], meta: dict[str, Any], peers: Peers) -> Path:
    """Write `root/step_N` together with all peers, whole or not at all.

    Args:
        root: folder of checkpoints, shared by all peers; made if missing.
        step: optimizer steps done.
        pieces: what this peer contributes; over all peers each element of each tensor exactly once (replicas are
            written by one of their holders). Read to the end before writing; tensors on an accelerator are copied to
            host memory, this peer's pieces at once.
        meta: plain JSON to keep beside the tensors, such as the recipe and samples_seen; rank 0's is written.
        peers: who else writes.

    Returns:
        The folder, on every peer, once it is on the disk.

    Raises:
        CheckpointError: on every peer when any failed (disk full, step already saved, pieces that do not tile).
            Nothing is published then, the temporary folder is removed, and older checkpoints are untouched.
    """
    attempt = peers.broadcast(_attempt_id() if peers.rank == 0 else None)
    final, folder = root / f"step_{step}", root / f"step_{step}.tmp-{attempt}"
    is_first = peers.rank == 0
    try:
        _together(peers, final, lambda: _prepare(folder, final, step, meta) if is_first else None)
        shard = _together(peers, final, lambda: _write_shard(folder, peers.rank, pieces))
        shards = peers.gather(shard)  # None but on rank 0
        _together(peers, final, lambda: _publish(folder, final, _merge(shards, step, meta)) if shards else None)
    except CheckpointError:
        # Only here, where all peers have agreed to stop: after a lost peer someone may still be writing.
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return final


def remove_old(root: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` valid checkpoints and return what was removed.

    Whatever is not named `step_<number>`, is a link, or has no readable manifest is left alone: what this program
    cannot prove to be its own whole checkpoint is evidence for a person, not waste. A folder is renamed before it is
    deleted, so that a half-deleted one never looks like a checkpoint.

    Raises:
        CheckpointError: keep is below 1, or a folder cannot be renamed.
    """
    if keep < 1:
        raise CheckpointError(f"{root}: asked to keep {keep} checkpoints; keep 1 or more")
    ours = [folder for folder in list_checkpoints(root) if not folder.is_symlink() and _fault(folder) is None]
    for folder in ours[keep:]:
        trash = root / f".trash-{folder.name}-{_attempt_id()}"
        try:
            folder.rename(trash)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be removed: {error.strerror}; check its owner") from None
        shutil.rmtree(trash, ignore_errors=True)
    return ours[keep:]


def set_aside(folder: Path) -> Path:
    """Rename a damaged `step_N` to `step_N.damaged-...`, so that the step can be saved again; return its new path.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    aside = folder.with_name(f"{folder.name}.damaged-{_attempt_id()}")
    try:
        return folder.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{folder}: is damaged and cannot be moved aside: {error.strerror}; move it") from None


def remove_stale_attempts(root: Path) -> list[Path]:
    """Remove what interrupted saves and removals left, `step_N.tmp-*` and `.trash-step_N*`; return what was removed.

    Only for when no save is under way, such as at the start of a run.
    """
    left = [path for path in root.glob("*") if re.fullmatch(r"step_[0-9]+\.tmp-.+|\.trash-step_[0-9]+.*", path.name)]
    stale = [path for path in left if path.is_dir() and not path.is_symlink()]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def _together(peers: Peers, final: Path, work: Callable[[], T]) -> T:
    """Do one part of a save; if it fails on any peer, raise the same CheckpointError on all."""
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    if peers.all_ok(failure is None):
        return result
    reasons = peers.gather(None if failure is None else _reason(failure))
    text = peers.broadcast("; ".join(f"writer {i}: {reason}" for i, reason in enumerate(reasons or []) if reason))
    raise CheckpointError(f"{final}: not saved: {text}") from failure


def _prepare(folder: Path, final: Path, step: int, meta: dict[str, Any]) -> None:
    _refuse_existing(final)
    encode_manifest(Manifest(step=step, meta=meta, files={}, tensors={}))  # bad meta shows before the long writing
    with _explained(folder, 0):
        folder.mkdir(parents=True)


def _refuse_existing(final: Path) -> None:
    if final.exists() and _fault(final) is None:
        raise CheckpointError(f"{final}: already holds a valid checkpoint; it is never overwritten, move it away first")


def _fault(folder: Path) -> CheckpointError | None:
    try:
        read_manifest(folder)
    except CheckpointError as error:
        return error
    return None


def _write_shard(folder: Path, writer: int, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Write this peer's pieces to the disk and return their part of the manifest as JSON."""
    path = folder / shard_name(writer)
    tensors: dict[str, Tensor] = {}
    slices: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        key = f"{piece.name}#{number}"
        tensors[key] = piece.data.detach().cpu()
        slices.append(
            {
                "name": piece.name,
                "global_shape": piece.global_shape,
                "dtype": str(piece.data.dtype).split(".")[-1],
                "key": key,
                "offset": piece.box.offset,
                "shape": piece.box.shape,
                "xxh3": tensor_xxh3(tensors[key]),
            }
        )
    need_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with _explained(path, need_bytes):
        if shutil.disk_usage(folder).free < _FREE_SPACE_FACTOR * need_bytes:
            raise OSError(errno.ENOSPC, "found before writing")
        save_file(tensors, path)
        put_on_disk(path)
        put_on_disk(folder)
        file = {"file": path.name, "bytes": path.stat().st_size, "header_xxh3": header_xxh3(path)}
    return file | {"slices": slices}


def _merge(shards: list[dict[str, Any]], step: int, meta: dict[str, Any]) -> Manifest:
    """Join what all writers reported and check that it is whole."""
    slices: dict[str, list[StoredSlice]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file, cut in ((shard["file"], cut) for shard in shards for cut in shard["slices"]):
        name, kind = cut["name"], (cut["dtype"], tuple(cut["global_shape"]))
        if kind[0] not in DTYPES:
            raise CheckpointError(f"tensor {name} is {kind[0]}; a checkpoint holds {', '.join(DTYPES)}")
        if kinds.setdefault(name, kind) != kind:
            raise CheckpointError(f"tensor {name} is {kinds[name]} for one writer and {kind} for another")
        box = Box(tuple(cut["offset"]), tuple(cut["shape"]))
        stored = StoredSlice(file=file, key=cut["key"], box=box, xxh3=cut["xxh3"])
        slices.setdefault(name, []).append(stored)
    tensors = {
        name: StoredTensor(dtype=dtype, shape=shape, slices=tuple(slices[name]))
        for name, (dtype, shape) in kinds.items()
    }
    for name, tensor in tensors.items():
        check_tensor_cover(name, tensor)
    files = {shard["file"]: StoredFile(size_bytes=shard["bytes"], header_xxh3=shard["header_xxh3"]) for shard in shards}
    return Manifest(step=step, meta=meta, files=files, tensors=tensors)


def _publish(folder: Path, final: Path, manifest: Manifest) -> None:
    path, text = folder / MANIFEST_NAME, encode_manifest(manifest)
    with _explained(path, len(text)):
        write_durably(path, text)
        put_on_disk(folder)
    _refuse_existing(final)
    with _explained(final, 0):
        if final.exists():
            final.rename(folder.with_name(folder.name.replace(".tmp-", ".damaged-")))
        # Fails if another run published the same step meanwhile: a non-empty folder is never replaced.
        folder.rename(final)
        put_on_disk(final.parent)


@contextmanager
def _explained(path: Path, need_bytes: int) -> Iterator[None]:
    """Turn failures of the file system into one line with the path, and a full disk into numbers."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # safetensors and torch pass the operating system's number on as text only.
        told = " ".join(str(error).split())
        if getattr(error, "errno", None) in _DISK_FULL or any(f"(os error {code})" in told for code in _DISK_FULL):
            free_bytes = shutil.disk_usage(path.parent).free
            raise CheckpointError(
                f"{path}: the disk is full: {need_bytes} bytes needed, {free_bytes} free ({told}); make room or "
                "choose another output folder"
            ) from error
        raise CheckpointError(f"{path}: cannot be written: {told}") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def _attempt_id() -> str:
    return f"{time.time_ns():x}-{os.getpid():x}"
