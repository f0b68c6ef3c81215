"""One mapped Arrow shard: rows are found by arithmetic, and a tensor row is copied once, from the map to its batch."""

import errno
import os
from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from ecdit_ds.data.latents.index import TENSOR_COLUMNS, TEXT_COLUMNS
from ecdit_ds.errors import DataError, escape_unprintable

_SCARCE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""What the machine ran out of, and no fault of a file."""


@dataclass(frozen=True, kw_only=True)
class RecordBatchView:
    """Successive rows of a shard, one record batch, where they are in the map."""

    tensors: tuple[memoryview, ...]
    """The rows of each tensor column, one after the other; columns in the order of `row_bytes`."""
    columns: pa.RecordBatch
    _texts: dict[str, tuple[memoryview, memoryview]] = field(default_factory=dict)

    def text(self, column: str, row: int) -> str:
        """Return a row of a column of strings."""
        if column not in self._texts:
            self._texts[column] = _bytes_of(self.columns.column(column))
        characters, offsets = self._texts[column]
        return str(characters[offsets[row] : offsets[row + 1]], "utf-8")


class LruIndex:
    """Numbers in the order of their last use, at most so many; any thread may use it. Travels empty."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._numbers: dict[int, None] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["LruIndex"], tuple[int]]:
        return LruIndex, (self._most,)

    def use(self, numbers: Iterable[int]) -> list[int]:
        """Note that some numbers are used, and return those to let go of."""
        with self._lock:
            for number in numbers:
                self._numbers.pop(number, None)
                self._numbers[number] = None
            gone = list(islice(self._numbers, max(0, len(self._numbers) - self._most)))
            for number in gone:
                del self._numbers[number]
        return gone


@dataclass
class Shard:
    """A shard of a set, mapped when it is read and not mapped yet; only its path travels to another process."""

    path: Path
    count: int
    row_bytes: dict[str, int]
    """Bytes a row of each tensor column."""
    _mapped: tuple[list[int], list[RecordBatchView]] | None = None
    """The first row of each batch, and the batches."""

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "count": self.count, "row_bytes": self.row_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def find(self, row: int) -> tuple[RecordBatchView, int]:
        """Return the rows among which a row of the shard is, and which of them it is.

        Raises:
            DataError: the file is no shard of `count` rows of these sizes, or cannot be mapped.
        """
        mapped = self._mapped  # one look, since another thread may close it
        if mapped is None:
            self._mapped = mapped = self._open()
        starts, batches = mapped
        number = bisect_right(starts, row) - 1
        return batches[number], row - starts[number]

    def close(self) -> None:
        """Let go of the map."""
        self._mapped = None

    def _open(self) -> tuple[list[int], list[RecordBatchView]]:
        try:
            with pa.ipc.open_stream(pa.memory_map(str(self.path))) as reader:
                _check_columns(reader.schema, self.row_bytes)
                found = [batch for batch in reader if len(batch)]
            for batch in found:  # of the others, `_block` sees that they are in the map
                texts = batch.select(TEXT_COLUMNS)
                texts.validate(full=True)
                if any(column.null_count for column in texts.columns):
                    raise ValueError("it has rows without a text")
            batches = [
                RecordBatchView(
                    tensors=tuple(_block(batch, name, size) for name, size in self.row_bytes.items()), columns=batch
                )
                for batch in found
            ]
            ends = np.cumsum([len(batch) for batch in found]).tolist()
            if not ends or ends[-1] != self.count:
                raise ValueError(f"{ends[-1] if ends else 0} rows, but its index says {self.count}")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            # Of a failed map, pyarrow tells the number in words alone.
            if isinstance(error, OSError) and (error.errno in _SCARCE or os.strerror(errno.ENOMEM) in str(error)):
                raise DataError(
                    f"{self.path}: cannot be mapped now ({error}); nothing is known to be wrong with the set: raise "
                    "vm.max_map_count or the limit of open files, or free memory, and give the same command"
                ) from None
            raise DataError(f"{self.path}: is no shard of this set ({error}); encode the set anew") from None
        return [0, *ends[:-1]], batches


def _check_columns(schema: pa.Schema, tensors: Collection[str]) -> None:
    """Refuse columns of other types, of which other bytes would be taken for texts and numbers; raise ValueError."""
    for name in schema.names:
        wanted = pa.string() if name in TEXT_COLUMNS else pa.binary() if name in TENSOR_COLUMNS else None
        if schema.field(name).type != wanted:
            raise ValueError(f"column {escape_unprintable(name)} is {schema.field(name).type}, not {wanted or 'known'}")
    if lacking := [name for name in (*TEXT_COLUMNS, *tensors) if schema.names.count(name) != 1]:
        raise ValueError(f"it does not have one column {lacking[0]}")


def _block(batch: pa.RecordBatch, name: str, row_bytes: int) -> memoryview:
    """Return a tensor column within the map: its rows have one size, so it is one block of bytes."""
    column = batch.column(name)
    rows, offsets = _bytes_of(column)
    if (
        column.null_count
        or (np.diff(np.asarray(offsets)) != row_bytes).any()
        or offsets[0] < 0
        or offsets[-1] > len(rows)
    ):
        raise ValueError(f"rows of {name} do not all have {row_bytes} bytes")
    return rows[offsets[0] : offsets[-1]]


def _bytes_of(column: pa.Array) -> tuple[memoryview, memoryview]:
    """Return the bytes of a column of strings or bytes, and int32: where each row begins, and the last one ends."""
    _, offset_buffer, byte_buffer = column.buffers()
    # An Arrow buffer's own view has signed bytes, which a copy into unsigned ones refuses.
    offsets = memoryview(offset_buffer).cast("B").cast("i")[column.offset : column.offset + len(column) + 1]
    return memoryview(byte_buffer or b"").cast("B"), offsets
