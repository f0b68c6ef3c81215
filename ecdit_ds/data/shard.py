"""One mapped Arrow shard: rows are found by arithmetic, and a tensor row is copied once, from the map to its batch."""

from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ecdit_ds.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Successive rows of a shard, one record batch, where they are in the map."""

    tensors: tuple[memoryview, ...]
    """Of each tensor column, in the order of `row_bytes`, its rows one after the other."""
    columns: pa.RecordBatch
    _texts: dict[str, tuple[memoryview, memoryview]] = field(default_factory=dict)

    def text(self, column: str, row: int) -> str:
        """Return a row of a column of strings."""
        if column not in self._texts:
            self._texts[column] = _bytes_of(self.columns.column(column))
        characters, offsets = self._texts[column]
        return str(characters[offsets[row] : offsets[row + 1]], "utf-8")


@dataclass
class Shard:
    """A shard of a set, mapped when it is first read; only its path travels to another process."""

    path: Path
    count: int
    row_bytes: dict[str, int]
    """Bytes a row of each tensor column."""
    _batches: list[Rows] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    """The first row of each batch."""

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "count": self.count, "row_bytes": self.row_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def find(self, row: int) -> tuple[Rows, int]:
        """Return the rows among which a row of the shard is, and which of them it is.

        Raises:
            DataError: the file is no shard of `count` rows of these sizes.
        """
        if not self._batches:
            self._open()
        number = bisect_right(self._starts, row) - 1
        return self._batches[number], row - self._starts[number]

    def _open(self) -> None:
        try:
            with pa.ipc.open_stream(pa.memory_map(str(self.path))) as reader:
                found = [batch for batch in reader if len(batch)]
            batches = [
                Rows(
                    tensors=tuple(_block(batch, name, size) for name, size in self.row_bytes.items()), columns=batch
                )
                for batch in found
            ]  # fmt: skip
            ends = np.cumsum([len(batch) for batch in found]).tolist()
            if not ends or ends[-1] != self.count:
                raise ValueError(f"{ends[-1] if ends else 0} rows, but its index says {self.count}")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: is no shard of this set ({error}); encode the set anew") from None
        self._starts = [0, *ends[:-1]]
        self._batches = batches


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
