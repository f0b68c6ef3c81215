"""Conversion: the same tensors in other files, streamed; bitwise the same unless another type is asked for.

A conversion fills `DST.partial` (`partial.py`), a file at a time. Each is read back and compared, then a note of what
it holds is left. Interrupted, the same command goes on with the file it was at; a file that reads back other than its
note says is written again. When all are there the folder of files is renamed to `DST`.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    StoredFile,
    StoredSlice,
    StoredTensor,
    decode_manifest,
    encode_manifest,
    shard_name,
)
from ecdit_ds.checkpoint.partial import Workspace, workspace
from ecdit_ds.checkpoint.sources import CONFIG_NAME, INDEX_NAME, Source, Tick, parts_of
from ecdit_ds.checkpoint.streams import TensorFile, TensorFileWriter
from ecdit_ds.durable import write_durably
from ecdit_ds.errors import CheckpointError

_READ_AHEAD = 4
"""Parts that wait for the writer; one thread reads them, in order, so that memory and disk see one after the other."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One tensor of a new file: a box of a global tensor."""

    key: str
    name: str
    box: Box
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """One new file."""

    name: str
    targets: tuple[Target, ...]


@dataclass(frozen=True, kw_only=True)
class Note:
    """What one new file holds, as far as it was not known before."""

    plan: str
    """Of the whole conversion: source, names, boxes, types."""
    xxh3: tuple[str, ...]
    """Of the targets' data, in the plan's order."""
    header_xxh3: str
    size_bytes: int


def plan_files(source: Source, names: Sequence[str], num_files: int, dtype: torch.dtype | None) -> list[FilePlan]:
    """Deal whole tensors out over files of about equal size, in order; fewer files if there are fewer tensors."""
    targets = [_whole(source, name, dtype) for name in names]
    total, files, filled = sum(target.nbytes for target in targets), [[]], 0  # type: ignore[var-annotated]
    for target in targets:
        if files[-1] and len(files) < num_files and filled >= total * len(files) / num_files:
            files.append([])
        files[-1].append(target)
        filled += target.nbytes
    return [_file(shard_name(index), found) for index, found in enumerate(files)]


def plan_layout(
    source: Source, names: Sequence[str], cuts: Callable[[str], dict[int, int]], tp: int, ep: int,
    dtype: torch.dtype | None,
) -> list[FilePlan]:  # fmt: skip
    """Give each rank (tp + TP * ep) of a layout a file with its own slices, and one more to what all share.

    Args:
        cuts: name -> {axis: number of slices}; axis 0 of experts is cut over ep, the other over tp.
    """
    ranks: dict[int, list[Target]] = {}
    shared: list[Target] = []
    for name in names:
        whole = _whole(source, name, dtype)
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


def plan_safetensors(source: Source, kind: str, max_file_bytes: int, dtype: torch.dtype | None) -> list[FilePlan]:
    """Deal the tensors of one kind out as Hugging Face's libraries do: parameter names, numbered files."""
    files: list[list[Target]] = [[]]
    filled = 0
    for name in source.tensors:
        if name.startswith(f"{kind}/"):
            target = replace(_whole(source, name, dtype), key=name.removeprefix(f"{kind}/"))
            if files[-1] and filled + target.nbytes > max_file_bytes:
                files.append([])
                filled = 0
            files[-1].append(target)
            filled += target.nbytes
    names = (f"model-{index:05d}-of-{len(files):05d}.safetensors" for index in range(1, len(files) + 1))
    return [_file(name, found) for name, found in zip(names, files, strict=True)]


def convert_to_ecdit(source: Source, destination: Path, files: list[FilePlan], tick: Tick) -> None:
    """Write our format."""

    def texts(notes: Sequence[Note]) -> dict[str, bytes]:
        return {MANIFEST_NAME: _encoded_manifest(source, destination, files, notes)}

    _convert(source, destination, files, texts, tick)


def convert_to_safetensors(source: Source, destination: Path, kind: str, files: list[FilePlan], tick: Tick) -> None:
    """Write the weights of one kind as Hugging Face's libraries do, with an index and our `config.json`."""
    weight_map = {target.key: plan.name for plan in files for target in plan.targets}
    total = sum(target.nbytes for plan in files for target in plan.targets)
    contents = {
        INDEX_NAME: {"metadata": {"total_size": total}, "weight_map": weight_map},
        CONFIG_NAME: {"model_type": "ecdit", "step": source.step, "kind": kind, "meta": dict(source.meta)},
    }

    def texts(_: Sequence[Note]) -> dict[str, bytes]:
        return {name: json.dumps(text, indent=1, sort_keys=True).encode() + b"\n" for name, text in contents.items()}

    _convert(source, destination, files, texts, tick)


def bytes_to_move(files: list[FilePlan]) -> int:
    """Return what a progress bar counts to: every byte is written once and read back once."""
    return 2 * sum(target.nbytes for plan in files for target in plan.targets)


def _convert(
    source: Source, destination: Path, files: list[FilePlan], texts: Callable[[Sequence[Note]], dict[str, bytes]],
    tick: Tick,
) -> None:  # fmt: skip
    """Write all files, then the texts about them, and publish.

    Args:
        texts: from the notes on `files` to name -> content of what is written beside them.
    """
    blank = [Note(plan="", xxh3=("",) * len(file.targets), header_xxh3="", size_bytes=0) for file in files]
    try:
        names = {*(file.name for file in files), *texts(blank)}  # and nothing is begun whose texts would be refused
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{destination}: step or meta of the source cannot be kept as JSON: {error}") from None
    plan = _digest([source.identity, *([f.name, *map(repr, f.targets)] for f in files)])
    with workspace(destination, names) as space:
        space.require_space(sum(target.nbytes for file in files for target in file.targets))
        with ThreadPoolExecutor(max_workers=1) as reader:
            notes = [_write_file(source, space, file, plan, reader, tick) for file in files]
        for name, text in texts(notes).items():
            write_durably(space.files / name, text)
        space.publish()


def _write_file(
    source: Source, space: Workspace, plan: FilePlan, digest: str, reader: ThreadPoolExecutor, tick: Tick
) -> Note:
    """Write one file, or find it whole from an earlier attempt; return the note of what it holds."""
    path, nbytes = space.files / plan.name, sum(target.nbytes for target in plan.targets)
    earlier = _read_note(space.note(plan.name), digest)
    if earlier is not None and earlier == _read_back(path, plan, digest):
        tick(2 * nbytes)
        return earlier
    writer = TensorFileWriter(path, [(t.key, t.dtype, t.box.shape) for t in plan.targets], {"format": "pt"})
    checksums = [xxhash.xxh3_64() for _ in plan.targets]
    for index, data in _read_ahead(source, plan.targets, reader):
        values = writer.append(data)
        checksums[index].update(values)
        tick(len(values))
    xxh3 = tuple(checksum.hexdigest() for checksum in checksums)
    note = Note(plan=digest, xxh3=xxh3, header_xxh3=writer.header_xxh3, size_bytes=writer.close())
    if note != _read_back(path, plan, digest):
        raise CheckpointError(f"{path}: reads back other than written; the disk may be failing, use another")
    write_durably(space.note(plan.name), json.dumps(asdict(note)).encode())
    tick(nbytes)
    return note


def _read_back(path: Path, plan: FilePlan, digest: str) -> Note | None:
    """Return the note that a file on the disk deserves; None if it is no such file."""
    try:
        file = TensorFile(path)
        xxh3 = tuple(file.xxh3(target.key) for target in plan.targets if target.key in file.entries)
        return Note(plan=digest, xxh3=xxh3, header_xxh3=file.header_xxh3, size_bytes=file.size_bytes)
    except CheckpointError:
        return None


def _read_ahead(
    source: Source, targets: tuple[Target, ...], reader: ThreadPoolExecutor
) -> Iterator[tuple[int, Tensor]]:
    """Yield all parts of all targets in order, while the next ones are being read."""
    waiting: deque[tuple[int, Future[Tensor]]] = deque()
    for index, target in enumerate(targets):
        for box in parts_of(target.box, target.dtype.itemsize):
            waiting.append((index, reader.submit(_read_part, source, target, box)))
            if len(waiting) > _READ_AHEAD:
                first, data = waiting.popleft()
                yield first, data.result()
    for index, data in waiting:
        yield index, data.result()


def _read(source: Source, name: str, box: Box) -> Tensor:
    try:
        return source.read(name, box)
    except OSError as error:  # else the destination would be blamed
        raise CheckpointError(f"{error.filename or name}: cannot be read: {error.strerror or error}") from None


def _read_part(source: Source, target: Target, box: Box) -> Tensor:
    held = _read(source, target.name, box)
    cast = held.to(target.dtype)
    if held.dtype != cast.dtype and _num_overflows(held, cast):
        raise _overflow(source, target)
    return cast


def _num_overflows(held: Tensor, cast: Tensor) -> int:
    low, high = held.aminmax()
    limit = torch.finfo(cast.dtype).max
    if -limit <= float(low) and float(high) <= limit:  # nearly always; not if there is a NaN
        return 0
    return int((cast.isinf() & held.isfinite()).sum())


def _overflow(source: Source, target: Target) -> CheckpointError:
    """Return what to say of a tensor whose numbers do not fit into another type; reads all of it."""
    held, shape = source.tensors[target.name]
    count, largest = 0, 0.0
    for part in parts_of(Box((0,) * len(shape), shape), held.itemsize):
        data = _read(source, target.name, part)
        count += _num_overflows(data, data.to(target.dtype))
        largest = max(largest, float(data[data.isfinite()].abs().double().amax()) if data.isfinite().any() else 0.0)
    name, limit = _dtype_name(target.dtype), torch.finfo(target.dtype).max
    return CheckpointError(
        f"{target.name}: {count:,} numbers would become infinite in {name}, which ends at {limit:.6g}; the largest is "
        f"{largest:.6g}; choose a type that holds it"
    )


def _encoded_manifest(source: Source, destination: Path, files: list[FilePlan], notes: Sequence[Note]) -> bytes:
    """Return the bytes of a manifest that the reader accepts."""
    slices: dict[str, list[StoredSlice]] = {}
    dtypes: dict[str, str] = {}
    for plan, note in zip(files, notes, strict=True):
        for target, xxh3 in zip(plan.targets, note.xxh3, strict=True):
            stored = StoredSlice(file=plan.name, key=target.key, box=target.box, xxh3=xxh3)
            slices.setdefault(target.name, []).append(stored)
            dtypes[target.name] = _dtype_name(target.dtype)
    tensors = {
        name: StoredTensor(dtype=dtypes[name], shape=source.tensors[name][1], slices=tuple(found))
        for name, found in slices.items()
    }
    stored_files = {
        plan.name: StoredFile(size_bytes=note.size_bytes, header_xxh3=note.header_xxh3)
        for plan, note in zip(files, notes, strict=True)
    }
    encoded = encode_manifest(Manifest(step=source.step, meta=source.meta, files=stored_files, tensors=tensors))
    decode_manifest(encoded, destination / MANIFEST_NAME)
    return encoded


def _whole(source: Source, name: str, dtype: torch.dtype | None) -> Target:
    held, shape = source.tensors[name]
    new = dtype if dtype is not None and held.is_floating_point else held
    return Target(key=name, name=name, box=Box((0,) * len(shape), shape), dtype=new)


def _slice_of(whole: Target, by_axis: dict[int, int], index: dict[int, int]) -> Target:
    offset, shape = list(whole.box.offset), list(whole.box.shape)
    for axis, count in by_axis.items():
        if axis >= len(shape) or shape[axis] % count:
            held = list(whole.box.shape)
            raise CheckpointError(f"tensor {whole.name}: {count} slices do not divide axis {axis} of shape {held}")
        shape[axis] //= count
        offset[axis] = index[axis] * shape[axis]
    return Target(key=whole.key, name=whole.name, box=Box(tuple(offset), tuple(shape)), dtype=whole.dtype)


def _file(name: str, targets: Sequence[Target]) -> FilePlan:
    return FilePlan(name=name, targets=tuple(targets))


def _read_note(path: Path, digest: str) -> Note | None:
    try:
        note = json.loads(path.read_bytes())
        return Note(**note | {"xxh3": tuple(note["xxh3"])}) if note["plan"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(plan: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(plan).encode())
