"""Saving a checkpoint: begun together, written by each peer alone, published together, whole or not at all.

Every writer puts its pieces of global tensors into one safetensors file of a temporary folder. Once all are on the
disk the first writer checks that the pieces tile every tensor, adds the manifest and renames the folder to `step_N`.
So a folder with that name is whole, or was damaged later, and nothing on disk says which rank held what.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.fault_points import PhaseHook, no_hook
from ecdit_ds.checkpoint.finite import count_nonfinite, sum_nonfinite
from ecdit_ds.checkpoint.lease import Lease, attempt_name
from ecdit_ds.checkpoint.manifest import (
    DTYPES,
    Manifest,
    StoredFile,
    StoredSlice,
    StoredTensor,
    check_tensor_cover,
    encode_manifest,
    shard_name,
)
from ecdit_ds.checkpoint.naming import MANIFEST_NAME, step_name
from ecdit_ds.checkpoint.peers import Peers
from ecdit_ds.checkpoint.retention import find_damage, write_latest
from ecdit_ds.checkpoint.safetensors_file import TensorFile, TensorFileWriter
from ecdit_ds.errors import CheckpointError, StaleRunError
from ecdit_ds.files.durable import make_folders, put_on_disk, write_durably

_FREE_SPACE_FACTOR = 1.05  # headers, file system blocks, and whoever else writes meanwhile
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PART_NUMEL = 2**20
"""Numbers that are checksummed and written at once: few enough to be in the cache the second time."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorShard:
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


class Save:
    """A checkpoint on its way to `root/step_N`; made and published by all peers together, written by each alone.

    Args:
        root: folder of checkpoints, shared by all peers; made if missing.
        step: optimizer steps done.
        pieces: what this peer contributes; over all peers each element of each tensor exactly once (replicas are
            written by one of their holders).
        meta: plain JSON to keep beside the tensors, such as the recipe and samples_seen; rank 0's is written.
        peers: who else writes.
        lease: without it anyone may publish.
        reached: called with each of PHASES.

    Raises:
        CheckpointError: on every peer when any failed (too little room for all, step already saved, bad meta).
            Nothing is left behind, and older checkpoints are untouched.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        pieces: Iterable[TensorShard],
        meta: dict[str, Any],
        peers: Peers,
        lease: Lease | None = None,
        reached: PhaseHook = no_hook,
    ) -> None:
        self.step, self._meta, self._peers, self._lease, self._reached = step, meta, peers, lease, reached
        attempt = peers.broadcast((lease.attempt if lease else attempt_name()) if peers.rank == 0 else None)
        self.folder, self._writing = root / step_name(step), root / f"{step_name(step)}.tmp-{attempt}"
        self._shard: dict[str, Any] | None = None
        self.fault: str | None = None
        """Why this peer's part could not be written."""
        self.nonfinite: dict[str, int] = {}
        """On every peer, once published: numbers that are NaN or infinite, by tensor."""
        with self._all_or_nothing():
            self.pieces = self._together(lambda: list(pieces))
            """Read by `write`; whoever replaces them by copies may change the originals meanwhile."""
            self.nbytes = sum(piece.data.nbytes for piece in self.pieces)
            needs = peers.gather(self.nbytes)
            self._together(lambda: self._prepare(sum(needs)) if needs else None)

    def write(self, *, read_back: bool) -> None:
        """Put this peer's pieces on the disk; asks no peer, so any thread may. What fails is told by `publish`.

        Args:
            read_back: also read the file again from the disk and compare every checksum.
        """
        path = self._writing / shard_name(self._peers.rank)
        try:
            with _explained(path, self.nbytes):
                self._shard = _write_shard(path, self.pieces, self._reached)
                if read_back:
                    _read_back(path, self._shard)
        except Exception as error:
            self.fault = _reason(error)  # not the error, which would keep the file open, and its space taken

    def publish(self) -> Path:
        """Make it `root/step_N`, once every peer has written, and return that folder when it is on the disk.

        Raises:
            CheckpointError: on every peer when any failed (disk full, pieces that do not tile). Nothing is published
                then, and the temporary folder is removed.
            StaleRunError: a newer attempt of the run has taken over.
        """
        with self._all_or_nothing():
            shard = self._together(self._written)
            shards = self._peers.gather(shard)  # None but on rank 0
            found = self._together(lambda: self._rename(_merge(shards, self.step, self._meta)) if shards else {})
        self.nonfinite = self._peers.broadcast(found)
        return self.folder

    def _written(self) -> dict[str, Any]:
        if self.fault is not None:
            raise CheckpointError(self.fault)
        if self._shard is None:
            raise CheckpointError("the writer ended without a word")
        return self._shard

    def _prepare(self, need_bytes: int) -> None:
        self._reached("before-mkdir")
        _refuse_existing(self.folder)
        # Bad meta shows before the long writing.
        encode_manifest(Manifest(step=self.step, meta=self._meta, files={}, tensors={}))
        with _explained(self._writing, need_bytes):
            make_folders(self._writing.parent)
            self._writing.mkdir()
            if shutil.disk_usage(self._writing).free < _FREE_SPACE_FACTOR * need_bytes:
                raise OSError(errno.ENOSPC, "found before writing")

    def _rename(self, manifest: Manifest) -> dict[str, int]:
        """Publish, and return what is not finite: that is evidence for a person, and `latest` names another."""
        nonfinite = dict(manifest.nonfinite or {})
        self._reached("before-manifest")
        path, text = self._writing / MANIFEST_NAME, encode_manifest(manifest)
        with _explained(path, len(text)):
            write_durably(path, text)
            put_on_disk(self._writing)
        self._reached("before-rename")
        with self._lease.held() if self._lease else _nothing_held():
            _refuse_existing(self.folder)
            with _explained(self.folder, 0):
                if self.folder.exists():
                    self.folder.rename(self._writing.with_name(self._writing.name.replace(".tmp-", ".damaged-")))
                # Fails if another run published the same step meanwhile: a non-empty folder is never replaced.
                self._writing.rename(self.folder)
        with suppress(OSError):  # it is there now, whatever comes
            self._reached("after-rename")
            put_on_disk(self.folder.parent)
            self._reached("before-latest")
            if not nonfinite:
                write_latest(self.folder.parent, self.folder)
        return nonfinite

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            # Only here, where all peers have agreed to stop: after a lost peer someone may still be writing.
            if self._peers.rank == 0:
                shutil.rmtree(self._writing, ignore_errors=True)
            raise

    def _together(self, work: Callable[[], T]) -> T:
        """Do one part of a save; if it fails on any peer, raise the same CheckpointError on all."""
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        if self._peers.all_true(failure is None):
            return result
        told = self._peers.gather(failure and (_reason(failure), isinstance(failure, StaleRunError)))
        faults = [(writer, *fault) for writer, fault in enumerate(told or []) if fault]
        text = "; ".join(f"writer {writer}: {reason}" for writer, reason, _ in faults)
        text, is_stale = self._peers.broadcast((text, any(is_stale for *_, is_stale in faults)))
        kind = StaleRunError if is_stale else CheckpointError
        raise kind(f"{self.folder}: not saved: {text}") from failure


def save_checkpoint(
    root: Path,
    step: int,
    pieces: Iterable[TensorShard],
    meta: dict[str, Any],
    peers: Peers,
    lease: Lease | None = None,
    reached: PhaseHook = no_hook,
    *,
    read_back: bool = False,
) -> Path:
    """Write `root/step_N` together with all peers and return it; for arguments and errors see `Save`."""
    save = Save(root, step, pieces, meta, peers, lease, reached)
    save.write(read_back=read_back)
    return save.publish()


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final) and (final.is_symlink() or not final.is_dir()):
        raise CheckpointError(f"{final}: is there already and is no folder; move it away")
    if final.exists() and find_damage(final) is None:
        raise CheckpointError(f"{final}: already holds a valid checkpoint; it is never overwritten, move it away first")


def _write_shard(path: Path, pieces: list[TensorShard], reached: PhaseHook) -> dict[str, Any]:
    """Write pieces one after the other and return their part of the manifest as JSON."""
    keys = [f"{piece.name}#{number}" for number, piece in enumerate(pieces)]
    for piece in pieces:
        if _dtype_name(piece) not in DTYPES:
            raise CheckpointError(
                f"tensor {piece.name} is {_dtype_name(piece)}; a checkpoint holds {', '.join(DTYPES)}"
            )
    kinds = [(key, piece.data.dtype, piece.box.shape) for key, piece in zip(keys, pieces, strict=True)]
    writer = TensorFileWriter(path, kinds, {"format": "pt"})
    slices: list[dict[str, Any]] = []
    for key, piece in zip(keys, pieces, strict=True):
        if len(slices) == len(pieces) // 2:
            reached("mid-shard")
        digest, nonfinite = xxhash.xxh3_64(), 0
        for part in piece.data.detach().reshape(-1).cpu().split(_PART_NUMEL):
            digest.update(writer.append(part))
            nonfinite += count_nonfinite(part)
        slices.append(
            {
                "name": piece.name,
                "global_shape": piece.global_shape,
                "dtype": _dtype_name(piece),
                "key": key,
                "offset": piece.box.offset,
                "shape": piece.box.shape,
                "xxh3": digest.hexdigest(),
                "nonfinite": nonfinite,
            }
        )
    size_bytes = writer.close()
    put_on_disk(path.parent)
    return {"file": path.name, "bytes": size_bytes, "header_xxh3": writer.header_xxh3, "slices": slices}


def _read_back(path: Path, shard: dict[str, Any]) -> None:
    """Compare what the disk returns with what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # else the page cache would answer
    finally:
        os.close(descriptor)
    file = TensorFile(path)
    for cut in shard["slices"]:
        if (actual := file.xxh3(cut["key"])) != cut["xxh3"]:
            raise CheckpointError(
                f"{path}: {cut['key']} reads back with checksum {actual}, written {cut['xxh3']}: the disk or the "
                "memory may be failing"
            )


def _merge(shards: list[dict[str, Any]], step: int, meta: dict[str, Any]) -> Manifest:
    """Join what all writers reported and check that it is whole."""
    slices: dict[str, list[StoredSlice]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file, cut in ((shard["file"], cut) for shard in shards for cut in shard["slices"]):
        name, kind = cut["name"], (cut["dtype"], tuple(cut["global_shape"]))
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
    nonfinite = sum_nonfinite((cut["name"], cut["nonfinite"]) for shard in shards for cut in shard["slices"])
    return Manifest(step=step, meta=meta, files=files, tensors=tensors, nonfinite=nonfinite)


@contextmanager
def _explained(path: Path, need_bytes: int) -> Iterator[None]:
    """Turn failures of the file system into one line with the path, and a full disk into numbers."""
    try:
        yield
    except OSError as error:
        told = " ".join(str(error).split())
        if error.errno in _DISK_FULL:
            free_bytes = shutil.disk_usage(path.parent).free
            raise CheckpointError(
                f"{path}: the disk is full: {need_bytes} bytes needed, {free_bytes} free ({told}); make room or "
                "choose another output folder"
            ) from error
        raise CheckpointError(f"{path}: cannot be written: {told}") from error


@contextmanager
def _nothing_held() -> Iterator[None]:
    yield


def _dtype_name(piece: TensorShard) -> str:
    return str(piece.data.dtype).removeprefix("torch.")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"
