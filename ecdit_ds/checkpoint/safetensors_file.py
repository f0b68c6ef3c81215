"""Safetensors files read and written by position, a part at a time, so that memory does not grow with the file.

The library maps files, and mapped pages count as resident; a conversion of terabytes must not. The format is small:
8 bytes of header length, a JSON header with dtype, shape and place of each tensor, then the data without gaps.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.file_ranges import RangedFile, bytes_of
from ecdit_ds.checkpoint.finite import count_nonfinite
from ecdit_ds.errors import CheckpointError
from ecdit_ds.files.durable import open_new, write_all

READ_BYTES = 2**20
_HEADER_LIMIT_BYTES = 100_000_000  # what safetensors itself accepts
_WRITE_OUT_BYTES = 64 * 2**20
"""After each, the disk is told to begin, so that it works while the next are read and little is left for the end."""
_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(RangedFile):
    """A safetensors file to read from, by any number of threads.

    Raises:
        CheckpointError: it cannot be read, or is no such file: the header is checked before any of it is believed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._open() as file:
            status = os.fstat(file.fileno())
            self.size_bytes, self.modified_ns = status.st_size, status.st_mtime_ns
            try:
                self._read_header(file)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{path}: is not a whole safetensors file: {error}") from None

    def xxh3(self, key: str) -> str:
        """Return the checksum of a tensor's bytes, read a chunk at a time."""
        entry = self.entries[key]
        with self._open() as file:
            return self._xxh3(file, entry.begin, entry.nbytes)

    def xxh3_and_nonfinite(self, key: str) -> tuple[str, int]:
        """Return the checksum of a tensor's bytes, and how many of its numbers are not finite; one reading."""
        entry, digest, nonfinite = self.entries[key], xxhash.xxh3_64(), 0
        with self._open() as file:
            for part in self._chunks(file, entry.begin, entry.nbytes):
                digest.update(part)
                nonfinite += count_nonfinite(torch.frombuffer(part, dtype=entry.dtype))
        return digest.hexdigest(), nonfinite

    def read_into(self, key: str, out: Tensor) -> str:
        """Fill a contiguous tensor of the same dtype and size on the host; return the checksum of the bytes."""
        entry, digest = self.entries[key], xxhash.xxh3_64()
        into = bytes_of(out)
        with self._open() as file:
            for start in range(0, len(into), READ_BYTES):
                part = into[start : start + READ_BYTES]
                self._read_exactly(file, part, entry.begin + start)
                digest.update(part)  # from the cache, where reading left it
        return digest.hexdigest()

    def read(self, key: str, box: Box) -> Tensor:
        """Return a box of a tensor."""
        entry = self.entries[key]
        out = torch.empty(box.shape, dtype=entry.dtype)
        if box.numel:
            with self._open() as file:
                self._read_box(file, entry.begin, entry.shape, box, out)
        return out

    def _read_header(self, file: FileIO) -> None:
        size_bytes = self.size_bytes
        prefix = bytearray(min(8, size_bytes))
        self._read_exactly(file, memoryview(prefix), 0)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 0 < header_bytes <= min(_HEADER_LIMIT_BYTES, size_bytes - 8):
            raise ValueError(f"{size_bytes} bytes do not hold the header it announces")
        text = bytearray(header_bytes)
        self._read_exactly(file, memoryview(text), 8)
        self.header_xxh3 = xxhash.xxh3_64_hexdigest(prefix + text)
        header = json.loads(text.decode("utf-8"))
        header.pop("__metadata__", None)
        self.entries = {key: _entry(key, value, 8 + header_bytes) for key, value in header.items()}
        end = 8 + header_bytes
        for key, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
            if entry.begin != end:
                raise ValueError(f"tensor {key} begins at byte {entry.begin}, not at {end}")
            end += entry.nbytes
        if end != size_bytes:
            raise ValueError(f"it has {size_bytes} bytes, its tensors end at {end}")


def check_shape(name: str, shape: Sequence[Any]) -> None:
    """Refuse a shape that no tensor can have, such as one with more elements than can be counted.

    Raises:
        ValueError: naming the tensor.
    """
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(max(1, size) for size in shape) >= 2**63:
        raise ValueError(f"tensor {name} has shape {list(shape)}")


def _entry(key: str, value: dict[str, Any], data_start: int) -> TensorEntry:
    shape, (begin, end) = value["shape"], value["data_offsets"]
    if not isinstance(shape, list):
        raise TypeError(f"tensor {key} has shape {shape!r}")
    check_shape(key, shape)
    if type(begin) is not int or type(end) is not int or begin < 0:
        raise ValueError(f"tensor {key} lies at bytes {begin!r} to {end!r}")
    entry = TensorEntry(dtype=_CODES[value["dtype"]], shape=tuple(shape), begin=data_start + begin)
    if end - begin != entry.nbytes:
        raise ValueError(f"tensor {key} has {end - begin} bytes, its shape needs {entry.nbytes}")
    return entry


class TensorFileWriter:
    """Writes a safetensors file front to back.

    Args:
        path: what was there is unlinked.
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
        self._file, self._begun = open_new(path), 0
        write_all(self._file, self._head)

    @property
    def header_xxh3(self) -> str:
        return xxhash.xxh3_64_hexdigest(self._head)

    def append(self, data: Tensor) -> memoryview:
        """Write the next tensor's, or part of a tensor's, values; return their bytes."""
        values = bytes_of(data.contiguous())
        write_all(self._file, values)
        self._left -= len(values)
        position = self._file.tell()
        if position - self._begun >= _WRITE_OUT_BYTES:
            # The pages are not written yet, so Linux keeps them, and starts to write them.
            os.posix_fadvise(self._file.fileno(), self._begun, position - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = position
        return values

    def close(self) -> int:
        """Put the file on the disk and return its size in bytes."""
        assert self._left == 0, f"{self._left} bytes are missing"
        os.fsync(self._file.fileno())
        size_bytes = self._file.tell()
        self._file.close()
        return size_bytes
