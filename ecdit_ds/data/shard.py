"""One mapped Arrow shard: rows are found by arithmetic, and a tensor row is copied once, from the map to its batch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ecdit_ds.errors import DataError


@dataclass
class Shard:
    """A shard of a set, mapped when it is first read; only its path travels to another process."""

    path: Path
    count: int
    row_bytes: dict[str, int]
    """Bytes a row of each tensor column."""
    _batches: list[pa.RecordBatch] = field(default_factory=list)
    _starts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    """The first row of each batch, and the number of rows."""
    _blocks: dict[str, list[npt.NDArray[np.uint8]]] = field(default_factory=dict)
    """Of each tensor column, for each batch, (rows, bytes) within the map."""

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "count": self.count, "row_bytes": self.row_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def copy_rows(self, column: str, rows: npt.NDArray[np.int64], into: npt.NDArray[np.uint8], places: Any) -> None:
        """Copy rows of a tensor column to `into[places]`, (B, bytes a row) in memory of its own.

        Raises:
            DataError: the file is no shard of `count` rows of these sizes.
        """
        self._open()
        blocks = self._blocks[column]
        for batch, row, place in zip(*self._find(rows), places, strict=True):
            into[place] = blocks[batch][row]

    def texts(self, column: str, rows: npt.NDArray[np.int64]) -> list[str]:
        """Return rows of a column of strings."""
        self._open()
        return [self._batches[b].column(column)[int(row)].as_py() for b, row in zip(*self._find(rows), strict=True)]

    def _find(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        return batches, rows - self._starts[batches]

    def _open(self) -> None:
        if self._batches:
            return
        try:
            with pa.ipc.open_stream(pa.memory_map(str(self.path))) as reader:
                batches = [batch for batch in reader if len(batch)]
            blocks = {
                name: [_block(batch, name, size) for batch in batches] for name, size in self.row_bytes.items()
            }  # fmt: skip
            lengths = [len(batch) for batch in batches]
            if sum(lengths) != self.count:
                raise ValueError(f"{sum(lengths)} rows, but its index says {self.count}")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: is no shard of this set ({error}); encode the set anew") from None
        self._blocks = blocks
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._batches = batches


def _block(batch: pa.RecordBatch, name: str, row_bytes: int) -> npt.NDArray[np.uint8]:
    """Return a tensor column as (rows, bytes) within the map: its rows have one size, so it is one block of bytes."""
    column = batch.column(name)
    _, offset_buffer, byte_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    if column.null_count or (np.diff(offsets) != row_bytes).any() or offsets[0] < 0 or offsets[-1] > byte_buffer.size:
        raise ValueError(f"rows of {name} do not all have {row_bytes} bytes")
    return np.frombuffer(byte_buffer, dtype=np.uint8)[offsets[0] : offsets[-1]].reshape(len(column), row_bytes)
