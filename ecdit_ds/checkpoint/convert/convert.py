"""Conversion: the same tensors in other files, streamed; bitwise the same unless another type is asked for.

A conversion fills `DST.partial` (`workspace.py`), a file at a time. Each is read back and compared, then a note of what
it holds is left. Interrupted, the same command goes on with the file it was at; a file that reads back other than its
note says is written again. When all are there the folder of files is renamed to `DST`.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.file_plan import FileDigest, FilePlan, OutputTensor
from ecdit_ds.checkpoint.convert.sources import CONFIG_NAME, INDEX_NAME, CheckpointSource, Tick, read_part, split_box
from ecdit_ds.checkpoint.convert.workspace import Workspace, workspace
from ecdit_ds.checkpoint.finite import count_nonfinite, sum_nonfinite
from ecdit_ds.checkpoint.manifest import (
    Manifest,
    StoredFile,
    StoredSlice,
    StoredTensor,
    decode_manifest,
    encode_manifest,
)
from ecdit_ds.checkpoint.naming import MANIFEST_NAME
from ecdit_ds.errors import CheckpointError
from ecdit_ds.files.durable import write_durably

_READ_AHEAD = 4
"""Parts that wait for the writer; one thread reads them, in order, so that memory and disk see one after the other."""


@dataclass(frozen=True, kw_only=True)
class _Note:
    """What is known of a file that is on the disk."""

    plan: str
    """Digest of the whole conversion: source, names, boxes and types."""
    held: FileDigest


def convert_to_ecdit(source: CheckpointSource, destination: Path, files: list[FilePlan], tick: Tick) -> dict[str, int]:
    """Write our format; as `convert`."""

    def texts(held: Sequence[FileDigest]) -> dict[str, bytes]:
        return {MANIFEST_NAME: _encoded_manifest(source, destination, files, held)}

    return convert(source, destination, files, texts, tick)


def convert_to_safetensors(
    source: CheckpointSource, destination: Path, kind: str, files: list[FilePlan], tick: Tick
) -> dict[str, int]:
    """Write weights of one kind as Hugging Face's libraries do, with an index and our `config.json`; as `convert`."""
    weight_map = {target.key: plan.name for plan in files for target in plan.targets}
    total = sum(plan.nbytes for plan in files)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    config = {"model_type": "ecdit", "step": source.step, "kind": kind, "meta": dict(source.meta)}

    def texts(held: Sequence[FileDigest]) -> dict[str, bytes]:
        contents = {INDEX_NAME: index, CONFIG_NAME: config | {"nonfinite": nonfinite_of(files, held)}}
        return {name: json.dumps(text, indent=1, sort_keys=True).encode() + b"\n" for name, text in contents.items()}

    return convert(source, destination, files, texts, tick)


def nonfinite_of(files: Sequence[FilePlan], held: Sequence[FileDigest]) -> dict[str, int]:
    """Return how many numbers are NaN or infinite in what was written, by global tensor that has any."""
    return sum_nonfinite(
        (target.name, count)
        for plan, found in zip(files, held, strict=True)
        for target, count in zip(plan.targets, found.nonfinite, strict=True)
    )


def bytes_to_move(files: list[FilePlan]) -> int:
    """Return what a progress bar counts to: every byte is written once and read back once."""
    return 2 * sum(plan.nbytes for plan in files)


def convert(
    source: CheckpointSource,
    destination: Path,
    files: list[FilePlan],
    texts: Callable[[Sequence[FileDigest]], dict[str, bytes]],
    tick: Tick,
) -> dict[str, int]:
    """Write all files, then the texts about them, and publish; return the numbers that are not finite, by tensor.

    Args:
        texts: from what `files` hold to name -> content of what is written beside them; asked before anything is
            written as well, for its names and for what it refuses.
    """
    blank = [
        FileDigest(xxh3=("",) * (count := len(file.targets)), header_xxh3="", size_bytes=0, nonfinite=(0,) * count)
        for file in files
    ]
    try:
        names = {*(file.name for file in files), *texts(blank)}  # and nothing is begun whose texts would be refused
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{destination}: step or meta of the source cannot be kept as JSON: {error}") from None
    plan = xxhash.xxh3_64_hexdigest(json.dumps([source.identity, *map(repr, files)]).encode())
    with workspace(destination, names) as space:
        space.require_space(sum(file.nbytes for file in files))
        with ThreadPoolExecutor(max_workers=1) as reader:
            held = [_write_file(source, space, file, plan, reader, tick) for file in files]
        for name, text in texts(held).items():
            write_durably(space.place(name), text)
        space.publish()
    return nonfinite_of(files, held)


def _write_file(
    source: CheckpointSource, space: Workspace, file: FilePlan, plan: str, reader: ThreadPoolExecutor, tick: Tick
) -> FileDigest:
    """Write one file, or find it whole from an earlier attempt; return what it holds."""
    path = space.place(file.name)
    earlier = _read_note(space.note(file.name), plan)
    if earlier is not None and earlier == _read_back(file, path):
        tick(2 * file.nbytes)
        return earlier
    writer = file.writer(path)
    checksums, nonfinite = [xxhash.xxh3_64() for _ in file.targets], [0] * len(file.targets)
    for index, data in _read_ahead(source, file.targets, reader):
        values = writer.append(data)
        checksums[index].update(values)
        nonfinite[index] += count_nonfinite(data)
        tick(len(values))
    xxh3 = tuple(checksum.hexdigest() for checksum in checksums)
    held = FileDigest(xxh3=xxh3, header_xxh3=writer.header_xxh3, size_bytes=writer.close(), nonfinite=tuple(nonfinite))
    if held != _read_back(file, path):
        raise CheckpointError(f"{path}: reads back other than written; the disk may be failing, use another")
    write_durably(space.note(file.name), json.dumps(asdict(_Note(plan=plan, held=held))).encode())
    tick(file.nbytes)
    return held


def _read_back(file: FilePlan, path: Path) -> FileDigest | None:
    try:
        return file.read_back(path)
    except CheckpointError:
        return None


def _read_ahead(
    source: CheckpointSource, targets: tuple[OutputTensor, ...], reader: ThreadPoolExecutor
) -> Iterator[tuple[int, Tensor]]:
    """Yield all parts of all targets in order, while the next ones are being read."""
    waiting: deque[tuple[int, Future[Tensor]]] = deque()
    for index, target in enumerate(targets):
        for box in split_box(target.box, target.dtype.itemsize):
            waiting.append((index, reader.submit(_read_part, source, target, box)))
            if len(waiting) > _READ_AHEAD:
                first, data = waiting.popleft()
                yield first, data.result()
    for index, data in waiting:
        yield index, data.result()


def _read_part(source: CheckpointSource, target: OutputTensor, box: Box) -> Tensor:
    held = read_part(source, target.name, box)
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


def _overflow(source: CheckpointSource, target: OutputTensor) -> CheckpointError:
    """Return what to say of a tensor whose numbers do not fit into another type; reads all of it."""
    held, shape = source.tensors[target.name]
    count, largest = 0, 0.0
    for part in split_box(Box((0,) * len(shape), shape), held.itemsize):
        data = read_part(source, target.name, part)
        count += _num_overflows(data, data.to(target.dtype))
        largest = max(largest, float(data[data.isfinite()].abs().double().amax()) if data.isfinite().any() else 0.0)
    name, limit = _dtype_name(target.dtype), torch.finfo(target.dtype).max
    return CheckpointError(
        f"{target.name}: {count:,} numbers would become infinite in {name}, which ends at {limit:.6g}; the largest is "
        f"{largest:.6g}; choose a type that holds it"
    )


def _encoded_manifest(
    source: CheckpointSource, destination: Path, files: list[FilePlan], held: Sequence[FileDigest]
) -> bytes:
    """Return the bytes of a manifest that the reader accepts."""
    slices: dict[str, list[StoredSlice]] = {}
    dtypes: dict[str, str] = {}
    stored_files: dict[str, StoredFile] = {}
    for plan, found in zip(files, held, strict=True):
        stored_files[plan.name] = StoredFile(size_bytes=found.size_bytes, header_xxh3=found.header_xxh3)
        for target, xxh3 in zip(plan.targets, found.xxh3, strict=True):
            stored = StoredSlice(file=plan.name, key=target.key, box=target.box, xxh3=xxh3)
            slices.setdefault(target.name, []).append(stored)
            dtypes[target.name] = _dtype_name(target.dtype)
    tensors = {
        name: StoredTensor(dtype=dtypes[name], shape=source.tensors[name][1], slices=tuple(cuts))
        for name, cuts in slices.items()
    }
    encoded = encode_manifest(
        Manifest(
            step=source.step,
            meta=source.meta,
            files=stored_files,
            tensors=tensors,
            nonfinite=nonfinite_of(files, held),
        )
    )
    decode_manifest(encoded, destination / MANIFEST_NAME)
    return encoded


def _read_note(path: Path, plan: str) -> FileDigest | None:
    try:
        note = json.loads(path.read_bytes())
        held = note["held"]
        lists = {"xxh3": tuple(held["xxh3"]), "nonfinite": tuple(held["nonfinite"])}
        return FileDigest(**held | lists) if note["plan"] == plan else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
