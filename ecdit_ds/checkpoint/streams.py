"""Safetensors files read and written by position, a part at a time, so that memory does not grow with the file.

The library maps files, and mapped pages count as resident; a conversion of terabytes must not. The format is small:
8 bytes of header length, a JSON header with dtype, shape and place of each tensor, then the data without gaps.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.errors import CheckpointError

CHUNK_BYTES = 16 * 2**20
_HEADER_LIMIT_BYTES = 100_000_000  # what safetensors itself accepts
_CODES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file, open for reading.

    Raises:
        CheckpointError: it cannot be read, or is no such file: the header is checked before any of it is believed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            size_bytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self.entries, self.metadata = self._read_header(size_bytes)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: is not a whole safetensors file: {error}") from None

    def chunks(self, key: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order; each part is valid until the next is asked for."""
        entry, buffer = self.entries[key], bytearray(min(CHUNK_BYTES, self.entries[key].nbytes))
        for start in range(0, entry.nbytes, CHUNK_BYTES):
            part = memoryview(buffer)[: min(CHUNK_BYTES, entry.nbytes - start)]
            self._read_exactly(part, entry.begin + start)
            yield part

    def xxh3(self, key: str) -> str:
        """Return the checksum of a tensor's bytes."""
        digest = xxhash.xxh3_64()
        for part in self.chunks(key):
            digest.update(part)
        return digest.hexdigest()

    def read(self, key: str, box: Box) -> Tensor:
        """Return a box of a tensor; reads the rows of the first axis that it spans and no others."""
        entry = self.entries[key]
        if not entry.shape:
            return self._read_flat(entry, 0, 1).view(())
        row_numel = math.prod(entry.shape[1:])
        first, rows = box.offset[0], box.shape[0]
        whole_rows = self._read_flat(entry, first * row_numel, rows * row_numel).view(rows, *entry.shape[1:])
        return whole_rows[box.within((first, *[0] * (len(entry.shape) - 1)))]

    def close(self) -> None:
        self._file.close()

    def _read_flat(self, entry: Entry, start: int, numel: int) -> Tensor:
        out = torch.empty(numel, dtype=entry.dtype)
        if numel:
            size = entry.dtype.itemsize
            self._read_exactly(_bytes_of(out), entry.begin + start * size)
        return out

    def _read_exactly(self, into: memoryview, position: int) -> None:
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._file.fileno(), [into[done:]], position + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{self.path}: ends early, at byte {position + done}; use another checkpoint")
            done += count

    def _read_header(self, size_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
        prefix = bytearray(min(8, size_bytes))
        self._read_exactly(memoryview(prefix), 0)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 0 < header_bytes <= min(_HEADER_LIMIT_BYTES, size_bytes - 8):
            raise ValueError(f"{size_bytes} bytes do not hold the header it announces")
        text = bytearray(header_bytes)
        self._read_exactly(memoryview(text), 8)
        header = json.loads(text.decode("utf-8"))
        metadata = header.pop("__metadata__", {})
        entries = {key: _entry(key, value, 8 + header_bytes) for key, value in header.items()}
        end = 8 + header_bytes
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
            if entry.begin != end:
                raise ValueError(f"tensor {key} begins at byte {entry.begin}, not at {end}")
            end += entry.nbytes
        if end != size_bytes:
            raise ValueError(f"it has {size_bytes} bytes, its tensors end at {end}")
        return entries, metadata


def _bytes_of(flat: Tensor) -> memoryview:
    """Return the bytes of a flat tensor, without a copy."""
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _entry(key: str, value: dict[str, Any], data_start: int) -> Entry:
    shape = tuple(value["shape"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"tensor {key} has shape {list(shape)}")
    begin, end = value["data_offsets"]
    entry = Entry(dtype=_CODES[value["dtype"]], shape=shape, begin=data_start + begin)
    if begin < 0 or end - begin != entry.nbytes:
        raise ValueError(f"tensor {key} has {end - begin} bytes, its shape needs {entry.nbytes}")
    return entry


class TensorFileWriter:
    """Writes a safetensors file front to back.

    Args:
        path: overwritten.
        tensors: (key, dtype, shape) of all tensors, in the order in which their data will come.
        metadata: text by text, kept in the header.
    """

    def __init__(
        self, path: Path, tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        begin = 0
        for key, dtype, shape in tensors:
            end = begin + math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": _CODE_OF[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the library writes it
        self._head, self._left = len(text).to_bytes(8, "little") + text, begin
        self._file = path.open("wb", buffering=0)
        self._write(memoryview(self._head))

    @property
    def header_xxh3(self) -> str:
        return xxhash.xxh3_64_hexdigest(self._head)

    def append(self, data: Tensor) -> memoryview:
        """Write the next tensor's, or part of a tensor's, values; return their bytes."""
        flat = data.contiguous().reshape(-1)
        values = _bytes_of(flat)
        self._write(values)
        self._left -= len(values)
        return values

    def close(self) -> int:
        """Put the file on the disk and return its size in bytes."""
        assert self._left == 0, f"{self._left} bytes are missing"
        os.fsync(self._file.fileno())
        size_bytes = self._file.tell()
        self._file.close()
        return size_bytes

    def _write(self, values: memoryview) -> None:
        done = 0
        while done < len(values):
            done += self._file.write(values[done : done + 2**30]) or 0
