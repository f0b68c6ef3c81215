"""Rows that several processes work out: none lost, none twice, none that is half written."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ecdit_ds.errors import EvaluationError
from ecdit_ds.inference import jsonl_shards as ledger_module
from ecdit_ds.inference.jsonl_shards import ResultTable, Row, map_resumable
from ecdit_ds.inference.ranks import DistributedContext, SingleProcess
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.model.sharding import ShardIndex

RefusalOf = Callable[[Callable[[], object]], str]

ALONE = DistributedContext(
    world=SingleProcess(),
    device=torch.device("cpu"),
    layers=SerialLayers(),
    dp=ShardIndex(index=0, count=1),
    is_tp_leader=True,
)


@pytest.fixture
def ledger(tmp_path: Path) -> ResultTable:
    """Return one that is empty."""
    return ResultTable(path=tmp_path / "deep" / "rows.jsonl")


def row(index: int) -> Row:
    """Return a row like no other."""
    return {"index": index, "square": index * index}


def content(ledger: ResultTable) -> dict[str, bytes]:
    """Return all its files."""
    return {path.name: path.read_bytes() for path in sorted(ledger.path.parent.iterdir())}


def test_rows_come_back_by_index_whoever_wrote_them(ledger: ResultTable) -> None:
    assert (ledger.rows(), ledger.is_there()) == ({}, False)
    ledger.append(1, [row(4), row(0)])
    ledger.append(10, [row(2)])
    ledger.append(1, [row(3)])
    assert list(ledger.rows().items()) == [(i, row(i)) for i in (0, 2, 3, 4)]
    assert ledger.is_there()


def test_merging_leaves_one_file_in_order_and_merging_again_changes_nothing(ledger: ResultTable) -> None:
    ledger.append(2, [row(1)])
    ledger.append(0, [row(5), row(0)])
    merged = ledger.merge()
    assert list(merged) == [0, 1, 5]
    expected = {"rows.jsonl": "".join(json.dumps(row(i)) + "\n" for i in (0, 1, 5)).encode()}
    assert content(ledger) == expected
    assert ledger.merge() == merged
    assert content(ledger) == expected


def test_no_rows_leave_no_file(ledger: ResultTable) -> None:
    ledger.append(0, [])
    assert not ledger.path.parent.exists()


@pytest.mark.parametrize("torn", [b'{"index": 9', b'{"index": 9, "square": 81}', b"\x00" * 9, b"\xff\xfe", b"[]", b" "])
def test_a_line_without_its_end_is_no_row(ledger: ResultTable, torn: bytes) -> None:
    ledger.append(0, [row(1)])
    with (ledger.path.parent / "rows.rank_0.jsonl").open("ab") as file:
        file.write(torn)
    assert ledger.rows() == {1: row(1)}
    assert ledger.merge() == {1: row(1)}
    ledger.append(0, [row(2)])
    assert ledger.merge() == {1: row(1), 2: row(2)}


@pytest.mark.parametrize("unlinked", [0, 1])
def test_a_kill_while_merging_loses_and_doubles_nothing(
    ledger: ResultTable, monkeypatch: pytest.MonkeyPatch, unlinked: int
) -> None:
    for rank in range(3):
        ledger.append(rank, [row(rank), row(rank + 3)])
    unlink, parts = Path.unlink, list[Path]()

    def unlink_and_die(path: Path, missing_ok: bool = False) -> None:
        if ".rank_" in path.name:
            if len(parts) == unlinked:
                raise KeyboardInterrupt
            parts.append(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_and_die)
        with pytest.raises(KeyboardInterrupt):
            ledger.merge()
    assert len(content(ledger)) == 1 + 3 - unlinked
    assert list(ledger.merge()) == list(range(6))
    assert list(content(ledger)) == ["rows.jsonl"]


def test_a_kill_before_the_merged_file_is_whole_leaves_the_parts(
    ledger: ResultTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_paths: object) -> None:
        raise KeyboardInterrupt

    ledger.append(0, [row(0)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            ledger.merge()
    assert ledger.merge() == {0: row(0)}
    assert not ledger.path.with_name("rows.rank_0.jsonl").exists()


def test_clearing_removes_its_files_and_no_others(ledger: ResultTable) -> None:
    ledger.append(0, [row(0)])
    ledger.merge()
    ledger.append(3, [row(1)])
    (ledger.path.parent / "rows.txt").write_bytes(b"mine")
    ledger.clear()
    assert content(ledger) == {"rows.txt": b"mine"}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "",
        "[]",
        "null",
        "7",
        "{}",
        "[" * 100_000,
        '{"index": "1"}',
        '{"index": true}',
        '{"index": -1}',
        '{"index": 1.0}',
        '{"index": null}',
        '{"index": 1} {"index": 2}',
        '{"index": ' + "9" * 5000 + "}",
        "\xff",
    ],
)
def test_a_line_that_is_no_row_is_refused_by_its_number_and_nothing_is_lost(
    ledger: ResultTable, refusal_of: RefusalOf, line: str
) -> None:
    ledger.append(7, [row(0)])
    path = ledger.path.with_name("rows.rank_7.jsonl")
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    before = content(ledger)
    for action in (ledger.rows, ledger.merge):
        assert f"{path} line 2: " in refusal_of(action)
    assert content(ledger) == before


def test_a_row_that_its_reader_could_not_use_is_refused(ledger: ResultTable, refusal_of: RefusalOf) -> None:
    ledger.append(0, [row(0), {"index": 1}])
    strict = replace(ledger, is_whole=lambda row: "square" in row)
    assert "rows.rank_0.jsonl line 2: is none of the rows" in refusal_of(strict.rows)


def test_files_that_cannot_be_read_or_written_are_named(ledger: ResultTable, refusal_of: RefusalOf) -> None:
    ledger.path.mkdir(parents=True)
    assert f"{ledger.path}: cannot be read" in refusal_of(ledger.rows)
    under = ResultTable(path=ledger.path.parent / "file" / "rows.jsonl")
    under.path.parent.write_bytes(b"mine")
    assert "rows.rank_0.jsonl: cannot be written" in refusal_of(lambda: under.append(0, [row(0)]))
    ledger.path.rmdir()
    ledger.path.with_name("rows.rank_0.jsonl").write_bytes(b"\xff\n")
    assert "rows.rank_0.jsonl: cannot be read" in refusal_of(ledger.rows)


def test_text_of_any_characters_comes_back(ledger: ResultTable) -> None:
    rows = [
        {"index": i, "text": text} for i, text in enumerate(("a\nb", "\r", "\u2028\x85", "字 🎨", "\x00", "\udcff"))
    ]
    ledger.append(0, rows)
    assert list(ledger.merge().values()) == rows


@dataclass
class Worker:
    """Squares, and remembers which; fails at one."""

    fails_at: int = -1
    done: tuple[int, ...] = ()

    def __call__(self, indices: Sequence[int]) -> Iterator[Row]:
        for index in indices:
            if index == self.fails_at:
                raise EvaluationError(f"cannot square {index}")
            self.done += (index,)
            yield row(index)


def test_only_rows_that_are_missing_are_worked_out_in_batches(ledger: ResultTable) -> None:
    ledger.append(5, [row(1), row(2)])
    told: list[int] = []
    worker = Worker()
    rows = map_resumable(ledger, 6, worker, ALONE, batch_size=3, advance=told.append)
    assert rows == {i: row(i) for i in range(6)}
    assert (worker.done, told) == ((0, 3, 4, 5), [2, 3, 1])
    again = Worker()
    assert map_resumable(ledger, 6, again, ALONE, batch_size=3) == rows
    assert again.done == ()


def test_rows_that_are_not_asked_for_are_not_returned(ledger: ResultTable) -> None:
    ledger.append(0, [row(i) for i in range(9)])
    assert list(map_resumable(ledger, 4, Worker(), ALONE, batch_size=3)) == [0, 1, 2, 3]
    assert list(ledger.rows()) == list(range(9))


def test_whole_batches_before_a_fault_stay(ledger: ResultTable) -> None:
    with pytest.raises(EvaluationError, match="cannot square 5"):
        map_resumable(ledger, 9, Worker(fails_at=5), ALONE, batch_size=2)
    assert list(ledger.rows()) == [0, 1, 2, 3]
    worker = Worker()
    assert list(map_resumable(ledger, 9, worker, ALONE, batch_size=2)) == list(range(9))
    assert worker.done == (4, 5, 6, 7, 8)


def test_a_defect_keeps_whole_batches_too(ledger: ResultTable) -> None:
    def work(indices: Sequence[int]) -> list[Row]:
        if 4 in indices:
            raise ZeroDivisionError
        return [row(index) for index in indices]

    with pytest.raises(ZeroDivisionError):
        map_resumable(ledger, 9, work, ALONE, batch_size=2)
    assert list(ledger.rows()) == [0, 1, 2, 3]


class TwoRanks:
    """A world of two whose other rank has ended its work, well or with a fault."""

    size = 2

    def __init__(self, rank: int, of_other: Exception | None, when_waiting: Callable[[], None]) -> None:
        self.rank, self.of_other, self.when_waiting = rank, of_other, when_waiting

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        return work()

    def run_on_all(self, work: Callable[[], Any]) -> Any:
        self.when_waiting()
        work()
        if self.of_other:
            raise self.of_other


@pytest.mark.parametrize("fails_here", [False, True])
def test_a_fault_of_one_process_reaches_all_and_keeps_the_rows_of_all(
    ledger: ResultTable, monkeypatch: pytest.MonkeyPatch, fails_here: bool
) -> None:
    merged: list[str] = []
    merge = ResultTable.merge

    def merge_and_tell(self: ResultTable) -> object:
        merged.append("merged")
        return merge(self)

    monkeypatch.setattr(ResultTable, "merge", merge_and_tell)
    others = [] if fails_here else [row(1)]
    world = TwoRanks(0, None if fails_here else EvaluationError("there"), lambda: ledger.append(1, others))
    crew = replace(ALONE, world=cast(Any, world), dp=ShardIndex(index=0, count=2))
    worker = Worker(fails_at=4 if fails_here else -1)
    with pytest.raises(EvaluationError, match="cannot square 4" if fails_here else "there"):
        map_resumable(ledger, 6, worker, crew, batch_size=1)
    assert set(ledger.rows()) == ({0, 2} if fails_here else {0, 1, 2, 4})
    assert len(merged) == 1  # the one before the work: others may still be writing


def test_a_rank_that_does_not_speak_works_nothing_out(ledger: ResultTable) -> None:
    def speak() -> None:
        ledger.append(0, [row(0), row(1)])

    worker = Worker()
    crew = replace(ALONE, world=cast(Any, TwoRanks(1, None, speak)), is_tp_leader=False)
    assert list(map_resumable(ledger, 2, worker, crew, batch_size=1)) == [0, 1]
    assert worker.done == ()


def test_a_full_disk_is_told_and_earlier_rows_stay(
    ledger: ResultTable, monkeypatch: pytest.MonkeyPatch, refusal_of: RefusalOf
) -> None:
    def full(_path: Path, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    ledger.append(0, [row(0)])
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "replace_durably", full)
        assert "rows.jsonl: cannot be written: No space left" in refusal_of(ledger.merge)
    assert ledger.merge() == {0: row(0)}
