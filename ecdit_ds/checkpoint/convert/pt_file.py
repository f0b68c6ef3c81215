"""PyTorch's `.pt` files: read without running what is in them and without holding it; written and put on the disk.

A `.pt` file is a zip without compression. A pickle in it names tensors, and each storage is a record of plain bytes
under a CRC32. A pickle is a program; PyTorch runs it here as `weights_only`, which builds tensors and containers and
refuses everything else, and on the `meta` device, which makes tensors without data. Bytes are then read by position.
This is the one module that may call `torch.load` and `torch.save`.
"""

import io
import math
import os
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.file_ranges import RangedFile, reading
from ecdit_ds.errors import CheckpointError
from ecdit_ds.files.durable import open_new, write_all

_LOCAL_HEADER_BYTES = 30
_GROWING = ("builtins bytearray", "__builtin__ bytearray", "_codecs encode")
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True, kw_only=True)
class PtTensor:
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


class Placeholder:
    """Takes the place of an object that is known, and of no use here."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class TorchFile(RangedFile):
    """A `.pt` file: its content, with a `PtTensor` in place of each tensor, and any range of their data.

    Args:
        path: of a file that `torch.save` wrote.
        stand_ins: `package.module.Class` -> what to make in its place, for the few classes that are expected.

    Raises:
        CheckpointError: damage, or content that is more than tensors, numbers, text and containers of them.
    """

    def __init__(self, path: Path, stand_ins: Mapping[str, type] | None = None) -> None:
        super().__init__(path)
        self._stand_ins = dict(stand_ins or {})
        self._verified: set[str] = set()
        with self._open() as file, reading(path):
            status = os.fstat(file.fileno())
            self.size_bytes, self._modified_ns = status.st_size, status.st_mtime_ns
            self._records = self._read_directory(file)
            for name in self._records:
                if "/data/" not in name:  # the pickle, and facts about the format: all small
                    self._verify(file, name)
            self._check_byte_order(file)
        self._record_at = {begin: name for name, (_, begin) in self._records.items() if "/data/" in name}
        self.content = self._described(self._load(), "", {})

    @property
    def identity(self) -> str:
        """Return what tells this content from another's."""
        crc = zlib.crc32(repr([(name, info.CRC) for name, (info, _) in self._records.items()]).encode())
        return f"{self.path.name} {self.size_bytes} {self._modified_ns} {crc:08x}"

    def read(self, tensor: PtTensor, box: Box, *, start: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a box of a tensor; all of its storage was compared with its checksum before.

        Args:
            box: in a tensor of `shape` whose elements are those from element `start` on; by default the tensor itself.
        """
        shape = tensor.shape if shape is None else shape
        if not tensor.is_contiguous or start + math.prod(shape) > tensor.numel:
            raise CheckpointError(f"{self.path}: a tensor of shape {list(tensor.shape)} is not stored in one piece")
        out = torch.empty(box.shape, dtype=tensor.dtype)
        if box.numel:
            with self._open() as file:
                self._verify_once(file, tensor)
                self._read_box(file, tensor.begin + start * out.itemsize, shape, box, out)
        return out

    def xxh3(self, tensor: PtTensor) -> str:
        """Return the checksum of a contiguous tensor's bytes, read a chunk at a time."""
        with self._open() as file:
            self._verify_once(file, tensor)
            return self._xxh3(file, tensor.begin, tensor.numel * tensor.dtype.itemsize)

    def whole_number(self, value: Any) -> int:
        """Return a whole number of the content, which may be kept as a tensor of one element.

        Raises:
            CheckpointError: it is none.
        """
        if isinstance(value, PtTensor) and value.numel == 1:
            value = self.read(value, Box((0,) * len(value.shape), value.shape)).item()
        if not isinstance(value, int | float) or not 0 <= value < 2**63:
            raise CheckpointError(f"{self.path}: does not say how many steps were taken; use another checkpoint")
        return int(value)

    def _verify_once(self, file: FileIO, tensor: PtTensor) -> None:
        if tensor.numel and tensor.record not in self._verified:
            self._verify(file, tensor.record)

    def _read_directory(self, file: FileIO) -> dict[str, tuple[zipfile.ZipInfo, int]]:
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
            if header[:4] != b"PK\x03\x04" or begin + info.file_size > self.size_bytes:
                raise self._damaged(f"record {info.filename!r} is not where the directory says")
            records[info.filename] = info, begin
        if sum(info.file_size for info, _ in records.values()) > self.size_bytes:
            raise self._damaged("its records overlap")
        return records

    def _check_byte_order(self, file: FileIO) -> None:
        for name, (info, begin) in self._records.items():
            if name.endswith("/byteorder") and info.file_size < 16:
                order = bytearray(info.file_size)
                self._read_exactly(file, memoryview(order), begin)
                if order != b"little":
                    raise CheckpointError(f"{self.path}: its byte order is {bytes(order)!r}; only little is read here")

    def _verify(self, file: FileIO, name: str) -> None:
        """Compare a record with its checksum; PyTorch writes zero where it was told to compute none."""
        info, begin = self._records[name]
        actual = 0
        for part in self._chunks(file, begin, info.file_size if info.CRC else 0):
            actual = zlib.crc32(part, actual)
        if actual != info.CRC:
            raise self._damaged(f"record {name!r} has CRC32 {actual:08x}, recorded {info.CRC:08x}")
        self._verified.add(name)

    def _load(self) -> Any:
        """Return the content with tensors that have no data."""
        self._refuse_buffers()
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

    def _refuse_buffers(self) -> None:
        """Refuse calls that `weights_only` allows a pickle, and whose memory no byte of it pays for.

        Of `bytearray(N)` that is N, and `_codecs.encode` may double what it is given, again and again.
        """
        for name, (info, begin) in self._records.items():
            if not name.endswith(".pkl"):
                continue
            program = bytearray(info.file_size)
            with self._open() as file:
                self._read_exactly(file, memoryview(program), begin)
            with suppress(ValueError):  # damaged, which PyTorch tells
                for _, argument, _ in pickletools.genops(bytes(program)):
                    if isinstance(argument, str) and argument in _GROWING:
                        raise CheckpointError(
                            f"{self.path}: asks for {argument.split()[-1]}, which is neither tensor, number, text nor "
                            "container; nothing of it was run, use a file that holds data only"
                        )

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
        if isinstance(value, torch.dtype | Placeholder) or type(value) in self._stand_ins.values():
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

    def _stored(self, tensor: Tensor, where: str) -> PtTensor:
        fault = f"tensor {where.lstrip('.') or 'it'}"
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "meta":
            raise CheckpointError(f"{self.path}: {fault} is not a plain dense one; use a file that holds such only")
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if begin not in self._record_at:
            raise self._damaged(f"{fault} lies in no record")
        record, size, is_contiguous = self._record_at[begin], tensor.dtype.itemsize, tensor.is_contiguous()
        if is_contiguous and (tensor.storage_offset() + tensor.numel()) * size > self._records[record][0].file_size:
            raise self._damaged(f"{fault} of shape {list(tensor.shape)} reaches beyond its record")
        return PtTensor(
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            record=record,
            begin=begin + tensor.storage_offset() * size,
            is_contiguous=is_contiguous,
        )

    def _damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {fault}: damaged, or not a checkpoint; use another")


def write_torch_file(path: Path, content: Any) -> int:
    """Write a new `.pt` file, put it on the disk and return its size; after a crash it may be there in part.

    Raises:
        OSError: it cannot be written.
    """
    with open_new(path) as file:
        sink = _Sink(file)
        try:
            torch.save(content, sink)  # type: ignore[arg-type]
        except Exception as error:  # PyTorch passes a full disk on as text only
            raise sink.refusal or error from None
        os.fsync(file.fileno())
        return file.tell()


def torch_bytes(content: Any) -> bytes:
    """Return a small `.pt` file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class _Sink:
    """Takes what PyTorch writes, all of it, and keeps what the system said if it could not."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.refusal: OSError | None = None

    def write(self, content: Any) -> int:
        """Write all of some bytes."""
        view = memoryview(content).cast("B")
        try:
            write_all(self._file, view)
        except OSError as error:
            self.refusal = error
            raise
        return len(view)

    def flush(self) -> None:
        """Do nothing: nothing is held back."""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
