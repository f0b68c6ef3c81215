"""One mapped Arrow shard: rows are found by arithmetic, and a tensor row is copied once, from the map to its batch."""

from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ecdit_ds.errors import DataError


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One record batch of a shard, within the map."""

    tensors: tuple[tuple[memoryview, int], ...]
    """Of each tensor column: its rows one after the other, and the bytes of a row."""
    texts: dict[str, tuple[memoryview, npt.NDArray[np.int32]]]
    """Of each column of strings that was asked for: UTF-8, and where each row begins, and the last one ends."""
    columns: pa.RecordBatch


@dataclass
class Shard:
    """A shard of a set, mapped when it is first read; only its path travels to another process."""

    path: Path
    count: int
    row_bytes: dict[str, int]
    """Bytes a row of each tensor column."""
    _batches: list[_Batch] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    """The first row of each batch."""

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "count": self.count, "row_bytes": self.row_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def row(self, row: int) -> list[memoryview]:
        """Return the bytes of each tensor column of a row, in the order of `row_bytes`, where they are in the map.

        Numbers and slices of Python's own: beside copying some kB, arrays of one row would take most of the time.

        Raises:
            DataError: the file is no shard of `count` rows of these sizes.
        """
        batch, i = self._find(row)
        return [rows[i * size : (i + 1) * size] for rows, size in batch.tensors]

    def text(self, column: str, row: int) -> str:
        """Return a row of a column of strings."""
        batch, i = self._find(row)
        if column not in batch.texts:
            batch.texts[column] = _texts(batch.columns.column(column))
        characters, offsets = batch.texts[column]
        return str(characters[offsets[i] : offsets[i + 1]], "utf-8")

    def _find(self, row: int) -> tuple[_Batch, int]:
        if not self._batches:
            self._open()
        number = bisect_right(self._starts, row) - 1
        return self._batches[number], row - self._starts[number]

    def _open(self) -> None:
        try:
            with pa.ipc.open_stream(pa.memory_map(str(self.path))) as reader:
                found = [batch for batch in reader if len(batch)]
            batches = [
                _Batch(
                    tensors=tuple((_block(batch, name, size), size) for name, size in self.row_bytes.items()),
                    texts={}, columns=batch,
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
    rows, offsets = _texts(column)
    if column.null_count or (np.diff(offsets) != row_bytes).any() or offsets[0] < 0 or offsets[-1] > len(rows):
        raise ValueError(f"rows of {name} do not all have {row_bytes} bytes")
    return rows[offsets[0] : offsets[-1]]


def _texts(column: pa.Array) -> tuple[memoryview, npt.NDArray[np.int32]]:
    """Return the bytes of a column of strings or bytes, and where each row begins, and the last one ends."""
    _, offset_buffer, byte_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    # An Arrow buffer's own view has signed bytes, which a copy into unsigned ones refuses.
    return memoryview(byte_buffer or b"").cast("B"), offsets
