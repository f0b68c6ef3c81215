"""What a conversion reads from: named global tensors, any box of them, verified, without mapping or holding files.

Names are `kind/parameter`, as in our checkpoints: `weight/blocks.0...`, `ema/...`, `exp_avg/...`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.manifest import (
    DTYPES,
    MANIFEST_NAME,
    StoredSlice,
    StoredTensor,
    header_xxh3,
    read_manifest,
    tensor_xxh3,
)
from ecdit_ds.checkpoint.streams import TensorFile
from ecdit_ds.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
PART_BYTES = 32 * 2**20
"""What is read, compared, cast or written at once."""
Tick = Callable[[int], object]
"""Called with the bytes that were just dealt with."""
SMALL_BYTES = 64 * 2**20
"""Slices up to this size are read once, verified and kept until the next; larger ones are read twice."""


class Source(Protocol):
    """A checkpoint of any format."""

    @property
    def step(self) -> int: ...
    @property
    def meta(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and global shape by name."""
        ...

    @property
    def identity(self) -> list[str]:
        """Return what tells this content from another: a restarted conversion goes on only with the same."""
        ...

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a global tensor, in its dtype; every byte of it was verified where the format allows."""
        ...


class EcditSource:
    """Our own format.

    Raises:
        CheckpointError: as `read_manifest`; reading raises it for damage, naming the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._files: dict[str, TensorFile] = {}
        self._verified: set[tuple[str, str]] = set()
        self._kept: tuple[tuple[str, str], Tensor] | None = None

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.manifest.meta

    @property
    def tensors(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (DTYPES[stored.dtype], stored.shape) for name, stored in self.manifest.tensors.items()}

    @property
    def identity(self) -> list[str]:
        return [str(json.loads((self.folder / MANIFEST_NAME).read_bytes())["xxh3"])]

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a global tensor."""
        stored = self.manifest.tensors[name]
        out = torch.empty(box.shape, dtype=DTYPES[stored.dtype])
        for cut in stored.slices:
            common = cut.box.intersect(box)
            if common is not None:
                local = Box(tuple(a - b for a, b in zip(common.offset, cut.box.offset, strict=True)), common.shape)
                out[common.within(box.offset)] = self._read_slice(stored, cut, local)
        return out

    def verify_slice(self, stored: StoredTensor, cut: StoredSlice) -> None:
        """Compare a slice with its checksum, without holding it."""
        if (cut.file, cut.key) not in self._verified:
            file = self._entry(stored, cut)
            self._compare(cut, file.xxh3(cut.key))

    def _read_slice(self, stored: StoredTensor, cut: StoredSlice, local: Box) -> Tensor:
        place = (cut.file, cut.key)
        file = self._entry(stored, cut)
        if file.entries[cut.key].nbytes > SMALL_BYTES:
            self.verify_slice(stored, cut)
            return file.read(cut.key, local)
        kept = self._kept  # several threads read: each looks at one pair only
        if kept is None or kept[0] != place:
            kept = place, file.read(cut.key, Box((0,) * len(cut.box.shape), cut.box.shape))
            self._compare(cut, tensor_xxh3(kept[1]))
            self._kept = kept
        return kept[1][local.within((0,) * len(local.shape))]

    def _compare(self, cut: StoredSlice, actual: str) -> None:
        if actual != cut.xxh3:
            raise CheckpointError(
                f"{self.folder / cut.file}: {cut.key} has checksum {actual}, recorded {cut.xxh3}: damaged; use another "
                "checkpoint"
            )
        self._verified.add((cut.file, cut.key))

    def _entry(self, stored: StoredTensor, cut: StoredSlice) -> TensorFile:
        path = self.folder / cut.file
        if cut.file not in self._files:
            actual, recorded = header_xxh3(path), self.manifest.files[cut.file].header_xxh3
            if actual != recorded:
                raise CheckpointError(f"{path}: header has checksum {actual}, recorded {recorded}: damaged")
            self._files[cut.file] = TensorFile(path)
        file = self._files[cut.file]
        found = file.entries.get(cut.key)
        if found is None or (found.dtype, found.shape) != (DTYPES[stored.dtype], cut.box.shape):
            raise CheckpointError(f"{path}: {cut.key} is not what the manifest says; use another checkpoint")
        return file


class SafetensorsSource:
    """A folder as `convert --to safetensors` or Hugging Face's libraries write it, with our `config.json`.

    The format has no checksums of data: what is wrong there cannot be found here, other than sizes and headers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _read_json(folder / CONFIG_NAME)
        try:
            self.step, self._kind = int(config["step"]), str(config["kind"])
            self.meta: Mapping[str, Any] = dict(config["meta"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / CONFIG_NAME}: lacks what a checkpoint needs: {error}") from None
        index = _read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(index, dict) or not all(_is_plain_name(name) for name in index.values()):
            raise CheckpointError(f"{folder / INDEX_NAME}: weight_map does not map names to files of this folder")
        self._files = {name: TensorFile(folder / name) for name in sorted(set(index.values()))}
        self._where = {f"{self._kind}/{key}": (self._files[name], key) for key, name in index.items()}
        for file, key in self._where.values():
            if key not in file.entries:
                raise CheckpointError(f"{file.path}: has no tensor {key}, which {INDEX_NAME} says it has")

    @property
    def tensors(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        entries = {name: file.entries[key] for name, (file, key) in self._where.items()}
        return {name: (entry.dtype, entry.shape) for name, entry in entries.items()}

    @property
    def identity(self) -> list[str]:
        return [f"{name} {header_xxh3(file.path)} {file.path.stat().st_mtime_ns}" for name, file in self._files.items()]

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a tensor."""
        file, key = self._where[name]
        return file.read(key, box)


def parts_of(box: Box, itemsize: int) -> Iterator[Box]:
    """Cut a box along its first axis into parts of at most PART_BYTES (or one row)."""
    if not box.shape:
        yield box
        return
    (first, *offset), (rows, *shape) = box.offset, box.shape
    step = max(1, PART_BYTES // max(1, math.prod(shape) * itemsize))
    for start in range(0, rows, step):
        yield Box((first + start, *offset), (min(step, rows - start), *shape))


def open_source(path: Path) -> EcditSource | SafetensorsSource:
    """Open a checkpoint folder of a format that is known here.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    if (path / MANIFEST_NAME).exists():
        return EcditSource(path)
    if (path / INDEX_NAME).exists():
        return SafetensorsSource(path)
    raise CheckpointError(
        f"{path}: holds neither {MANIFEST_NAME} (our format) nor {INDEX_NAME} (safetensors); give a checkpoint's folder"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object")
    return content


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
