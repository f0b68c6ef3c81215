"""Rows of JSON that several processes work out, each once, whoever is killed on the way.

    NAME.jsonl           all rows, by index, once somebody merged them
    NAME.rank_R.jsonl    rows of process R since then

A row is there when its line ends; what was being written when a process was killed is worked out again.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit_ds.errors import DataError, EcditError
from ecdit_ds.files.durable import make_folders, own_file, plain_file, replace_durably
from ecdit_ds.inference.ranks import DistributedContext

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ResultTable:
    """A table on disk; every row has its `index`."""

    path: Path
    """NAME.jsonl."""
    is_whole: Callable[[Row], bool] = lambda _row: True
    """Says of a row whether all is there that its reader will want."""

    def rows(self) -> dict[int, Row]:
        """Return all rows by index.

        Raises:
            DataError: a line is no row, or a file cannot be read.
        """
        found = {}
        for path in (self.path, *self._parts()):
            for row in self._read(path):
                found[row["index"]] = row
        return {index: found[index] for index in sorted(found)}

    def append(self, rank: int, rows: Iterable[Row]) -> None:
        """Add rows that process `rank` worked out; raise DataError where they cannot be written."""
        path = self.path.with_suffix(f".rank_{rank}.jsonl")
        lines = _lines_of(rows)
        if not lines:
            return
        try:
            make_folders(path.parent)
            with open(path, "ab", opener=own_file) as file:
                file.write(lines)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None

    def merge(self) -> dict[int, Row]:
        """Put the rows of all processes into one file, in order, and return them; one process at a time."""
        rows, parts = self.rows(), self._parts()
        if parts:
            try:
                replace_durably(self.path, _lines_of(rows.values()))
                for path in parts:
                    path.unlink()
            except OSError as error:
                raise DataError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        return rows

    def clear(self) -> None:
        """Remove all rows."""
        for path in (self.path, *self._parts()):
            path.unlink(missing_ok=True)

    def is_there(self) -> bool:
        """Return whether somebody has written to it."""
        return self.path.exists() or bool(self._parts())

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.rank_*.jsonl"))

    def _read(self, path: Path) -> list[Row]:
        """Return the rows of one file; what stands behind the last end of a line was cut off by a kill."""
        if not path.exists():
            return []
        try:
            text = plain_file(path).read_bytes().rpartition(b"\n")[0].decode()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        rows = []
        for number, line in enumerate(text.split("\n") if text else [], 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {number}: is not JSON: {error}") from None
            if not isinstance(row, dict) or type(row.get("index")) is not int or row["index"] < 0:
                raise DataError(f"{path} line {number}: has no index, a whole number from 0 on")
            if not self.is_whole(row):
                raise DataError(f"{path} line {number}: is none of the rows that belong here; delete the line")
            rows.append(row)
        return rows


def map_resumable(
    ledger: ResultTable,
    count: int,
    work: Callable[[Sequence[int]], Iterable[Row]],
    crew: DistributedContext,
    *,
    batch_size: int,
    advance: Callable[[int], object] = lambda _count: None,
) -> dict[int, Row]:
    """Work out the rows 0 to `count` that the ledger lacks, shared over processes; return all. Each process calls this.

    Args:
        ledger: may hold some already.
        count: of rows.
        work: returns the rows of some indices; needs no other process.
        crew: the processes.
        batch_size: indices at a time.
        advance: told of this process's rows, those that were there first.

    Raises:
        EcditError: of any process's `work`, on all; whole batches that are worked out stay.
    """
    done = crew.world.on_rank0(ledger.merge)
    missing = [index for index in range(count) if index not in done]
    own = missing[crew.dp.index :: crew.dp.count] if crew.is_tp_leader else []
    advance(count - len(missing))
    faults: list[EcditError] = []
    try:
        for start in range(0, len(own), batch_size):
            indices = own[start : start + batch_size]
            ledger.append(crew.world.rank, work(indices))
            advance(len(indices))
    except EcditError as fault:  # the others still have work to do, and rows to keep
        faults.append(fault)

    def raise_own() -> None:
        if faults:
            raise faults[0]

    crew.world.run_on_all(raise_own)  # nobody merges before all have written
    rows = crew.world.on_rank0(ledger.merge)
    if lost := [index for index in range(count) if index not in rows]:
        raise DataError(
            f"{ledger.path}: has no row {lost[0]}, so another command worked on it at the same time; run this one again"
        )
    return {index: rows[index] for index in range(count)}


def _lines_of(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
