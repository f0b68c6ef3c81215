"""What a conversion reads from: named global tensors, any box of them, verified, without mapping or holding files.

Names are `kind/parameter`, as in our checkpoints: `weight/blocks.0...`, `ema/...`, `exp_avg/...`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box, shifted
from ecdit_ds.checkpoint.file_ranges import reading, require_plain_file
from ecdit_ds.checkpoint.finite import nonfinite_in_json
from ecdit_ds.checkpoint.manifest import DTYPES, encode_manifest
from ecdit_ds.checkpoint.naming import MANIFEST_NAME
from ecdit_ds.checkpoint.safetensors_file import TensorFile, check_shape
from ecdit_ds.checkpoint.slices import CheckedSlices
from ecdit_ds.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
PART_BYTES = 4 * 2**20
"""What is read, compared, cast or written at once: little enough to stay in a processor's cache on the way."""
KIND = re.compile(r"[a-z][a-z0-9_]*")
"""What tensors are of: `weight`, `ema`, or what an optimizer calls its own."""
Tick = Callable[[int], object]
"""Called with the bytes that were just dealt with."""


class CheckpointSource(Protocol):
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
    def nonfinite(self) -> Mapping[str, int] | None:
        """Return how many numbers it says are not finite, by tensor that has any; None where it does not say."""
        ...

    @property
    def identity(self) -> list[str]:
        """Return what tells this content from another: a restarted conversion goes on only with the same."""
        ...

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a global tensor, in its dtype; every byte of it was verified where the format allows."""
        ...


class EcditSource(CheckedSlices):
    """Our own format."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.step, self.meta, self.nonfinite = self.manifest.step, self.manifest.meta, self.manifest.nonfinite
        self.tensors = {name: (DTYPES[stored.dtype], stored.shape) for name, stored in self.manifest.tensors.items()}
        check_tensors(folder / MANIFEST_NAME, self.tensors)

    @property
    def identity(self) -> list[str]:
        return [xxhash.xxh3_64_hexdigest(encode_manifest(self.manifest))]

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a global tensor."""
        stored = self.manifest.tensors[name]
        out = None
        for cut in stored.slices:
            common = cut.box.intersect(box)
            if common is not None:
                found = self.read_slice(stored, cut, shifted(common, tuple(-start for start in cut.box.offset)))
                if common == box:
                    return found
                out = torch.empty(box.shape, dtype=found.dtype) if out is None else out
                out[common.within(box.offset)] = found
        return torch.empty(box.shape, dtype=DTYPES[stored.dtype]) if out is None else out


class SafetensorsSource:
    """A folder as `convert --to safetensors` or Hugging Face's libraries write it, with our `config.json`.

    The format has no checksums of data: what is wrong there cannot be found here, other than sizes and headers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_json(folder / CONFIG_NAME)
        self.step, self.meta = step_and_meta(folder / CONFIG_NAME, config)
        kind = config.get("kind")
        if not (isinstance(kind, str) and KIND.fullmatch(kind)):
            raise CheckpointError(f"{folder / CONFIG_NAME}: kind is {kind!r}, not a name, such as ema")
        index = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(index, dict) or not all(_is_plain_name(name) for name in index.values()):
            raise CheckpointError(f"{folder / INDEX_NAME}: weight_map does not map names to files of this folder")
        self._files = {name: TensorFile(folder / name) for name in sorted(set(index.values()))}
        self._where = {f"{kind}/{key}": (self._files[name], key) for key, name in index.items()}
        self._check_index(index)
        entries = {name: file.entries[key] for name, (file, key) in self._where.items()}
        self.tensors = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        check_tensors(folder, self.tensors)
        self.nonfinite = nonfinite_said(folder / CONFIG_NAME, config, self.tensors)

    @property
    def identity(self) -> list[str]:
        return [f"{name} {file.header_xxh3} {file.modified_ns}" for name, file in self._files.items()]

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a tensor."""
        file, key = self._where[name]
        return file.read(key, box)

    def _check_index(self, index: Mapping[str, str]) -> None:
        for key, name in index.items():
            if key not in self._files[name].entries:
                raise CheckpointError(f"{self.folder / name}: has no tensor {key}, which {INDEX_NAME} says it has")
        for name, file in self._files.items():
            for key in file.entries:
                if index.get(key) != name:
                    raise CheckpointError(f"{file.path}: tensor {key} is not in {INDEX_NAME}; add it or remove it")


def split_box(box: Box, itemsize: int) -> Iterator[Box]:
    """Cut a box into parts of at most PART_BYTES that follow one another in its row-major data; none if it is empty."""
    if box.numel * itemsize <= PART_BYTES:
        if box.numel:
            yield box
        return
    (first, *offset), (rows, *shape) = box.offset, box.shape
    num_rows = PART_BYTES // (math.prod(shape) * itemsize)
    if num_rows:
        for start in range(0, rows, num_rows):
            yield Box((first + start, *offset), (min(num_rows, rows - start), *shape))
        return
    for row in range(rows):
        for part in split_box(Box(tuple(offset), tuple(shape)), itemsize):
            yield Box((first + row, *part.offset), (1, *part.shape))


def open_checkpoint_source(path: Path) -> EcditSource | SafetensorsSource:
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


def read_part(source: CheckpointSource, name: str, box: Box) -> Tensor:
    """Return a box of a global tensor.

    Raises:
        CheckpointError: what the system refuses is told of the source, whoever asks.
    """
    try:
        return source.read(name, box)
    except OSError as error:
        raise CheckpointError(f"{error.filename or name}: cannot be read: {error.strerror or error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: it cannot be read, or is none that could be written again.
    """
    require_plain_file(path)
    try:
        with reading(path):
            content = json.loads(path.read_bytes())
        json.dumps(content, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object")
    return content


def step_and_meta(path: Path, content: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return what a JSON file says of how far the run was, and with what recipe."""
    step, meta = content.get("step"), content.get("meta")
    if type(step) is not int or not 0 <= step < 2**63:
        raise CheckpointError(f"{path}: step is {step!r}, not a whole number from 0 on")
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: meta is {meta!r}, not an object")
    return step, meta


def nonfinite_said(path: Path, content: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, int] | None:
    """Return what a JSON file says of numbers that are not finite; as `CheckpointSource.nonfinite`."""
    try:
        return nonfinite_in_json(content.get("nonfinite"), tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_tensors(path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Refuse names that cannot be told or written in one line, and shapes that no tensor has."""
    for name, (_, shape) in tensors.items():
        kind, _, parameter = name.partition("/")
        is_told = parameter.isprintable() and parameter not in ("", "__metadata__")
        if not (is_told and KIND.fullmatch(kind)):
            raise CheckpointError(f"{path}: tensor name {name!r} is not of the form kind/parameter, as ema/a.weight")
        try:
            check_shape(name, shape)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _is_plain_name(name: Any) -> bool:
    if not isinstance(name, str) or not name.isprintable():
        return False
    return name == Path(name).name and name.endswith(".safetensors")
