"""PyTorch's `.pt` files: read without running what is in them and without holding it; written and put on the disk.

A `.pt` file is a zip without compression. A pickle in it names tensors, and each storage is a record of plain bytes
under a CRC32. A pickle is a program; PyTorch runs it here as `weights_only`, which builds tensors and containers and
refuses everything else, and on the `meta` device, which makes tensors without data. Bytes are then read by position.
This is the one module that may call `torch.load` and `torch.save`.
"""

import errno
import math
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.durable import put_on_disk
from ecdit_ds.errors import CheckpointError

_CHUNK_BYTES = 16 * 2**20
_LOCAL_HEADER_BYTES = 30
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a file, without its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    record: str
    """Name of the zip's record with its storage."""
    begin: int
    """Its first byte, counted from the start of the file."""
    is_contiguous: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Skipped:
    """Takes the place of an object that is known, and of no use here."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class TorchFile:
    """A `.pt` file: its content, with a StoredTensor in place of each tensor, and any range of their data.

    Args:
        path: of a file that `torch.save` wrote.
        stand_ins: `package.module.Class` -> what to make in its place, for the few classes that are expected.

    Raises:
        CheckpointError: damage, or content that is more than tensors, numbers, text and containers of them.
    """

    def __init__(self, path: Path, stand_ins: Mapping[str, type] | None = None) -> None:
        self.path, self._stand_ins = path, dict(stand_ins or {})
        self._verified: set[str] = set()
        try:
            self._size_bytes = path.stat().st_size
            with path.open("rb", buffering=0) as file:
                self._records = self._read_directory(file)
                for name in self._records:
                    if "/data/" not in name:  # the pickle, and facts about the format: all small
                        self._verify(file, name)
                self._check_byte_order(file)
            self._record_at = {begin: name for name, (_, begin) in self._records.items() if "/data/" in name}
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        self.content = self._described(self._load(), "", {})

    @property
    def identity(self) -> str:
        """Return what tells this content from another's."""
        crc = zlib.crc32(repr([(name, info.CRC) for name, (info, _) in self._records.items()]).encode())
        return f"{self.path.name} {self._size_bytes} {self.path.stat().st_mtime_ns} {crc:08x}"

    def read(self, tensor: StoredTensor, box: Box, *, start: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a box of a tensor; all of its storage was compared with its checksum before.

        Args:
            box: in a tensor of `shape` whose elements are those from element `start` on; by default the tensor itself.
        """
        shape = tensor.shape if shape is None else shape
        if not tensor.is_contiguous or start + math.prod(shape) > tensor.numel:
            raise CheckpointError(f"{self.path}: a tensor of shape {list(tensor.shape)} is not stored in one piece")
        row_numel = math.prod(shape[1:])
        first, rows = (box.offset[0], box.shape[0]) if shape else (0, 1)
        flat = self._read_flat(tensor, start + first * row_numel, rows * row_numel)
        if not shape:
            return flat.view(())
        return flat.view(rows, *shape[1:])[box.within((first, *[0] * (len(shape) - 1)))]

    def chunks(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Yield a contiguous tensor's bytes in order, verified; each part is valid until the next is asked for."""
        size = tensor.dtype.itemsize
        for start in range(0, tensor.numel, _CHUNK_BYTES // size):
            part = self._read_flat(tensor, start, min(_CHUNK_BYTES // size, tensor.numel - start))
            yield part.view(torch.uint8).numpy().data

    def _read_flat(self, tensor: StoredTensor, start: int, numel: int) -> Tensor:
        out = torch.empty(numel, dtype=tensor.dtype)
        if not numel:
            return out
        try:
            with self.path.open("rb", buffering=0) as file:
                if tensor.record not in self._verified:
                    self._verify(file, tensor.record)
                begin = tensor.begin + start * tensor.dtype.itemsize
                self._read_exactly(file, out.view(torch.uint8).numpy().data, begin)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        return out

    def _read_directory(self, file: Any) -> dict[str, tuple[zipfile.ZipInfo, int]]:
        """Return each record with the place of its first byte."""
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, EOFError) as error:
            raise self._damaged(f"is not a whole .pt file of a PyTorch from 1.6 on ({_one_line(error)})") from None
        records: dict[str, tuple[zipfile.ZipInfo, int]] = {}
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.filename in records:
                raise self._damaged(f"record {info.filename!r} is packed, locked or there twice; no .pt file has that")
            header = bytearray(_LOCAL_HEADER_BYTES)
            self._read_exactly(file, memoryview(header), info.header_offset)
            name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            begin = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
            if header[:4] != b"PK\x03\x04" or begin + info.file_size > self._size_bytes:
                raise self._damaged(f"record {info.filename!r} is not where the directory says")
            records[info.filename] = info, begin
        if sum(info.file_size for info, _ in records.values()) > self._size_bytes:
            raise self._damaged("its records overlap")
        return records

    def _check_byte_order(self, file: Any) -> None:
        for name, (info, begin) in self._records.items():
            if name.endswith("/byteorder") and info.file_size < 16:
                order = bytearray(info.file_size)
                self._read_exactly(file, memoryview(order), begin)
                if order != b"little":
                    raise CheckpointError(f"{self.path}: its byte order is {bytes(order)!r}; only little is read here")

    def _verify(self, file: Any, name: str) -> None:
        """Compare a record with its checksum; PyTorch writes zero where it was told to compute none."""
        info, begin = self._records[name]
        actual, buffer = 0, bytearray(min(_CHUNK_BYTES, info.file_size))
        for at in range(0, info.file_size if info.CRC else 0, _CHUNK_BYTES):
            part = memoryview(buffer)[: min(_CHUNK_BYTES, info.file_size - at)]
            self._read_exactly(file, part, begin + at)
            actual = zlib.crc32(part, actual)
        if actual != info.CRC:
            raise self._damaged(f"record {name!r} has CRC32 {actual:08x}, recorded {info.CRC:08x}")
        self._verified.add(name)

    def _read_exactly(self, file: Any, into: memoryview, position: int) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(file.fileno(), [into[done:]], position + done)
            if count == 0:
                raise self._damaged(f"ends early, at byte {position + done}")
            done += count

    def _load(self) -> Any:
        """Return the content with tensors that have no data."""
        stand_ins: list[Any] = [(stand_in, name) for name, stand_in in self._stand_ins.items()]
        try:
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of another pickle protocol, which is read or refused all the same
                return torch.load(self.path, map_location="meta", weights_only=True)
        except Exception as error:  # a made-up pickle can make PyTorch stumble over anything
            asked = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
            if asked:
                raise CheckpointError(
                    f"{self.path}: asks for {asked[1]}, which is neither tensor, number, text nor container; nothing "
                    "of it was run, use a file that holds data only"
                ) from None
            raise self._damaged(f"PyTorch cannot read it as plain data ({_one_line(error)})") from None

    def _described(self, value: Any, where: str, seen: dict[int, Any]) -> Any:
        """Return plain content; what is shared is looked at once, so that a small file cannot ask for endless work."""
        if type(value) in _PLAIN:
            return value
        if id(value) not in seen:
            seen[id(value)] = None  # what holds itself ends here
            try:
                seen[id(value)] = self._describe(value, where, seen)
            except RecursionError:
                raise CheckpointError(f"{self.path}: its content is nested too deeply for a checkpoint") from None
        return seen[id(value)]

    def _describe(self, value: Any, where: str, seen: dict[int, Any]) -> Any:
        if isinstance(value, Tensor):
            return self._stored(value, where)
        if isinstance(value, torch.dtype | Skipped) or type(value) in self._stand_ins.values():
            return value
        if isinstance(value, dict):
            keys = {key: self._described(key, where, seen) for key in value}
            return {keys[key]: self._described(item, f"{where}.{str(key)[:80]}", seen) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            items = [self._described(item, f"{where}[{index}]", seen) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        raise CheckpointError(
            f"{self.path}: {where.lstrip('.') or 'it'} is a {type(value).__name__}, neither tensor, number, text nor "
            "container; use a file that holds data only"
        )

    def _stored(self, tensor: Tensor, where: str) -> StoredTensor:
        fault = f"tensor {where.lstrip('.') or 'it'}"
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "meta":
            raise CheckpointError(f"{self.path}: {fault} is not a plain dense one; use a file that holds such only")
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if begin not in self._record_at:
            raise self._damaged(f"{fault} lies in no record")
        record, size, is_contiguous = self._record_at[begin], tensor.dtype.itemsize, tensor.is_contiguous()
        if is_contiguous and (tensor.storage_offset() + tensor.numel()) * size > self._records[record][0].file_size:
            raise self._damaged(f"{fault} of shape {list(tensor.shape)} reaches beyond its record")
        return StoredTensor(
            dtype=tensor.dtype, shape=tuple(tensor.shape), record=record,
            begin=begin + tensor.storage_offset() * size, is_contiguous=is_contiguous,
        )  # fmt: skip

    def _damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {fault}: damaged, or not a checkpoint; use another")


def write_torch_file(path: Path, content: Any) -> None:
    """Write a `.pt` file and put it on the disk; after a crash it may be there in part.

    Raises:
        OSError: it cannot be written.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:  # PyTorch passes a full disk on as text only
        raise OSError(errno.EIO, _one_line(error), str(path)) from None
    put_on_disk(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
