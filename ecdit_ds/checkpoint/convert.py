"""Conversion: the same tensors in other files, streamed; bitwise the same unless another type is asked for.

A conversion fills `DST.partial`, a file at a time, each with a note of what it holds. Interrupted, the same command
goes on with the file it was at. When all are there they are read back and compared, and only then is the folder
renamed to `DST`.
"""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
    encode_manifest,
    shard_name,
)
from ecdit_ds.checkpoint.sources import CONFIG_NAME, INDEX_NAME, Source, Tick, parts_of
from ecdit_ds.checkpoint.streams import TensorFile, TensorFileWriter
from ecdit_ds.durable import put_on_disk, write_durably
from ecdit_ds.errors import CheckpointError

_READ_AHEAD = 2


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


def plan_files(source: Source, names: Sequence[str], num_files: int, dtype: torch.dtype | None) -> list[FilePlan]:
    """Deal whole tensors out over files of about equal size, in order; fewer files if there are fewer tensors."""
    targets = [_whole(source, name, dtype) for name in names]
    total, files, filled = sum(target.nbytes for target in targets), [[]], 0  # type: ignore[var-annotated]
    for target in targets:
        if files[-1] and filled >= total * len(files) / num_files:
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
    ranks: list[list[Target]] = [[] for _ in range(tp * ep)]
    shared: list[Target] = []
    for name in names:
        whole = _whole(source, name, dtype)
        if not (by_axis := cuts(name)):
            shared.append(whole)
            continue
        is_expert = len(whole.box.shape) == 3
        for rank, targets in enumerate(ranks):
            index = {axis: (rank // tp if is_expert and axis == 0 else rank % tp) for axis in by_axis}
            if not is_expert and rank >= tp:
                continue  # the first expert-parallel rank has it
            targets.append(_slice_of(whole, by_axis, index))
    return [_file(shard_name(i), found) for i, found in enumerate([*ranks, shared]) if found]


def convert_to_ecdit(source: Source, destination: Path, files: list[FilePlan], tick: Tick) -> None:
    """Write our format."""
    partial, notes = _write_files(source, destination, files, tick)
    slices: dict[str, list[StoredSlice]] = {}
    for plan, note in zip(files, notes, strict=True):
        for target, xxh3 in zip(plan.targets, note["xxh3"], strict=True):
            stored = StoredSlice(file=plan.name, key=target.key, box=target.box, xxh3=xxh3)
            slices.setdefault(target.name, []).append(stored)
    dtypes = {target.name: target.dtype for plan in files for target in plan.targets}
    tensors = {
        name: StoredTensor(dtype=_dtype_name(dtypes[name]), shape=source.tensors[name][1], slices=tuple(found))
        for name, found in slices.items()
    }
    stored_files = {
        plan.name: StoredFile(size_bytes=note["bytes"], header_xxh3=note["header_xxh3"])
        for plan, note in zip(files, notes, strict=True)
    }
    manifest = Manifest(step=source.step, meta=source.meta, files=stored_files, tensors=tensors)
    _finish(partial, destination, files, notes, {MANIFEST_NAME: encode_manifest(manifest)}, tick)


def convert_to_safetensors(
    source: Source, destination: Path, kind: str, dtype: torch.dtype | None, max_file_bytes: int, tick: Tick
) -> None:
    """Write the weights of one kind as Hugging Face's libraries do: parameter names, numbered files, an index."""
    names = [name for name in source.tensors if name.startswith(f"{kind}/")]
    files: list[list[Target]] = [[]]
    for name in names:
        whole = _whole(source, name, dtype)
        target = Target(key=name.removeprefix(f"{kind}/"), name=name, box=whole.box, dtype=whole.dtype)
        if files[-1] and sum(t.nbytes for t in files[-1]) + target.nbytes > max_file_bytes:
            files.append([])
        files[-1].append(target)
    plans = [
        _file(f"model-{index:05d}-of-{len(files):05d}.safetensors", found) for index, found in enumerate(files, start=1)
    ]
    partial, notes = _write_files(source, destination, plans, tick)
    weight_map = {target.key: plan.name for plan in plans for target in plan.targets}
    total = sum(target.nbytes for plan in plans for target in plan.targets)
    config = {"model_type": "ecdit", "step": source.step, "kind": kind, "meta": dict(source.meta)}
    texts = {
        INDEX_NAME: {"metadata": {"total_size": total}, "weight_map": weight_map},
        CONFIG_NAME: config,
    }
    encoded = {name: json.dumps(text, indent=1, sort_keys=True).encode() + b"\n" for name, text in texts.items()}
    _finish(partial, destination, plans, notes, encoded, tick)


def bytes_to_move(files: list[FilePlan]) -> int:
    """Return what a progress bar counts to: every byte is written once and read back once."""
    return 2 * sum(target.nbytes for plan in files for target in plan.targets)


def _write_files(
    source: Source, destination: Path, files: list[FilePlan], tick: Tick
) -> tuple[Path, list[dict[str, Any]]]:
    if destination.exists():
        raise CheckpointError(f"{destination}: exists already; a conversion overwrites nothing, choose another name")
    partial = destination.with_name(f"{destination.name}.partial")
    plan = _digest([source.identity, *([f.name, *map(repr, f.targets)] for f in files)])
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _check_space(partial, sum(target.nbytes for file in files for target in file.targets))
        with ThreadPoolExecutor(max_workers=_READ_AHEAD) as readers:
            return partial, [_write_file(source, partial, file, plan, readers, tick) for file in files]
    except OSError as error:
        raise CheckpointError(
            f"{partial}: cannot be written: {error.strerror or error}; the same command goes on from here"
        ) from None


def _write_file(
    source: Source, folder: Path, plan: FilePlan, digest: str, readers: ThreadPoolExecutor, tick: Tick
) -> dict[str, Any]:
    """Write one file, or find it whole from an earlier attempt; return the note of what it holds."""
    note_path, path = folder / f"{plan.name}.note", folder / plan.name
    if (note := _read_note(note_path, digest)) and path.is_file() and path.stat().st_size == note["bytes"]:
        tick(sum(target.nbytes for target in plan.targets))
        return note
    writer = TensorFileWriter(path, [(t.key, t.dtype, t.box.shape) for t in plan.targets], {"format": "pt"})
    checksums = [xxhash.xxh3_64() for _ in plan.targets]
    for index, data in _read_ahead(source, plan.targets, readers):
        values = writer.append(data)
        checksums[index].update(values)
        tick(len(values))
    note = {
        "plan": digest,
        "xxh3": [checksum.hexdigest() for checksum in checksums],
        "header_xxh3": writer.header_xxh3,
        "bytes": writer.close(),
    }
    write_durably(note_path, json.dumps(note).encode())
    return note


def _read_ahead(
    source: Source, targets: tuple[Target, ...], readers: ThreadPoolExecutor
) -> Iterator[tuple[int, Tensor]]:
    """Yield all parts of all targets in order, while the next ones are being read."""
    waiting: deque[tuple[int, Future[Tensor]]] = deque()
    for index, target in enumerate(targets):
        for box in parts_of(target.box, target.dtype.itemsize):
            waiting.append((index, readers.submit(_read_part, source, target, box)))
            if len(waiting) > _READ_AHEAD:
                first, data = waiting.popleft()
                yield first, data.result()
    for index, data in waiting:
        yield index, data.result()


def _read_part(source: Source, target: Target, box: Box) -> Tensor:
    return source.read(target.name, box).to(target.dtype)


def _finish(
    partial: Path, destination: Path, files: list[FilePlan], notes: list[dict[str, Any]], texts: dict[str, bytes],
    tick: Tick,
) -> None:  # fmt: skip
    """Read everything back, add the texts, and publish."""
    for plan, note in zip(files, notes, strict=True):
        written = TensorFile(partial / plan.name)
        for target, xxh3 in zip(plan.targets, note["xxh3"], strict=True):
            if written.xxh3(target.key) != xxh3:
                (partial / f"{plan.name}.note").unlink()
                raise CheckpointError(
                    f"{partial / plan.name}: {target.key} reads back other than written; the disk may be failing. The "
                    "same command writes this file again"
                )
            tick(target.nbytes)
        written.close()
    try:
        for name, text in texts.items():
            write_durably(partial / name, text)
        for plan in files:
            (partial / f"{plan.name}.note").unlink()
        put_on_disk(partial)
        partial.rename(destination)
        put_on_disk(destination.parent)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written: {error.strerror}; start the same command") from None


def _whole(source: Source, name: str, dtype: torch.dtype | None) -> Target:
    held, shape = source.tensors[name]
    new = dtype if dtype is not None and held.is_floating_point else held
    return Target(key=name, name=name, box=Box((0,) * len(shape), shape), dtype=new)


def _slice_of(whole: Target, by_axis: dict[int, int], index: dict[int, int]) -> Target:
    offset, shape = list(whole.box.offset), list(whole.box.shape)
    for axis, count in by_axis.items():
        if shape[axis] % count:
            raise CheckpointError(f"tensor {whole.name}: {count} slices do not divide its axis {axis} of {shape[axis]}")
        shape[axis] //= count
        offset[axis] = index[axis] * shape[axis]
    return Target(key=whole.key, name=whole.name, box=Box(tuple(offset), tuple(shape)), dtype=whole.dtype)


def _file(name: str, targets: Sequence[Target]) -> FilePlan:
    return FilePlan(name=name, targets=tuple(targets))


def _read_note(path: Path, digest: str) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads(path.read_bytes())
        return note if note["plan"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_space(folder: Path, need_bytes: int) -> None:
    held = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free + held
    if free < need_bytes:
        raise CheckpointError(f"{folder}: the disk is full: {need_bytes} bytes needed, {free} free; make room")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(plan: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(plan).encode())
