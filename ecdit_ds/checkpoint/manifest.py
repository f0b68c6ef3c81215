"""The manifest: what a checkpoint folder holds, and the proof that it is complete.

A checkpoint is a folder `step_N` with `manifest.json` and one safetensors file per writer. The manifest lists every
global tensor as slices (boxes) of files. Every byte of the folder is under a checksum (xxh3, 64 bits): the manifest's
own, one for each file's header, one for each slice's data. Checksums find damage; they do not prove who wrote a file.
"""

import gc
import json
import operator
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from ecdit_ds.checkpoint.boxes import Box, check_cover
from ecdit_ds.checkpoint.file_ranges import require_plain_file
from ecdit_ds.checkpoint.finite import nonfinite_in_json
from ecdit_ds.checkpoint.naming import MANIFEST_NAME, step_name, step_of
from ecdit_ds.errors import CheckpointError

FORMAT = "ecdit_ds"
VERSION = 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""Types a checkpoint may hold, by the name they have in the manifest."""

_SHARD_NAME = re.compile(r"shard-[0-9]{5,}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One safetensors file of a checkpoint."""

    size_bytes: int
    header_xxh3: str
    """Over the 8 length bytes and the JSON header, where safetensors keeps types, shapes and places."""


@dataclass(frozen=True, kw_only=True)
class StoredSlice:
    """One box of a global tensor: tensor `key` of `file`."""

    file: str
    key: str
    box: Box
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One global tensor and the slices that tile it; `dtype` is a key of DTYPES."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[StoredSlice, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of `manifest.json`."""

    step: int
    """Optimizer steps done."""
    meta: Mapping[str, Any]
    """What the saver wished to keep beside the tensors, as plain JSON: recipe, samples_seen, ..."""
    files: Mapping[str, StoredFile]
    tensors: Mapping[str, StoredTensor]
    nonfinite: Mapping[str, int] | None = None
    """Numbers that are NaN or infinite, by tensor that has any; None where nobody counted, as the first releases."""


def shard_name(writer: int) -> str:
    """Return the file name of the shard of one writer, counted from 0."""
    return f"shard-{writer:05d}.safetensors"


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`.

    Raises:
        TypeError, ValueError: `meta` is not plain JSON (NaN and infinity are not).
    """
    tensors = {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "slices": [_slice_to_json(cut) for cut in tensor.slices]}
        for name, tensor in manifest.tensors.items()
    }
    files = {name: {"bytes": file.size_bytes, "header_xxh3": file.header_xxh3} for name, file in manifest.files.items()}
    content = {"format": FORMAT, "version": VERSION, "step": manifest.step, "meta": dict(manifest.meta)}
    content |= {} if manifest.nonfinite is None else {"nonfinite": dict(manifest.nonfinite)}
    # Read back once: a whole-number key of `meta` sorts as text after a round trip, and the checksum must not change.
    content = json.loads(_canonical(content | {"files": files, "tensors": tensors}))
    return _canonical(content | {"xxh3": xxhash.xxh3_64_hexdigest(_canonical(content))})


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and check all of it but the data: files there, sizes right, tensors tiled.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = folder / MANIFEST_NAME
    require_plain_file(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing, so {folder.name} is no checkpoint; use another") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    manifest = decode_manifest(text, path)
    if step_of(folder) not in (-1, manifest.step):
        raise CheckpointError(
            f"{path}: is of step {manifest.step}, so its folder is misnamed; name it {step_name(manifest.step)}"
        )
    for name, file in manifest.files.items():
        _check_size(folder / name, file.size_bytes)
    return manifest


def _check_size(path: Path, size_bytes: int) -> None:
    require_plain_file(path)
    try:
        found_bytes = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; copy it again or resume from an older checkpoint") from None
    if found_bytes != size_bytes:
        raise CheckpointError(
            f"{path}: has {found_bytes} bytes where the manifest says {size_bytes}; "
            "copy it again or resume from an older checkpoint"
        )


def decode_manifest(text: bytes, path: Path) -> Manifest:
    """Return what the bytes of a `manifest.json` at `path` say, all of it checked.

    Raises:
        CheckpointError: naming the path and what is wrong.
    """
    with _without_collection():
        return _decoded(text, path)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Make many objects, none of which is garbage, without a search for garbage every few hundred of them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _decoded(text: bytes, path: Path) -> Manifest:
    with _named(path, "is not JSON"):
        data = json.loads(text.decode("ascii"))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a manifest of {FORMAT}")
    if data.get("version") != VERSION:
        raise CheckpointError(f"{path}: has version {data.get('version')!r}; this release reads version {VERSION}")
    claimed = data.pop("xxh3", None)
    with _named(path, "cannot be checked"):
        actual, is_intact = _check_signature(text, data, claimed)
    if not is_intact:
        raise CheckpointError(f"{path}: checksum is {actual}, recorded {claimed!r}: damaged; use an older checkpoint")
    with _named(path, "does not describe a checkpoint"):
        return _manifest_from_json(data)


@contextmanager
def _named(path: Path, fault: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {fault}: {' '.join(str(error).split())}; use another checkpoint") from None


def _manifest_from_json(data: dict[str, Any]) -> Manifest:
    files = {
        _shard(name): StoredFile(size_bytes=operator.index(file["bytes"]), header_xxh3=_text(file["header_xxh3"]))
        for name, file in data["files"].items()
    }
    tilings: dict[_Tiling, tuple[Box, ...]] = {}
    tensors = {name: _tensor_from_json(name, tensor, files, tilings) for name, tensor in data["tensors"].items()}
    for name, tensor in tensors.items():
        for stored in tensor.slices:
            if stored.file not in files:
                raise ValueError(f"tensor {name} has a slice in {stored.file}, which is not among the files")
    if not isinstance(data["meta"], dict):
        raise TypeError("meta is not a mapping")
    if type(data["step"]) is not int or not 0 <= data["step"] < 2**63:
        raise ValueError(f"step {data['step']!r} is not a whole number from 0 on")
    nonfinite = nonfinite_in_json(data.get("nonfinite"), tensors)
    return Manifest(step=data["step"], meta=data["meta"], files=files, tensors=tensors, nonfinite=nonfinite)


_Tiling = tuple[tuple[int, ...], tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]
"""Shape of a tensor, and offset and shape of its slices."""


def _tensor_from_json(
    name: str, data: dict[str, Any], files: Container[str], tilings: dict[_Tiling, tuple[Box, ...]]
) -> StoredTensor:
    """Return a tensor, proven to be tiled.

    Args:
        files: names that are known to be right.
        tilings: that were proven before, by which weight, average and moments of one cut are proven once; added to.
    """
    if data["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {data['dtype']!r}; known are {', '.join(DTYPES)}")
    cuts, shape = data["slices"], _sizes(data["shape"])
    tiling = shape, tuple([(_sizes(cut["offset"]), _sizes(cut["shape"])) for cut in cuts])
    boxes = tilings.get(tiling) or tuple(Box(*place) for place in tiling[1])
    slices = tuple(
        [
            StoredSlice(
                file=file if (file := _text(cut["file"])) in files else _shard(file),
                key=_text(cut["key"]),
                xxh3=_text(cut["xxh3"]),
                box=box,
            )
            for cut, box in zip(cuts, boxes, strict=True)
        ]
    )
    tensor = StoredTensor(dtype=data["dtype"], shape=shape, slices=slices)
    if tiling not in tilings:
        check_tensor_cover(name, tensor)
        tilings[tiling] = boxes
    return tensor


def check_tensor_cover(name: str, tensor: StoredTensor) -> None:
    """Prove that a tensor's slices tile it, or raise a CheckpointError that names the tensor."""
    try:
        check_cover(tensor.shape, (stored.box for stored in tensor.slices))
    except CheckpointError as error:
        raise CheckpointError(f"tensor {name}: {error}") from None


def _slice_to_json(stored: StoredSlice) -> dict[str, Any]:
    place = {"offset": stored.box.offset, "shape": stored.box.shape}
    return {"file": stored.file, "key": stored.key, **place, "xxh3": stored.xxh3}


def _check_signature(text: bytes, data: dict[str, Any], claimed: Any) -> tuple[str, bool]:
    """Return the checksum of a manifest's content, and whether its bytes are those that were signed.

    Byte for byte, so that damage which JSON shrugs off (1e-5 to 1E-5) is found as well.

    Args:
        text: of `manifest.json`.
        data: what it says, without the checksum.
        claimed: the checksum.
    """
    signature = f',"xxh3":"{claimed}"}}'.encode("ascii", "backslashreplace")  # where sorting puts it
    actual = xxhash.xxh3_64_hexdigest(text.removesuffix(signature) + b"}")
    if text.endswith(signature) and actual == claimed:
        return actual, True
    actual = xxhash.xxh3_64_hexdigest(_canonical(data))
    return actual, claimed == actual and text == _canonical(data | {"xxh3": claimed})


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _shard(name: Any) -> str:
    # Strict, since the name is joined to a path: no separator, no "..", nothing but what a save writes.
    if not _SHARD_NAME.fullmatch(_text(name)):
        raise ValueError(f"file name {name!r} is not of the form {shard_name(0)}")
    return str(name)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, values))
