"""Sources of single image files: a folder with captions beside its pictures, and lists in CSV, TSV and JSON lines.

A list is held in memory, so it suits millions of pictures; more belong into Parquet files or tars.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ecdit_ds.data.sources.bad_sample import BadSample
from ecdit_ds.data.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    KEY_COLUMNS,
    Captions,
    Columns,
    RawSample,
    Unit,
    choose_column,
    cut,
    files_below,
    fingerprint_of,
    json_object,
    kind_of_other,
    plain_caption,
    read_inside,
    stamps_of,
    telling,
    with_names,
)
from ecdit_ds.errors import DataError

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")
_CAPTION_SUFFIXES = (".txt", ".caption")
_MAX_FIELD = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ListedImage:
    """One picture that a list names."""

    key: str
    image: str
    """Path, relative to the root."""
    caption: Any = None
    """The words, where the list holds them."""
    caption_file: str | None = None
    """Or where they are."""
    rivals: tuple[str, ...] = field(default=(), repr=False)
    """Other files that could hold them. (What a list holds is fingerprinted by `repr`, and lists have none.)"""


@dataclass(frozen=True, kw_only=True)
class ListedSource:
    """Pictures in files of their own; an `ImageSource`."""

    kind: str
    root: Path
    """Resolved; nothing outside it is read."""
    entries: Sequence[ListedImage | BadSample]
    units: Sequence[Unit]
    fingerprint: str
    ignored: Mapping[str, int]
    captions: Captions
    reads_singly: bool = True
    revision: str | None = None

    def read(self, unit: Unit) -> Iterator[RawSample | BadSample]:
        """Yield the samples of a unit in order, or why they are none."""
        for entry in self.entries[unit.start : unit.stop]:
            if isinstance(entry, BadSample):
                yield entry
                continue
            caption = entry.caption if entry.caption_file is None else self._read_caption(entry.caption_file, entry)
            if isinstance(caption, BadSample):
                yield caption
            else:
                yield from self.captions.samples(entry.key, read_inside(self.root, entry.image), caption)

    def _read_caption(self, first: str, entry: ListedImage) -> Any:
        found: dict[str, Any] = {}
        for file in (first, *entry.rivals):
            content = read_inside(self.root, file, missing="no caption")
            if isinstance(content, str):
                return BadSample(cause=content, name=file)
            found[file] = self.captions.in_file(content.decode("utf-8-sig", "surrogateescape"))
        found = telling(found)
        if len(set(map(plain_caption, found.values()))) > 1:
            return BadSample(cause="several captions", name=f"{entry.key} ({', '.join(found)})")
        return next(iter(found.values()))


def open_folder(root: Path, *, unit_samples: int, columns: Columns) -> ListedSource:
    """Open a folder of pictures, described by a metadata file in it or by text files beside them.

    Raises:
        DataError: it holds no pictures, its metadata lacks a column, or there is none and columns are named.
    """
    files, links, system_files = files_below(root)
    listed = [name for name in METADATA_FILES if (root / name).is_file()]
    if len(listed) > 1:
        raise DataError(f"{root}: has both {' and '.join(listed)}; keep one")
    if listed and not (root / listed[0]).resolve().is_relative_to(root):
        raise DataError(f"{root / listed[0]}: is a link out of {root}; copy the file there, or leave it out")
    if listed:
        found = open_list(root / listed[0], root, unit_samples=unit_samples, columns=columns)
        named = {listed[0], *(entry.image for entry in found.entries if isinstance(entry, ListedImage))}
        return replace(found, ignored=system_files + _unused(file for file in files if str(file) not in named))
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    captions: dict[str, list[str]] = {}
    for file in files:
        if file.suffix.lower() in _CAPTION_SUFFIXES:
            captions.setdefault(str(file.with_suffix("")), []).append(str(file))
    if not pictures:
        raise DataError(f"{root}: holds no picture ({', '.join(IMAGE_SUFFIXES)}); name a folder that does")
    if columns != Columns(captions=columns.captions):
        raise DataError(f"{root}: has text files beside its pictures and no columns; leave the column flags out")
    entries: list[ListedImage | BadSample] = [BadSample(cause="no regular file", name=link) for link in links]
    seen: set[str] = set()
    for picture in pictures:
        key = str(picture.with_suffix(""))
        if key in seen:
            entries.append(BadSample(cause="duplicate key", name=str(picture)))
        elif key not in captions:
            entries.append(BadSample(cause="no caption", name=str(picture)))
        else:
            first, *rivals = captions[key]
            entries.append(ListedImage(key=key, image=str(picture), caption_file=first, rivals=tuple(rivals)))
        seen.add(key)
    lonely = [captions[key] for key in sorted(captions.keys() - seen)]
    entries += [BadSample(cause="no image", name=", ".join(names)) for names in lonely]
    used = {*map(str, pictures), *(name for names in captions.values() for name in names)}
    return ListedSource(
        kind="folder of pictures",
        root=root,
        entries=entries,
        units=cut(root.name, len(entries), unit_samples),
        fingerprint=fingerprint_of([*stamps_of(root, sorted(used)), *links]),
        ignored=system_files + _unused(file for file in files if str(file) not in used),
        captions=columns.captions,
    )


def _unused(files: Iterable[Path]) -> Counter[str]:
    return Counter(map(kind_of_other, files))


def open_list(path: Path, root: Path, *, unit_samples: int, columns: Columns) -> ListedSource:
    """Open a list of pictures: `.csv`, `.tsv` (with a head line) or `.jsonl`.

    Args:
        path: of the list.
        root: what paths in it are relative to, resolved; none may lead out of it.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    try:
        if path.suffix.lower() == ".jsonl":
            rows = list(_json_rows(path))
            names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
        else:
            names, rows = _read_csv(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; make it readable") from None
    if not any(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: holds no row{_why_none(path, rows)}; name a list that does")
    image = choose_column(names, columns.image, IMAGE_COLUMNS, str(path), "image")
    caption = choose_column(names, columns.caption, CAPTION_COLUMNS, str(path), "caption")
    key_column = next((name for name in KEY_COLUMNS if name in names), image)
    choose_column(names, key_column, KEY_COLUMNS, str(path), "key")
    entries = _entries(rows, path, image, caption, key_column, columns.captions)
    pictures = [entry.image for entry in entries if isinstance(entry, ListedImage)]
    return ListedSource(
        kind=f"list {path.name}",
        root=root,
        entries=entries,
        units=cut(path.name, len(entries), unit_samples),
        fingerprint=fingerprint_of([*entries, *stamps_of(root, pictures)]),
        ignored={},
        captions=columns.captions,
    )


def _entries(
    rows: Iterable[dict[str, Any] | BadSample],
    path: Path,
    image: str,
    caption: str,
    key_column: str,
    captions: Captions,
) -> list[ListedImage | BadSample]:
    """Return what the rows of a list name; where captions are chosen, rows of one picture are an entry with several."""
    entries: list[ListedImage | BadSample] = []
    seen: set[str] = set()
    said: dict[str, list[Any]] = {}
    is_json = path.suffix.lower() == ".jsonl"
    for i, row in enumerate(rows):
        if isinstance(row, BadSample):
            entries.append(row)
            continue
        place = row.get(image)
        if isinstance(place, str) and not is_json:  # as names of columns: many write a space after the comma
            place = place.strip()
        if not isinstance(place, str) or not place:
            entries.append(BadSample(cause="no image", name=f"{path.name} row {i + 1}"))
            continue
        words = row.get(caption)
        if captions.choice:
            more = words if isinstance(words, list) else [words]
            if place in said:
                said[place] += more  # of an entry that is there
                continue
            words = said[place] = [*more]
        key = place if key_column == image or row.get(key_column) in (None, "") else str(row[key_column])
        if key in seen:
            entries.append(BadSample(cause="duplicate key", name=key))
            said.pop(place, None)
        else:
            seen.add(key)
            entries.append(ListedImage(key=key, image=place, caption=words))
    return entries


def _why_none(path: Path, rows: Sequence[object]) -> str:
    first = next((row for row in rows if isinstance(row, BadSample)), None)
    if first is None:
        return ""
    is_json = path.suffix.lower() == ".jsonl"
    told = "is no JSON object" if is_json and first.cause == "damaged row" else f"is left out: {first.cause}"
    return f" that can be read: {first.name} {told}"


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, Any] | BadSample]]:
    """Return the head line, and rows by column; a damaged one counts as many samples as it swallowed lines."""
    csv.field_size_limit(_MAX_FIELD)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Strict: an open quotation mark is an error, and not a field that goes on to the end of the file.
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        names: list[str] = []
        rows: list[dict[str, Any] | BadSample] = []
        before = 0
        while True:
            row: list[str] | None
            try:
                row = next(reader, None)
                if row is None:
                    return names, rows
            except csv.Error:
                row = ["damaged"] * (len(names) + 1)
            lines, before = reader.line_num - before, reader.line_num
            if not names:
                names = row
            elif len(row) == len(names):
                rows.append(dict(zip(names, row, strict=True)))
            elif row:
                name = f"{path.name} line {reader.line_num}"
                rows.append(BadSample(cause="damaged row", name=name, samples=max(1, lines)))


def _json_rows(path: Path) -> Iterator[dict[str, Any] | BadSample]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            found, name = json_object(line), f"{path.name} line {number}"
            if found is None:
                yield BadSample(cause="damaged row", name=name)
            elif found[1]:
                yield BadSample(cause="name given twice", name=with_names(name, found[1]))
            else:
                yield found[0]
