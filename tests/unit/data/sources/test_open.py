"""Sources give every picture with its caption, in order, and name what is wrong with the others."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ecdit_ds.data.sources.bad_sample import BadSample, SystemFile
from ecdit_ds.data.sources.base import Columns, RawSample, samples_of
from ecdit_ds.data.sources.open import open_source
from tests.helpers.arrow_damage import damage_places
from tests.helpers.photographs import crops, encoded

Refusal = Callable[[Callable[[], object]], str]
JPEGS = [encoded(image) for image in crops(7)]
CAPTIONS = [f"part {i} of a photograph" for i in range(7)]


def read_all(name: object, *, unit_samples: int = 3, **options: Any) -> tuple[list[RawSample], list[BadSample]]:
    """Return the samples of a source, and what is wrong with others; every unit gives the same twice."""
    source = open_source(str(name), unit_samples=unit_samples, **options)
    results = [result for unit in source.units for result in source.read(unit)]
    assert results == [result for unit in source.units for result in source.read(unit)]
    good = [result for result in results if isinstance(result, RawSample)]
    return good, [result for result in results if isinstance(result, BadSample)]


def causes(bad: list[BadSample]) -> list[tuple[str, str]]:
    """Return causes with names, sorted."""
    return sorted((str(one.cause), one.name) for one in bad)


def assert_all_there(good: list[RawSample]) -> None:
    """Check that a source gave the seven photographs in order."""
    assert [sample.content for sample in good] == JPEGS
    assert [sample.caption for sample in good] == CAPTIONS
    assert len({sample.key for sample in good}) == 7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of seven photographs with captions beside them, two of them deeper."""
    root = tmp_path / "pictures"
    (root / "z").mkdir(parents=True)
    for i in range(7):
        place = root / ("z" if i > 4 else ".") / f"{i}.jpg"
        place.write_bytes(JPEGS[i])
        place.with_suffix(".txt").write_text(f" {CAPTIONS[i]}\n")
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write an archive as WebDataset does."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(start: int = 0, stop: int = 7) -> list[tuple[str, bytes]]:
    """Return the members of an archive of photographs."""
    pairs = [((f"{i:04}.jpg", JPEGS[i]), (f"{i:04}.txt", CAPTIONS[i].encode())) for i in range(start, stop)]
    return [member for pair in pairs for member in pair]


def test_a_folder_gives_its_pictures_by_name(folder: Path) -> None:
    (folder / "README.md").write_text("about")
    good, bad = read_all(folder)
    assert_all_there(good)
    assert bad == []
    source = open_source(str(folder), unit_samples=3)
    assert [(unit.start, unit.stop) for unit in source.units] == [(0, 3), (3, 6), (6, 7)]
    assert source.ignored == {".md": 1}


def test_what_is_wrong_in_a_folder_is_named(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret caption")
    (tmp_path / "elsewhere").mkdir()
    (folder / "0.txt").unlink()
    (folder / "1.txt").write_text(" \n")
    (folder / "2.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "3.txt").unlink()
    (folder / "3.txt").symlink_to(secret)
    (folder / "4.jpg").unlink()
    (folder / "4.jpg").symlink_to("/etc/hostname")
    (folder / "deep").symlink_to(tmp_path / "elsewhere")
    (folder / "z" / "5.png").write_bytes(b"")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "pipe.txt").write_text("waits for ever")
    (folder / "lonely.txt").write_text("no picture")
    good, bad = read_all(folder)
    assert [sample.key for sample in good] == ["z/5", "z/6"]
    assert causes(bad) == [
        ("caption is not text", "2"),
        ("duplicate key", "z/5.png"),
        ("empty caption", "1"),
        ("no caption", "0.jpg"),
        ("no image", "lonely.txt"),
        ("no regular file", "deep"),
        ("no regular file", "pipe"),
        ("outside the source", "3.txt"),
        ("outside the source", "4"),
    ]


def test_links_within_a_folder_are_read(folder: Path) -> None:
    (folder / "0.jpg").rename(folder / "z" / "kept")
    (folder / "0.jpg").symlink_to("z/kept")
    assert_all_there(read_all(folder)[0])


@pytest.mark.parametrize("kind", ["folder", "list", "metadata", "tar", "parquet", "saved"])
def test_a_source_that_was_edited_to_the_same_size_is_another_one(folder: Path, tmp_path: Path, kind: str) -> None:
    table = datasets.Dataset.from_dict({"image": JPEGS, "text": CAPTIONS})
    if kind == "saved":
        table.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    for of_kind in ("tar", "parquet"):
        (tmp_path / of_kind).mkdir()
    place, edited = {
        "folder": (folder, [folder / "2.txt", folder / "z" / "5.jpg"]),
        "list": (folder / "list.csv", [folder / "3.jpg"]),
        "metadata": (folder, [folder / "3.jpg"]),
        "tar": (tmp_path / "tar", [tmp_path / "tar" / "a.tar", tmp_path / "tar" / "b.tar"]),
        "parquet": (tmp_path / "parquet", [tmp_path / "parquet" / "a.parquet", tmp_path / "parquet" / "b.parquet"]),
        "saved": (tmp_path / "saved", list((tmp_path / "saved").glob("*.arrow"))),
    }[kind]
    if kind in ("list", "metadata"):
        write_csv(folder / f"{kind}.csv", rows())
    for name in ("a", "b"):
        write_tar(tmp_path / "tar" / f"{name}.tar", members())
        pq.write_table(table.data.table, tmp_path / "parquet" / f"{name}.parquet")
    fingerprint = open_source(str(place), unit_samples=3).fingerprint
    assert open_source(str(place), unit_samples=3).fingerprint == fingerprint and edited
    for path in edited:
        facts = path.stat()
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
        changed = open_source(str(place), unit_samples=3).fingerprint
        assert changed != fingerprint, path
        fingerprint = changed


def test_a_listed_picture_that_came_later_makes_another_source(folder: Path) -> None:
    path = write_csv(folder / "list.csv", rows())
    (folder / "0.jpg").rename(folder / "away")
    before = open_source(str(path), unit_samples=3).fingerprint
    (folder / "away").rename(folder / "0.jpg")
    assert open_source(str(path), unit_samples=3).fingerprint != before


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl", "metadata.csv"])
def test_a_caption_of_a_list_that_was_edited_makes_another_source(folder: Path, name: str) -> None:
    def fingerprint(table: list[dict[str, Any]]) -> str:
        if name.endswith(".jsonl"):
            (folder / name).write_text("\n".join(map(json.dumps, table)))
        else:
            write_csv(folder / name, table, delimiter="\t" if name.endswith(".tsv") else ",")
        return open_source(str(folder if "metadata" in name else folder / name), unit_samples=3).fingerprint

    before, edited = fingerprint(rows()), rows()
    edited[-1]["caption"] = "part 9 of a photograph"
    assert fingerprint(edited) != before == fingerprint(rows())
    assert fingerprint([rows()[1], rows()[0], *rows()[2:]]) != before


def test_of_many_files_every_one_counts_for_what_a_source_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_source(str(folder), unit_samples=3).fingerprint
    monkeypatch.setattr("ecdit_ds.data.sources.base._STAMPS_AT_ONCE", 2)  # two parts, one not full
    assert open_source(str(folder), unit_samples=3).fingerprint == before
    for path in sorted(folder.rglob("*.*")):
        (folder / "z" / "6.jpg").touch()
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        now = open_source(str(folder), unit_samples=3).fingerprint
        assert now != before, path
        before = now
    (folder / "deep").symlink_to(folder / "z")
    assert open_source(str(folder), unit_samples=3).fingerprint != before


@pytest.mark.parametrize("kind", ["list", "link", "tar", "parquet", "saved"])
def test_a_folder_beside_whose_name_begins_alike_is_outside(
    folder: Path, tmp_path: Path, refusal_of: Refusal, kind: str
) -> None:
    private = tmp_path / f"{folder.name}-private"
    table = datasets.Dataset.from_dict({"image": JPEGS, "text": CAPTIONS})
    table.save_to_disk(str(private))
    (private / "0.jpg").write_bytes(JPEGS[0])
    write_tar(private / "a.tar", members())
    pq.write_table(table.data.table, private / "a.parquet")
    if kind == "list":
        path = write_csv(folder / "list.csv", [{"path": f"../{private.name}/0.jpg", "caption": "stolen"}])
        assert causes(read_all(path)[1]) == [("outside the source", f"../{private.name}/0.jpg")]
    elif kind == "link":
        (folder / "0.jpg").unlink()
        (folder / "0.jpg").symlink_to(private / "0.jpg")
        assert causes(read_all(folder)[1]) == [("outside the source", "0")]
    elif kind == "saved":
        saved = tmp_path / "sets"
        table.save_to_disk(str(saved))
        private.rename(tmp_path / "sets-private")
        state = json.loads((saved / "state.json").read_text())
        state["_data_files"][0]["filename"] = f"../sets-private/{state['_data_files'][0]['filename']}"
        (saved / "state.json").write_text(json.dumps(state))
        assert "outside" in refusal_of(lambda: read_all(saved))
    else:
        for path in folder.rglob("*.*"):
            path.unlink()
        (folder / f"a.{kind}").symlink_to(private / f"a.{kind}")
        assert f"is a link out of {folder}" in refusal_of(lambda: read_all(folder))


def rows() -> list[dict[str, Any]]:
    """Return a list of the folder's pictures."""
    return [{"path": f"{'z/' if i > 4 else ''}{i}.jpg", "caption": CAPTIONS[i]} for i in range(7)]


def write_csv(path: Path, table: list[dict[str, Any]], **options: Any) -> Path:
    """Write a table with a head line."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), **options)
        writer.writeheader()
        writer.writerows(table)
    return path


def test_lists_give_the_pictures_they_name(folder: Path, tmp_path: Path) -> None:
    lists = [
        write_csv(folder / "list.csv", rows()),
        write_csv(folder / "list.tsv", rows(), delimiter="\t"),
        folder / "list.jsonl",
    ]
    lists[2].write_text("\n".join(json.dumps(row) for row in rows()))
    for path in lists:
        good, bad = read_all(path)
        assert_all_there(good)
        assert bad == []
    outside = write_csv(tmp_path / "elsewhere.csv", rows())
    assert_all_there(read_all(outside, images=folder)[0])
    assert {one.cause for one in read_all(outside)[1]} == {"no image"}


def test_a_metadata_file_describes_its_folder(folder: Path) -> None:
    write_csv(folder / "metadata.csv", [{"file_name": row["path"], "text": row["caption"]} for row in rows()])
    assert_all_there(read_all(folder)[0])


def test_what_is_wrong_in_a_list_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(JPEGS[0])
    lines = [
        "path,caption",
        "0.jpg,one",
        "0.jpg,again",
        "../secret.jpg,stolen",
        f"{tmp_path}/secret.jpg,stolen",
        "missing.jpg,gone",
        "1.jpg,",
        "2.jpg",
        ",no path",
        '3.jpg,"never closed',
        "4.jpg,lost",
        "",
    ]
    (folder / "list.csv").write_text("\n".join(lines))
    good, bad = read_all(folder / "list.csv")
    assert [sample.key for sample in good] == ["0.jpg"]
    assert sum(one.samples for one in bad if one.cause == "damaged row") == 1 + 2
    assert [cause for cause, _ in causes(bad)] == [
        "damaged row",
        "damaged row",
        "duplicate key",
        "empty caption",
        "no image",
        "no image",
        "outside the source",
        "outside the source",
    ]


def test_damaged_lines_of_json_are_named(folder: Path) -> None:
    (folder / "list.jsonl").write_text('{"path": "0.jpg", "text": "one"}\n{"path": \n[1]\n{"path": "1.jpg", "text": 5}')
    good, bad = read_all(folder / "list.jsonl")
    assert len(good) == 1
    assert causes(bad) == [
        ("caption is not text", "1.jpg"),
        ("damaged row", "list.jsonl line 2"),
        ("damaged row", "list.jsonl line 3"),
    ]


def test_rows_without_a_key_are_named_by_their_path(folder: Path) -> None:
    table = [row | ({"id": i} if i < 2 else {"id": None} if i < 4 else {}) for i, row in enumerate(rows())]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(row) for row in table))
    good, bad = read_all(folder / "list.jsonl")
    assert [sample.key for sample in good] == ["0", "1", "2.jpg", "3.jpg", "4.jpg", "z/5.jpg", "z/6.jpg"]
    write_csv(folder / "list.csv", [{"id": "", **row} for row in rows()])
    assert_all_there(read_all(folder / "list.csv")[0])
    assert bad == []


@pytest.mark.parametrize("form", ["binary", "struct", "path"])
def test_parquet_gives_its_rows_across_row_groups(folder: Path, tmp_path: Path, form: str) -> None:
    images: dict[str, list[Any]] = {
        "binary": list(JPEGS),
        "struct": [{"bytes": content, "path": None} for content in JPEGS],
        "path": [row["path"] for row in rows()],
    }
    path = (folder if form == "path" else tmp_path) / "table.parquet"
    pq.write_table(pa.table({"image": images[form], "other": range(7), "text": CAPTIONS}), path, row_group_size=2)
    good, bad = read_all(path)
    assert_all_there(good)
    assert bad == []


def test_a_damaged_page_of_parquet_costs_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    table = pa.table({"image": JPEGS, "text": CAPTIONS})
    pq.write_table(table, path, row_group_size=2, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(JPEGS[4]) + 100] ^= 1
    path.write_bytes(content)
    good, bad = read_all(path, unit_samples=7)
    assert [sample.caption for sample in good] == CAPTIONS[:4]
    assert [(one.cause, one.samples) for one in bad] == [("damaged archive", 3)]


def test_a_truncated_parquet_file_is_refused_before_work_begins(
    tmp_path: Path, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"image": JPEGS, "text": CAPTIONS}), path)
    os.truncate(path, path.stat().st_size - 100)
    assert "is no whole Parquet file" in refusal_of(lambda: read_all(path))


def test_a_table_without_captions_is_refused_with_what_it_has(
    tmp_path: Path, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"image": JPEGS, "alt": CAPTIONS}), path)
    message = refusal_of(lambda: read_all(path))
    assert "image, alt" in message and "--caption-column" in message
    assert_all_there(read_all(path, columns=Columns(caption="alt"))[0])


def test_tars_give_their_samples(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "b.tar", members(4, 7))
    write_tar(tmp_path / "tars" / "a.tar", members(0, 4))
    good, bad = read_all(tmp_path / "tars")
    assert_all_there(good)
    assert bad == []


def test_a_caption_may_stand_in_a_tars_json(tmp_path: Path) -> None:
    text = json.dumps({"alt": CAPTIONS[0], "caption": "another"}).encode()
    path = write_tar(tmp_path / "a.tar", [("0.jpg", JPEGS[0]), ("0.json", text)])
    assert read_all(path)[0][0].caption == "another"
    assert read_all(path, columns=Columns(caption="alt"))[0][0].caption == CAPTIONS[0]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("where", ["0.txt", "0.caption"])
def test_a_caption_of_a_tar_in_another_encoding_is_named_and_not_guessed(
    tmp_path: Path, where: str, encoding: str
) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", JPEGS[0]), (where, "a café".encode(encoding)), *members(1, 7)])
    good, bad = read_all(path)
    assert len(good) == 6 and causes(bad) == [("caption is not text", "a.tar/0")]


def test_a_damaged_header_costs_its_member_and_no_more(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members())
    with tarfile.open(path) as tar:
        header = tar.getmember("0002.jpg").offset
    content = bytearray(path.read_bytes())
    content[header + 3] ^= 1
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 4, "Python says nothing: the reason for our own walk"
    good, bad = read_all(path)
    assert [sample.caption for sample in good] == CAPTIONS[:2] + CAPTIONS[3:]
    assert causes(bad) == [("damaged archive", f"a.tar at byte {header}"), ("no image", "a.tar/0002")]


def test_a_zeroed_header_is_no_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members())
    with tarfile.open(path) as tar:
        header = tar.getmember("0003.jpg").offset
    content = bytearray(path.read_bytes())
    content[header : header + 512] = bytes(512)
    path.write_bytes(content)
    good, bad = read_all(path)
    assert len(good) == 6
    assert "damaged archive" in dict(causes(bad))


def test_damage_behind_more_zeros_than_are_read_at_once_is_found(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", members()).read_bytes()
    start, zeros = 2 * 512 + -(-len(JPEGS[0]) // 512) * 512 + 512, bytes(3 << 20)  # after the first sample
    (tmp_path / "a.tar").write_bytes(whole[:start] + zeros + whole[start:])
    good, bad = read_all(tmp_path / "a.tar")
    assert_all_there(good)
    assert [one.cause for one in bad] == ["damaged archive"]


def test_a_member_that_a_disk_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract = tarfile.TarFile.extractfile

    def fail(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
        if info.name == "0001.jpg":
            raise OSError("an error of input or output")
        return extract(tar, info)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", fail)
    good, bad = read_all(write_tar(tmp_path / "a.tar", members(0, 3)))
    assert [sample.key for sample in good] == ["a.tar/0000", "a.tar/0002"]
    assert causes(bad) == [("damaged archive", "a.tar/0001.jpg"), ("no image", "a.tar/0001")]


def test_an_archive_that_ends_early_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members())
    with tarfile.open(path) as tar:
        last, middle = tar.getmember("0006.jpg").offset, tar.getmember("0005.jpg").offset_data + 100
    os.truncate(path, last)  # at the border of a member, where nothing else looks wrong
    good, bad = read_all(path)
    assert len(good) == 6
    assert [one.cause for one in bad] == ["archive ends early"]
    os.truncate(path, middle)
    good, bad = read_all(path)
    assert len(good) == 5
    assert [one.cause for one in bad] == ["archive ends early"], "one cut is told once"
    os.truncate(path, 0)
    assert [one.cause for one in read_all(path)[1]] == ["archive ends early"]


def test_a_cut_is_told_once_wherever_it_is(tmp_path: Path) -> None:
    # Long names have headers of their own before the member's.
    for name, prefix in (("short.tar", ""), ("long.tar", "n" * 150)):
        path = write_tar(tmp_path / name, [(prefix + member, content) for member, content in members()])
        whole = path.read_bytes()
        with tarfile.open(path) as tar:
            header, end = tar.getmember(f"{prefix}0005.txt").offset, tar.getmember(f"{prefix}0006.txt").offset_data
        for size in (*range(header, header + 3000, 100), end + 1, end + 512, end + 1024, end + 1535):
            path.write_bytes(whole[:size])
            good, bad = read_all(path)
            assert [one.cause for one in bad] == ["archive ends early"], size
            assert len(good) == (7 if size >= end + 512 else len(good)) >= 5
        path.write_bytes(whole[: end + 1536])
        assert read_all(path)[1] == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, "v7"])
def test_a_damaged_stretch_counts_as_many_samples_as_its_bytes_would_hold(tmp_path: Path, form: object) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{i:02}.{suffix}", bytes([1]) * 900) for i in range(20) for suffix in ("jpg", "txt")])
    content = bytearray(path.read_bytes())
    sample = 2 * (512 + 1024)
    if form == "v7":  # no magic, so the next header cannot be told from content
        for header in range(0, 20 * sample, sample // 2):
            content[header + 257 : header + 265] = bytes(8)
            content[header + 148 : header + 156] = b" " * 8
            content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
        content[4 * sample] ^= 1
    else:
        content[4 * sample : 12 * sample] = b"x" * (8 * sample)
    path.write_bytes(content)
    good, bad = read_all(path)
    left = 4 if form == "v7" else 12
    assert len(good) == left
    assert [one.cause for one in bad] == ["damaged archive"]
    # The rest of a v7 tar ends with its zeros, which are less than four samples here.
    assert 20 - left <= bad[0].samples <= 20 - left + (4 if form == "v7" else 0)


def test_an_archive_that_says_nothing_at_all_is_no_single_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members())
    content = path.read_bytes()
    path.write_bytes(b"<html>".ljust(len(content) - 1024, b"x") + bytes(1024))
    assert [one.cause for one in read_all(path)[1]] == ["unreadable archive"]


def test_no_damage_to_headers_loses_a_sample_silently(tmp_path: Path) -> None:
    path, draws = write_tar(tmp_path / "a.tar", members()), random.Random(0)
    whole = path.read_bytes()
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(draws.choice((1, 2, 5))):
            content[draws.randrange(len(content) // 512) * 512 + draws.randrange(160)] ^= 1 << draws.randrange(8)
        path.write_bytes(content[: draws.choice((len(content), draws.randrange(len(content))))])
        good, bad = read_all(path)
        assert len(good) == 7 or bad


def test_members_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*members(0, 1), ("../out.jpg", JPEGS[1]), ("/root.jpg", JPEGS[2])])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("null.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    good, bad = read_all(path)
    assert len(good) == 1
    assert causes(bad) == [
        ("no regular file", "a.tar/hard.jpg"),
        ("no regular file", "a.tar/link.jpg"),
        ("no regular file", "a.tar/null.jpg"),
        ("outside the source", "a.tar/../out.jpg"),
        ("outside the source", "a.tar//root.jpg"),
    ]
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_key_that_comes_back_is_a_duplicate(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*members(0, 2), *members(0, 1), ("1.jpg", b"x"), ("1.jpg", b"y")])
    good, bad = read_all(path)
    assert [sample.key for sample in good] == ["a.tar/0000", "a.tar/0001"]
    assert [cause for cause, _ in causes(bad)] == ["duplicate key", "duplicate key", "no caption"]


@pytest.mark.parametrize("in_splits", [False, True])
def test_a_dataset_on_disk_gives_its_rows(tmp_path: Path, in_splits: bool) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = [{"bytes": content, "path": None} for content in JPEGS]
    table = datasets.Dataset.from_dict({"image": images, "text": CAPTIONS}, features=features)
    saved = datasets.DatasetDict({"train": table}) if in_splits else table
    saved.save_to_disk(str(tmp_path / "saved"))
    good, bad = read_all(tmp_path / "saved")
    assert_all_there(good)
    assert bad == []


def test_a_name_that_is_no_path_is_a_dataset_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    def load(name: str, *, split: str) -> datasets.Dataset:
        if (name, split) != ("owner/photographs", "test"):
            raise ConnectionError("offline mode is enabled")
        return datasets.Dataset.from_dict({"image": JPEGS, "text": CAPTIONS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert_all_there(read_all("owner/photographs", split="test")[0])
    assert "(offline mode is enabled)" in refusal_of(lambda: read_all("owner/other"))


@pytest.mark.parametrize("place", ["hub/datasets--owner--photographs/snapshots/0", "downloads/extracted/0"])
def test_picture_files_of_the_hub_are_read_from_its_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    folder.rename(tmp_path / place)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = [{"bytes": None, "path": str(tmp_path / place / row["path"])} for row in rows()]
    table = datasets.Dataset.from_dict({"image": images, "text": CAPTIONS}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    assert_all_there(read_all("owner/photographs")[0])
    is_of_one = place.startswith("hub")
    assert {one.cause for one in read_all("owner/other")[1]} == ({"outside the source"} if is_of_one else set())


def test_a_row_of_the_hub_names_no_file_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"image": ["/etc/hostname"], "text": ["stolen"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert causes(read_all("owner/photographs")[1]) == [("outside the source", "row-0")]


def test_other_rows_of_the_hub_under_the_same_name_are_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [datasets.Dataset.from_dict({"image": JPEGS[:2], "text": list(words)}) for words in ("ab", "ab", "ac")]
    found = []
    for rows in tables:
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, rows=rows: rows)
        found.append(open_source("owner/photographs", unit_samples=3).fingerprint)
    assert found[0] == found[1] != found[2]


def test_a_dataset_that_names_files_elsewhere_is_refused(
    tmp_path: Path, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    table = datasets.Dataset.from_dict({"image": JPEGS, "text": CAPTIONS})
    table.save_to_disk(str(tmp_path / "saved"))
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../other.arrow"
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    assert "outside" in refusal_of(lambda: read_all(tmp_path / "saved"))


def test_sources_that_are_none_are_refused(
    folder: Path, tmp_path: Path, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in refusal_of(lambda: read_all(tmp_path / "empty"))
    assert "no file or folder" in refusal_of(lambda: read_all("/no/such/place"))
    (tmp_path / "notes.docx").write_text("x")
    assert "of no known kind" in refusal_of(lambda: read_all(tmp_path / "notes.docx"))
    write_tar(folder / "a.tar", members())
    assert "1 tars and 7 pictures" in refusal_of(lambda: read_all(folder))
    (folder / "a.tar").rename(folder / "a.tar.gz")
    assert "compressed tar" in refusal_of(lambda: read_all(folder))


SEVERAL = [("0.depth.png", b"depth"), ("0.canny.png", b"canny"), ("0.png", b"picture"), ("0.txt", b"one")]


def test_a_tar_with_several_pictures_a_sample_asks_which_is_meant(tmp_path: Path, refusal_of: Refusal) -> None:
    path = write_tar(tmp_path / "a.tar", SEVERAL)
    message = refusal_of(lambda: read_all(path))
    assert "a.tar/0 ('canny.png', 'depth.png', 'png'): several pictures; name one by --image-column" in message
    for column, content in (("png", b"picture"), ("depth.png", b"depth"), (".CANNY.png", b"canny")):
        (sample,) = read_all(path, columns=Columns(image=column))[0]
        assert sample.content == content
    has = "('canny.png', 'depth.png', 'png', 'txt')"
    assert causes(read_all(path, columns=Columns(image="jpg"))[1]) == [("no image", f"a.tar/0 {has}")]


def test_a_single_sample_with_several_pictures_is_left_out_and_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*members(1, 7), *SEVERAL, ("x.jpg", b"1"), ("x.webp", b"2"), ("x.txt", b"x")])
    good, bad = read_all(path)
    assert [sample.content for sample in good] == JPEGS[1:]
    assert causes(bad) == [
        ("several pictures", "a.tar/0 ('canny.png', 'depth.png', 'png')"),
        ("several pictures", "a.tar/x ('jpg', 'webp')"),
    ]


def test_a_tar_with_several_captions_a_sample_asks_which_is_meant(tmp_path: Path, refusal_of: Refusal) -> None:
    fields = json.dumps({"caption": "from the web", "text": "of a machine", "width": 9}).encode()
    path = write_tar(tmp_path / "a.tar", [("0.jpg", JPEGS[0]), ("0.txt", b"one"), ("0.json", fields)])
    message = refusal_of(lambda: read_all(path))
    assert "('caption in json', 'text in json', 'txt'): several captions; name one by --caption-column" in message
    for column, caption in (("txt", "one"), ("caption", "from the web"), ("text", "of a machine")):
        assert read_all(path, columns=Columns(caption=column))[0][0].caption == caption
    both = write_tar(tmp_path / "both.tar", [("0.jpg", JPEGS[0]), ("0.caption", b"of a file"), ("0.json", fields)])
    assert read_all(both, columns=Columns(caption="caption"))[0][0].caption == "of a file"
    path = write_tar(tmp_path / "b.tar", [*members(1, 7), ("0.jpg", b""), ("0.txt", b"one"), ("0.caption", b"two")])
    assert causes(read_all(path)[1]) == [("several captions", "b.tar/0 ('caption', 'txt')")]


def test_one_caption_at_several_places_is_one_caption(tmp_path: Path) -> None:
    # As img2dataset writes them.
    fields = json.dumps({"caption": f" {CAPTIONS[0]}\n", "text": None}).encode()
    path = write_tar(tmp_path / "a.tar", [*members(0, 1), ("0000.json", fields)])
    assert [sample.caption for sample in read_all(path)[0]] == CAPTIONS[:1]


def test_a_folder_with_several_captions_a_picture_trains_on_neither(folder: Path) -> None:
    (folder / "0.caption").write_text("another")
    (folder / "1.caption").write_text(CAPTIONS[1])
    good, bad = read_all(folder)
    assert [sample.key for sample in good] == ["1", "2", "3", "4", "z/5", "z/6"]
    assert causes(bad) == [("several captions", "0 (0.caption, 0.txt)")]


def test_the_first_of_a_list_of_captions_is_told_as_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": JPEGS[:3], "captions": [["one", "two"], ["only"], []]}), path)
    good, bad = read_all(path)
    assert [(sample.caption, sample.converted) for sample in good] == [
        ("one", ("first of several captions",)),
        ("only", ()),
    ]
    assert [one.cause for one in bad] == ["caption is not text"]


def table_file(path: Path, names: list[str], columns: list[list[Any]]) -> Path:
    """Write a table whose columns may share a name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_arrays([pa.array(column) for column in columns], names=names), path)
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(
                [names, *zip(*columns, strict=True)]
            )
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["path", "caption", "caption"], "2 columns of captions: 'caption' (column 2), 'caption' (column 3); rename"),
        (
            ["path", "caption", " Caption"],
            "2 columns of captions: 'caption' (column 2), ' Caption' (column 3); name one",
        ),
        (["path", "caption", "\ufeffcaption"], "'caption' (column 2), '\\ufeffcaption' (column 3); name one by"),
        (["path", "text", "prompt"], "'text' (column 2), 'prompt' (column 3); name one by --caption-column"),
        (["path", "path", "caption"], "2 columns of images: 'path' (column 1), 'path' (column 2); rename"),
        (["path", "IMAGE", "caption"], "2 columns of images: 'path' (column 1), 'IMAGE' (column 2); name one by"),
    ],
)
def test_two_columns_that_may_be_meant_are_refused_with_both_names(
    folder: Path, refusal_of: Refusal, kind: str, names: list[str], told: str
) -> None:
    columns: list[list[Any]] = [["0.jpg"], ["one"], ["two"]]
    path = table_file(folder / f"table.{kind}", names, columns)
    assert told in refusal_of(lambda: read_all(path))
    wanted = Columns(image="path", caption=names[1])
    if names.count(names[1]) == 2:
        assert "rename" in refusal_of(lambda: read_all(path, columns=wanted))
    elif names[2] != "caption":
        assert [sample.caption for sample in read_all(path, columns=wanted)[0]] == ["one"]


def test_columns_that_are_not_read_may_share_a_name(folder: Path, refusal_of: Refusal) -> None:
    names = ["path", "url", "url", "caption"]
    for kind in ("csv", "parquet"):
        path = table_file(folder / f"table.{kind}", names, [["0.jpg"], ["a"], ["b"], ["one"]])
        assert [sample.caption for sample in read_all(path)[0]] == ["one"]
    path = table_file(folder / "keys.csv", ["id", "path", "id", "text"], [["1"], ["0.jpg"], ["2"], ["one"]])
    assert "2 columns of keys: 'id' (column 1), 'id' (column 3)" in refusal_of(lambda: read_all(path))


def test_a_row_of_json_that_gives_a_name_twice_is_left_out(folder: Path, tmp_path: Path) -> None:
    lines = ['{"path": "0.jpg", "text": "one"}', '{"path": "1.jpg", "text": "two", "text": "three"}']
    (folder / "list.jsonl").write_text("\n".join(lines))
    good, bad = read_all(folder / "list.jsonl")
    assert [sample.caption for sample in good] == ["one"]
    assert causes(bad) == [("name given twice", "list.jsonl line 2 ('text')")]
    parts = [("0.jpg", JPEGS[0]), ("0.json", lines[1].encode())]
    parts += [("1.jpg", JPEGS[1]), ("1.json", b'{"text": "of an object that says all there is", "id": 1, "id": 2}')]
    path = write_tar(tmp_path / "a.tar", parts)
    assert causes(read_all(path)[1]) == [
        ("name given twice", "a.tar/0 ('text')"),
        ("name given twice", "a.tar/1 ('id')"),
    ]


def test_a_list_of_which_no_line_can_be_read_is_refused_with_the_reason(folder: Path, refusal_of: Refusal) -> None:
    path = folder / "list.jsonl"
    for lines, told in (
        ('\n{"path": "0.jpg", "text": "one", "text": "two"}\n' * 2, "line 2 ('text') is left out: name given twice"),
        ('[{"path": "0.jpg", "text": "one"}]', "list.jsonl line 1 is no JSON object"),
        ("5\n6\n", "list.jsonl line 1 is no JSON object"),
        ("\n", "holds no row; name"),
    ):
        path.write_text(lines)
        assert told in refusal_of(lambda: read_all(path))


def test_names_that_come_twice_in_what_is_not_read_do_not_matter(folder: Path, tmp_path: Path) -> None:
    row = '{"path": "0.jpg", "text": "one", "boxes": [{"x": 1, "x": 2}], "more": {"text": 1, "text": 2}}'
    (folder / "list.jsonl").write_text(row)
    assert [sample.caption for sample in read_all(folder / "list.jsonl")[0]] == ["one"]
    path = write_tar(tmp_path / "a.tar", [("0.jpg", JPEGS[0]), ("0.json", row.encode())])
    assert [sample.caption for sample in read_all(path)[0]] == ["one"]


def test_a_caption_given_twice_in_json_is_a_rival_of_a_text_file(tmp_path: Path) -> None:
    twice = {"0": '{"caption": "cat", "caption": "dog"}', "1": '{"url": 1, "url": 2}', "2": '{"caption": '}
    parts = [
        (f"{key}.{suffix}", content)
        for key, fields in twice.items()
        for suffix, content in (("jpg", JPEGS[0]), ("txt", b"one"), ("json", fields.encode()))
    ]
    path = write_tar(tmp_path / "a.tar", parts)
    good, bad = read_all(path)
    assert causes(bad) == [("name given twice", "a.tar/0 ('caption')")]
    assert [sample.key for sample in good] == ["a.tar/1", "a.tar/2"]
    assert len(read_all(path, columns=Columns(caption="txt"))[0]) == 3


@pytest.mark.parametrize("empty", ["", " \n", None, 5, [], {}, "\ufeff"])
def test_a_caption_that_says_nothing_is_no_rival(folder: Path, tmp_path: Path, empty: Any) -> None:
    fields = json.dumps({"caption": empty}).encode()
    path = write_tar(tmp_path / "a.tar", [*members(0, 1), ("0000.json", fields)])
    good, bad = read_all(path)
    assert [sample.caption for sample in good] == CAPTIONS[:1] and bad == []
    fields = json.dumps({"caption": empty, "text": CAPTIONS[0]}).encode()
    path = write_tar(tmp_path / "b.tar", [("0.jpg", JPEGS[0]), ("0.txt", b" "), ("0.json", fields)])
    assert [sample.caption for sample in read_all(path)[0]] == CAPTIONS[:1]
    path = write_tar(
        tmp_path / "c.tar", [("0.jpg", JPEGS[0]), ("0.txt", b" "), ("0.json", json.dumps({"caption": empty}).encode())]
    )
    assert causes(read_all(path)[1]) == [("empty caption", "c.tar/0")]
    (folder / "0.caption").write_text(empty if isinstance(empty, str) else "")
    assert_all_there(read_all(folder)[0])


def test_names_of_json_fields_are_read_in_a_tar_as_those_of_columns(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", JPEGS[0]), ("0.json", b'{"Caption ": "one", "ALT": "two"}')])
    assert [sample.caption for sample in read_all(path)[0]] == ["one"]
    assert [sample.caption for sample in read_all(path, columns=Columns(caption="ALT"))[0]] == ["two"]
    fields = b'{"Caption": "one", "caption": "two"}'
    path = write_tar(tmp_path / "b.tar", [*members(0, 1), ("1.jpg", JPEGS[0]), ("1.json", fields)])
    assert causes(read_all(path)[1]) == [("several captions", "b.tar/1 ('Caption in json', 'caption in json')")]


def pictures_table(**columns: list[bytes]) -> datasets.Dataset:
    """Return photographs with captions, and other columns of pictures."""
    columns = {"image": JPEGS, **columns}
    features = {name: datasets.Image() for name in columns} | {"text": datasets.Value("string")}
    cells = {name: [{"bytes": one, "path": None} for one in column] for name, column in columns.items()}
    return datasets.Dataset.from_dict({**cells, "text": CAPTIONS}, features=datasets.Features(features))


def test_several_columns_of_pictures_are_refused_whatever_they_are_called(tmp_path: Path, refusal_of: Refusal) -> None:
    table = pictures_table(depth=[b"depth"] * 7)
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        told = refusal_of(lambda: read_all(path))  # noqa: B023
        assert "2 columns of images: 'image' (column 1), 'depth' (column 2); name one by --image-column" in told
        assert_all_there(read_all(path, columns=Columns(image="image"))[0])


def test_a_column_of_pictures_comes_before_one_of_their_names(tmp_path: Path, refusal_of: Refusal) -> None:
    table = pictures_table().add_column("file_name", ["none.jpg"] * 7)
    for kind in ("struct", "binary"):
        path = tmp_path / f"{kind}.parquet"
        cells = (
            table.data.table if kind == "struct" else pa.table({"file_name": ["x"] * 7, "jpg": JPEGS, "text": CAPTIONS})
        )
        pq.write_table(cells, path)
        assert_all_there(read_all(path)[0])
    # Of no usual name, it may be a mask.
    path = tmp_path / "mask.parquet"
    pq.write_table(table.rename_column("image", "mask").data.table, path)
    assert "'mask' (column 1), 'file_name' (column 3)" in refusal_of(lambda: read_all(path))


def test_a_split_of_what_has_none_is_refused(folder: Path, tmp_path: Path, refusal_of: Refusal) -> None:
    pictures_table().save_to_disk(str(tmp_path / "saved"))
    places = [folder, tmp_path / "saved", write_tar(tmp_path / "a.tar", members()), write_csv(folder / "a.csv", rows())]
    for place in places:
        told = refusal_of(lambda: read_all(place, split="test"))  # noqa: B023
        assert "has no splits, so --split test has no effect" in told


MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_part_of_a_caption(folder: Path, tmp_path: Path) -> None:
    marked = "\ufeffone\n\ufefftwo"
    (tmp_path / "tars").mkdir()
    fields = MARK + json.dumps({"caption": marked}).encode()
    write_tar(tmp_path / "tars" / "a.tar", [("0.jpg", b"x"), ("0.txt", marked.encode())])
    write_tar(tmp_path / "tars" / "b.tar", [("0.jpg", b"x"), ("0.json", fields)])
    pq.write_table(pa.table({"image": [b"x"], "text": [marked]}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"image": [b"x"], "text": [marked]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "0.jpg").write_bytes(b"x")
    table_file(tmp_path / "list" / "a.csv", ["path", "text"], [["0.jpg"], [marked]])
    (tmp_path / "list" / "a.jsonl").write_bytes(MARK + json.dumps({"path": "0.jpg", "text": marked}).encode())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.jpg").write_bytes(b"x")
    (tmp_path / "folder" / "0.txt").write_text(marked)
    for place in ("tars", "a.parquet", "saved", "list/a.csv", "list/a.jsonl", "folder"):
        good, bad = read_all(tmp_path / place)
        assert {sample.caption for sample in good} == {"one two"} and not bad, place
    path = write_tar(tmp_path / "empty.tar", [("0.jpg", b"x"), ("0.txt", MARK)])
    assert causes(read_all(path)[1]) == [("empty caption", "empty.tar/0")]


LEFT = [
    ("._0000.jpg", "._*"),
    ("__MACOSX/0000.jpg", "__MACOSX"),
    ("a/.DS_Store", ".DS_Store"),
    ("thumbs.db", "Thumbs.db"),
    ("Desktop.ini", "desktop.ini"),
    ("PaxHeaders.99/0000.jpg", "PaxHeaders.*"),
    ("@eaDir/0000.jpg", "@eaDir"),
    (".hidden.jpg", ".*"),
    ("$Recycle.Bin/0000.jpg", "$RECYCLE.BIN"),
    ("Icon\r", "Icon\r"),
    ("System Volume Information/0000.jpg", "System Volume Information"),
]


def test_what_systems_leave_in_a_tar_is_no_sample_and_counted(tmp_path: Path) -> None:
    shuffled = [pair for member in members() for pair in (("._" + member[0], b"\0\5\x16\7"), member)]
    path = write_tar(tmp_path / "a.tar", [*((name, b"x") for name, _ in LEFT), *shuffled])
    good, bad = read_all(path)
    assert_all_there(good)
    assert bad == []
    source = open_source(str(path), unit_samples=3)
    kinds = Counter(one.kind for one in source.read(source.units[0]) if isinstance(one, SystemFile))
    assert kinds == Counter(kind for _, kind in LEFT) + Counter({"._*": 14})
    assert len(list(samples_of(source, source.units[0]))) == 7


def test_hidden_folders_and_files_of_other_kinds_in_a_tar_are_no_samples_and_counted(tmp_path: Path) -> None:
    hidden = [".Trash/0.jpg", ".Trash/0.txt", ".AppleDouble/0001.jpg", "a/.Spotlight-V100/b/a.jpg", "./.x/0.jpg"]
    others = ["README.md", "dataset_info.json", "a/LICENSE", "0.cls", "0.npy"]
    path = write_tar(tmp_path / "a.tar", [*((f"./{name}", b"{}") for name in [*hidden, *others]), *members()])
    good, bad = read_all(path)
    assert_all_there(good)
    assert bad == []
    source = open_source(str(path), unit_samples=3)
    kinds = Counter(one.kind for one in source.read(source.units[0]) if isinstance(one, SystemFile))
    assert kinds == {".*": 5, ".md": 1, ".json": 1, "LICENSE": 1, ".cls": 1, ".npy": 1}
    # A caption tells of a picture that is not there.
    lonely = [("k.json", b"{}"), ("k.txt", b"one"), ("l.avif", b"x"), ("l.json", b"{}"), ("m.txt", b"two")]
    assert causes(read_all(write_tar(tmp_path / "b.tar", lonely))[1]) == [
        ("no image", "b.tar/k"),
        ("no image", "b.tar/l"),
        ("no image", "b.tar/m"),
    ]


def test_what_systems_leave_in_a_folder_is_no_sample_and_counted(folder: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "metadata.csv", rows())
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", members())
    (folder / ".cache").mkdir()
    (folder / ".cache" / "0.jpg").write_bytes(b"x")
    for root in (folder, tmp_path / "tars"):
        for name, _ in LEFT:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"x")
    (folder / "._0.jpg").write_bytes(b"x")
    counts = Counter(kind for _, kind in LEFT)
    for place, more in ((folder, {"._*": 1, ".*": 1}), (tmp_path / "tars", {})):
        good, bad = read_all(place)
        assert_all_there(good)
        assert bad == []
        assert open_source(str(place), unit_samples=3).ignored == counts + Counter(more)
    (tmp_path / "metadata.csv").rename(folder / "metadata.csv")
    (folder / "unlisted.jpg").write_bytes(b"x")
    # Captions beside pictures that a list describes are not looked at, nor pictures that it does not name.
    assert open_source(str(folder), unit_samples=3).ignored == counts + Counter(
        {"._*": 1, ".*": 1, ".txt": 7, ".jpg": 1}
    )


def test_a_row_that_names_what_systems_leave_is_told_as_such(folder: Path, tmp_path: Path) -> None:
    (folder / "._0.jpg").write_bytes(b"x")
    path = write_csv(folder / "list.csv", [{"path": "._0.jpg", "caption": "one"}, *rows()])
    good, bad = read_all(path)
    assert_all_there(good)
    assert causes(bad) == [("system file", "._0.jpg")]
    cells = [{"bytes": None, "path": "__MACOSX/0.jpg"}, {"bytes": b"x", "path": "0.jpg"}]
    pq.write_table(pa.table({"image": cells, "text": ["one", "two"]}), tmp_path / "a.parquet")
    assert causes(read_all(tmp_path / "a.parquet")[1]) == [("system file", "a.parquet#0")]


def test_bytes_in_a_table_are_taken_whatever_their_path_was(tmp_path: Path) -> None:
    cells = [{"bytes": JPEGS[i], "path": f"{folder}0.jpg"} for i, folder in enumerate(["a/@eaDir/", "._", ".x/"])]
    pq.write_table(pa.table({"image": cells, "text": CAPTIONS[:3]}), tmp_path / "a.parquet")
    good, bad = read_all(tmp_path / "a.parquet")
    assert [sample.content for sample in good] == JPEGS[:3] and bad == []
    (tmp_path / "0.jpg").write_bytes(JPEGS[0])
    paths = [{"bytes": b"", "path": "0.jpg"}, {"bytes": None, "path": "0.jpg"}]
    pq.write_table(pa.table({"image": paths, "text": CAPTIONS[:2]}), tmp_path / "a.parquet")
    assert [sample.content for sample in read_all(tmp_path / "a.parquet")[0]] == [b"", JPEGS[0]]


def test_a_space_after_the_comma_is_no_part_of_a_path(folder: Path) -> None:
    for i, suffix, between in ((0, "csv", ", "), (1, "tsv", " \t ")):
        lines = (("caption", "path"), (CAPTIONS[i], f"{i}.jpg"), ("gone", " "))
        (folder / f"list.{suffix}").write_text("\n".join(map(between.join, lines)))
        good, bad = read_all(folder / f"list.{suffix}")
        assert [(sample.content, sample.key) for sample in good] == [(JPEGS[i], f"{i}.jpg")]
        assert [one.cause for one in bad] == ["no image"]


@pytest.mark.parametrize("in_splits", [False, True])
def test_an_empty_dataset_on_disk_is_told_to_be_empty(tmp_path: Path, refusal_of: Refusal, in_splits: bool) -> None:
    table = datasets.Dataset.from_dict({"image": [], "text": []})
    (datasets.DatasetDict({"train": table}) if in_splits else table).save_to_disk(str(tmp_path / "saved"))
    message = refusal_of(lambda: read_all(tmp_path / "saved"))
    assert f"{tmp_path / 'saved'}" in message and "is empty: it was saved without a row" in message


def test_a_dataset_on_disk_whose_state_is_a_list_is_refused(tmp_path: Path, refusal_of: Refusal) -> None:
    (tmp_path / "state.json").write_text("[1]")
    assert "state.json: holds no JSON object; save the" in refusal_of(lambda: read_all(tmp_path))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_a_compressed_tar_is_known_whatever_it_is_called(
    tmp_path: Path, refusal_of: Refusal, pack: Callable[[bytes], bytes]
) -> None:
    write_tar(tmp_path / "a.tar", members(0, 1))
    path = write_tar(tmp_path / "b.tar", members())
    path.write_bytes(pack(path.read_bytes()))
    for place in (tmp_path, path):
        assert "b.tar: is compressed" in refusal_of(lambda: read_all(place))  # noqa: B023


FORMATS: list[dict[str, Any]] = [
    {"type": "torch", "columns": ["label"]},
    {"type": "numpy", "columns": ["label"]},
    {"type": "numpy"},
    {"type": "torch"},
    {"type": "arrow"},
    {"type": "pandas"},
]


@pytest.mark.parametrize("in_splits", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_format_that_rows_were_saved_with_does_not_matter(
    tmp_path: Path, form: dict[str, Any], in_splits: bool
) -> None:
    table = pictures_table().add_column("label", list(range(7))).with_format(**form)
    (datasets.DatasetDict({"train": table}) if in_splits else table).save_to_disk(str(tmp_path / "saved"))
    good, bad = read_all(tmp_path / "saved")
    assert_all_there(good)
    assert bad == []


def test_a_format_of_a_library_that_is_not_here_does_not_matter(tmp_path: Path) -> None:
    pictures_table().save_to_disk(str(tmp_path / "saved"))
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state | {"_format_type": "jax"}))
    assert_all_there(read_all(tmp_path / "saved")[0])


def test_a_format_of_the_hubs_rows_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pictures_table().with_format("arrow")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert_all_there(read_all("owner/photographs")[0])


def test_rows_that_were_chosen_before_saving_are_the_ones_that_are_read(tmp_path: Path, refusal_of: Refusal) -> None:
    table = pictures_table().select([5, 1, 3]).with_format("numpy")
    table.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    good, _ = read_all(tmp_path / "saved")
    assert [sample.caption for sample in good] == [CAPTIONS[i] for i in (5, 1, 3)]
    assert [sample.content for sample in good] == [JPEGS[i] for i in (5, 1, 3)]
    path = tmp_path / "saved" / "state.json"
    state = json.loads(path.read_text()) | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    path.write_text(json.dumps(state))  # as `datasets` did before 1.7
    assert "its rows out of order; save it again" in refusal_of(lambda: read_all(tmp_path / "saved"))


def test_rows_whose_columns_share_a_name_are_refused(tmp_path: Path, refusal_of: Refusal) -> None:
    pictures_table().save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    twice = pa.Table.from_arrays(
        [pa.array(JPEGS), pa.array(CAPTIONS), pa.array(CAPTIONS)], names=["image", "text", "text"]
    )
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, twice.schema) as writer:
        writer.write_table(twice)
    assert str(tmp_path / "saved") in refusal_of(lambda: read_all(tmp_path / "saved"))


def _work_of_opening(source: Path) -> int:
    """Return how many functions Python calls to open a source; time would depend on the machine."""
    calls = 0

    def count(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        open_source(str(source), unit_samples=100)
    finally:
        sys.setprofile(None)
    return calls


def _some_folder(root: Path, n: int) -> Path:
    root.mkdir()
    for i in range(n):
        (root / f"{i}.jpg").touch()
        (root / f"{i}.txt").touch()
    return root


def _some_list(root: Path, n: int) -> Path:
    _some_folder(root, n)
    rows = [f"{i}.jpg,words\n" for i in range(n)]
    (root / "metadata.csv").write_text("".join(["file_name,text\n", *rows]))
    return root


def _some_json(root: Path, n: int) -> Path:
    _some_folder(root, n)
    rows = [json.dumps({"file_name": f"{i}.jpg", "text": "words"}) + "\n" for i in range(n)]
    (root / "list.jsonl").write_text("".join(rows))
    return root / "list.jsonl"


def _some_tars(root: Path, n: int) -> Path:
    root.mkdir()
    for i in range(n // 20):
        write_tar(root / f"{i}.tar", [(f"{k}.{kind}", b"") for k in range(20) for kind in ("jpg", "txt")])
    return root


def _some_tables(root: Path, n: int) -> Path:
    root.mkdir()
    for i in range(n // 20):
        pq.write_table(pa.table({"image": [b""] * 20, "text": ["words"] * 20}), root / f"{i}.parquet")
    return root


@pytest.mark.parametrize("make", [_some_folder, _some_list, _some_json, _some_tars, _some_tables])
def test_a_source_of_four_times_the_size_takes_four_times_the_work_to_open(
    make: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    few, many = make(tmp_path / "few", 100), make(tmp_path / "many", 400)
    _work_of_opening(few)  # what the first call loads
    assert _work_of_opening(many) < 5 * _work_of_opening(few)


@pytest.mark.parametrize("column", ["image", "text"])
def test_a_place_outside_an_arrow_file_spoils_its_rows_and_not_the_process(column: str, tmp_path: Path) -> None:
    texts = [f"{i} and" + " more" * i for i in range(5)]
    images = [f"picture {i} {'x' * i}" for i in range(5)]
    saved = datasets.Dataset.from_dict({"image": [text.encode() for text in images], "text": texts})
    saved.save_to_disk(str(tmp_path / "saved"))
    (path,) = (tmp_path / "saved").glob("*.arrow")
    damage_places(path, images if column == "image" else texts, 3)
    good, bad = read_all(tmp_path / "saved", unit_samples=2)
    assert [sample.caption for sample in good] == [texts[0], texts[1], texts[4]]
    assert causes(bad) == [("damaged archive", "row 2"), ("damaged archive", "row 3")]


@pytest.mark.parametrize("kind", ["bytes", "large bytes", "a struct"])
def test_pictures_of_a_table_that_are_too_large_are_left_out_and_their_neighbours_are_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecdit_ds.data.sources.tables.MAX_FILE_BYTES", 100)
    contents = [bytes([i]) * size for i, size in enumerate([99, 100, 101, 5, 400, 100, 7, 101])]
    image: Any = pa.array(contents, pa.large_binary() if kind == "large bytes" else pa.binary())
    if kind == "a struct":
        image = pa.StructArray.from_arrays([image, pa.array([None] * 8, pa.string())], ["bytes", "path"])
    table = pa.table({"image": image, "text": [f"words {i}" for i in range(8)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    good, bad = read_all(tmp_path / "a.parquet", unit_samples=3)
    assert [sample.content for sample in good] == [content for content in contents if len(content) <= 100]
    assert [sample.caption for sample in good] == [f"words {i}" for i in (0, 1, 3, 5, 6)]
    assert causes(bad) == [("too many bytes", f"a.parquet#{i}") for i in (2, 4, 7)]


@pytest.mark.parametrize("kind", ["bytes", "a struct"])
def test_a_picture_that_stands_in_every_row_of_a_table_is_held_once(kind: str, tmp_path: Path) -> None:
    """A file of kilobytes, which as rows would fill any memory."""
    size = 4 * 2**20
    image: Any = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), [bytes(size)]).cast(pa.binary())
    if kind == "a struct":
        image = pa.StructArray.from_arrays([image, pa.array([None] * 64, pa.string())], ["bytes", "path"])
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image": image, "text": ["words"] * 64}), path, compression="zstd", dictionary_pagesize_limit=2**30
    )
    assert path.stat().st_size < 2**16
    del image
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        source = open_source(str(path), unit_samples=64)
        assert sum(isinstance(result, RawSample) for unit in source.units for result in source.read(unit)) == 64
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 8 * size


def _header(name: str, size: int, kind: bytes, *changes: tuple[int, bytes]) -> bytes:
    """Return a tar's header with some bytes changed, and a right checksum."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    for place, value in changes:
        block[place : place + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _holes(size: int) -> bytes:
    octal = b"%011o\0" % size
    return _header("b.json", 0, b"S", (386, octal), (398, b"%011o\0" % 0), (482, b"\0"), (483, octal))


@pytest.mark.parametrize(
    ("blocks", "cause"),
    [
        (_holes(250 * 2**20), "no regular file"),
        (_header("p", 0, b"x") * 3000, "damaged archive"),
        (_header("b.txt", 0, b"0", (124, b"\xff" * 10 + (-1024).to_bytes(2, "big", signed=True))), "damaged archive"),
        (_header("p", 14, b"x") + b"14 size=-1024\n".ljust(512, b"\0") + _header("b.txt", 0, b"0"), "damaged archive"),
    ],
    ids=["holes", "headers of headers", "backwards", "backwards by a note"],
)
def test_a_tar_that_would_take_all_memory_or_never_end_costs_what_is_crafted(
    blocks: bytes, cause: str, tmp_path: Path
) -> None:
    whole = write_tar(tmp_path / "a.tar", members(0, 2)).read_bytes().rstrip(b"\0")
    begun = whole + b"\0" * (-len(whole) % 512)
    (tmp_path / "a.tar").write_bytes(begun + blocks + b"\0" * 1024)
    good, bad = read_all(tmp_path / "a.tar")
    assert [sample.content for sample in good] == JPEGS[:2]
    assert {one.cause for one in bad} - {"no image"} == {cause}


def test_members_of_one_sample_are_held_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecdit_ds.data.sources.tars._MAX_SAMPLE_BYTES", len(JPEGS[0]) + 100)
    beside = [(f"0000.x{i}", bytes(60)) for i in range(3)]
    good, bad = read_all(write_tar(tmp_path / "a.tar", members(0, 1) + beside))
    assert [sample.content for sample in good] == JPEGS[:1]
    assert causes(bad) == [("too many bytes", f"a.tar/0000.x{i}") for i in range(1, 3)]


def test_a_caption_of_a_table_is_measured_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecdit_ds.data.sources.tables.MAX_CAPTION_BYTES", 400)
    rows = {"image": JPEGS[:3], "text": [["a", "b"], ["a"] * 1000, ["c"]]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    good, bad = read_all(tmp_path / "a.parquet")
    assert [sample.caption for sample in good] == ["a", "c"]
    assert causes(bad) == [("too many bytes", "a.parquet#1")]


def test_a_column_that_says_it_unpacks_to_far_more_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal_of: Refusal
) -> None:
    monkeypatch.setattr("ecdit_ds.data.sources.tables._MAX_UNPACKED_BYTES", 10**6)
    rows = {"image": [bytes(2 * 10**6)], "text": ["a"]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    good, bad = read_all(tmp_path / "a.parquet")
    assert (good, causes(bad)) == ([], [("damaged archive", "a.parquet#0 to 0")])
    monkeypatch.setattr("ecdit_ds.data.sources.tables._MAX_UNPACKED_BYTES", 10**7)
    assert len(read_all(tmp_path / "a.parquet")[0]) == 1


def test_a_list_that_is_a_link_out_of_its_folder_is_not_read(folder: Path, tmp_path: Path, refusal_of: Refusal) -> None:
    secret = write_csv(tmp_path / "secret.csv", rows())
    (folder / "metadata.csv").symlink_to(secret)
    message = refusal_of(lambda: read_all(folder))
    assert message.startswith(f"{folder / 'metadata.csv'}: is a link out of {folder}")


def test_a_row_of_a_saved_dataset_is_measured_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures_table().save_to_disk(str(tmp_path / "saved"))
    largest = max(map(len, JPEGS))
    for name, limit in (("MAX_FILE_BYTES", largest - 1), ("MAX_CAPTION_BYTES", 0)):
        monkeypatch.setattr(f"ecdit_ds.data.sources.dataset_rows.{name}", limit)
    good, bad = read_all(tmp_path / "saved")
    assert {one.cause for one in bad} == {"too many bytes"} and 0 < len(bad) < 7 and len(good) + len(bad) == 7
