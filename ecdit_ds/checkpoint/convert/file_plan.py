"""Which tensors go into which new files, by what a conversion is for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.sources import CheckpointSource
from ecdit_ds.checkpoint.manifest import shard_name
from ecdit_ds.checkpoint.safetensors_file import TensorFile, TensorFileWriter
from ecdit_ds.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """One tensor of a new file: a box of a global tensor."""

    key: str
    name: str
    box: Box
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What one file holds, by checksums."""

    xxh3: tuple[str, ...]
    """Checksum of each target's data, in the plan's order."""
    header_xxh3: str
    """Checksum of the file's header."""
    size_bytes: int
    nonfinite: tuple[int, ...] = field(default=(), compare=False)
    """Numbers that are NaN or infinite, by target; counted while it is written, and not by `read_back`."""


class Writer(Protocol):
    """Takes the targets' data in the plan's order, a part after another."""

    @property
    def header_xxh3(self) -> str: ...

    def append(self, data: Tensor) -> memoryview:
        """Take the next values; return their bytes, valid until the next call."""
        ...

    def close(self) -> int:
        """Put the file on the disk and return its size in bytes."""
        ...


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """One new file, in the format of safetensors."""

    name: str
    """Within the new folder."""
    targets: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)

    def writer(self, path: Path) -> Writer:
        """Begin the file; what was there is unlinked."""
        return TensorFileWriter(path, [(t.key, t.dtype, t.box.shape) for t in self.targets], {"format": "pt"})

    def read_back(self, path: Path) -> FileDigest:
        """Return what a file on the disk holds of this plan.

        Raises:
            CheckpointError: it is no such file.
        """
        file = TensorFile(path)
        xxh3 = tuple(file.xxh3(target.key) for target in self.targets if target.key in file.entries)
        return FileDigest(xxh3=xxh3, header_xxh3=file.header_xxh3, size_bytes=file.size_bytes)


def plan_files(
    source: CheckpointSource, names: Sequence[str], num_files: int, dtype: torch.dtype | None
) -> list[FilePlan]:
    """Deal whole tensors out over files of about equal size, in order; fewer files if there are fewer tensors."""
    targets = [whole_target(source, name, dtype) for name in names]
    total, files, filled = sum(target.nbytes for target in targets), [[]], 0  # type: ignore[var-annotated]
    for target in targets:
        if files[-1] and len(files) < num_files and filled >= total * len(files) / num_files:
            files.append([])
        files[-1].append(target)
        filled += target.nbytes
    return [_file(shard_name(index), found) for index, found in enumerate(files)]


def plan_layout(
    source: CheckpointSource,
    names: Sequence[str],
    cuts: Callable[[str], dict[int, int]],
    tp: int,
    ep: int,
    dtype: torch.dtype | None,
) -> list[FilePlan]:
    """Give each rank (tp + TP * ep) of a layout a file with its own slices, and one more to what all share.

    Args:
        cuts: name -> {axis: number of slices}; axis 0 of experts is cut over ep, the other over tp.
    """
    ranks: dict[int, list[OutputTensor]] = {}
    shared: list[OutputTensor] = []
    for name in names:
        whole = whole_target(source, name, dtype)
        if not (by_axis := cuts(name)):
            shared.append(whole)
            continue
        is_expert = len(whole.box.shape) == 3
        # What is cut over tp only is the same in all expert-parallel ranks; the first has it.
        for rank in range(tp * ep if is_expert else tp):
            index = {axis: (rank // tp if is_expert and axis == 0 else rank % tp) for axis in by_axis}
            ranks.setdefault(rank, []).append(_slice_of(whole, by_axis, index))
    filled = [*(ranks[rank] for rank in sorted(ranks)), *([shared] if shared else [])]
    return [_file(shard_name(index), found) for index, found in enumerate(filled)]


def plan_safetensors(
    source: CheckpointSource, kind: str, max_file_bytes: int, dtype: torch.dtype | None
) -> list[FilePlan]:
    """Deal the tensors of one kind out as Hugging Face's libraries do: parameter names, numbered files."""
    files: list[list[OutputTensor]] = [[]]
    filled = 0
    for name in source.tensors:
        if name.startswith(f"{kind}/"):
            target = replace(whole_target(source, name, dtype), key=name.removeprefix(f"{kind}/"))
            if files[-1] and filled + target.nbytes > max_file_bytes:
                files.append([])
                filled = 0
            files[-1].append(target)
            filled += target.nbytes
    names = (f"model-{index:05d}-of-{len(files):05d}.safetensors" for index in range(1, len(files) + 1))
    return [_file(name, found) for name, found in zip(names, files, strict=True)]


def whole_target(source: CheckpointSource, name: str, dtype: torch.dtype | None) -> OutputTensor:
    """Return a whole tensor; floating-point numbers become `dtype`, if it is one."""
    held, shape = source.tensors[name]
    new = dtype if dtype is not None and held.is_floating_point else held
    return OutputTensor(key=name, name=name, box=Box((0,) * len(shape), shape), dtype=new)


def _slice_of(whole: OutputTensor, by_axis: dict[int, int], index: dict[int, int]) -> OutputTensor:
    offset, shape = list(whole.box.offset), list(whole.box.shape)
    for axis, count in by_axis.items():
        if axis >= len(shape) or shape[axis] % count:
            held = list(whole.box.shape)
            raise CheckpointError(f"tensor {whole.name}: {count} slices do not divide axis {axis} of shape {held}")
        shape[axis] //= count
        offset[axis] = index[axis] * shape[axis]
    return OutputTensor(key=whole.key, name=whole.name, box=Box(tuple(offset), tuple(shape)), dtype=whole.dtype)


def _file(name: str, targets: Sequence[OutputTensor]) -> FilePlan:
    return FilePlan(name=name, targets=tuple(targets))
