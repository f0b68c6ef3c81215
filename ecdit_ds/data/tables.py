"""Sources that are tables: Parquet files, and Hugging Face datasets on disk or by name."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ecdit_ds.data.causes import BadSample, Cause
from ecdit_ds.data.images import MAX_FILE_BYTES
from ecdit_ds.data.source import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    Captions,
    Columns,
    RawSample,
    Unit,
    choose_column,
    cut,
    fingerprint_of,
    read_inside,
    stamps_of,
)
from ecdit_ds.errors import DataError

_ROWS_AT_ONCE = 16
_OURS = f"datasets {datasets.__version__}"
_FAILURES = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Rows of Parquet files; a `Source`."""

    root: Path
    """Resolved; images given by their path lie within it."""
    units: Sequence[Unit]
    fingerprint: str
    ignored: Mapping[str, int]
    columns: Columns
    kind: str = "Parquet files"
    reads_singly: bool = False
    revision: str | None = None

    def read(self, unit: Unit) -> Iterator[RawSample | BadSample]:
        """Yield rows of a file in order, or why they are no samples; of a damaged part, how many are lost."""
        done = unit.start
        path = self.root / unit.name
        try:
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
            image, caption = _chosen(schema, self.columns, str(path))
            # As a dictionary, a picture that stands in many rows is held once.
            once = [name for name in (image, f"{image}.bytes") if _is_bytes(schema.field(image), name)]
            with pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True, read_dictionary=once) as file:
                for batch in _batches(file, unit, [image, caption]):
                    pictures, captions = batch.column(image), batch.column(caption)
                    for row, size in enumerate(_sizes(pictures)):
                        is_small = size <= MAX_FILE_BYTES  # else no bytes of it are copied
                        content = _content(pictures[row].as_py(), self.root) if is_small else "too many bytes"
                        said = captions[row].as_py()
                        yield from self.columns.captions.samples(f"{unit.name}#{done}", content, said)
                        done += 1
        except _FAILURES:
            pass
        if done < unit.stop:
            name = f"{unit.name}#{done} to {unit.stop - 1}"
            yield BadSample(cause="damaged archive", name=name, samples=unit.stop - done)


def open_parquet(
    root: Path, files: Sequence[Path], *, unit_samples: int, columns: Columns, ignored: Mapping[str, int]
) -> ParquetSource:
    """Open Parquet files below a folder.

    Args:
        root: resolved.
        files: relative to it, sorted.

    Raises:
        DataError: one cannot be read, leads out of the folder, or lacks a column.
    """
    units: list[Unit] = []
    for name in files:
        path = root / name
        if not path.resolve().is_relative_to(root):
            raise DataError(f"{path}: is a link out of {root}; copy the file there, or leave it out")
        try:
            with pq.ParquetFile(path) as file:
                count, schema = file.metadata.num_rows, file.schema_arrow
        except _FAILURES as error:
            raise DataError(
                f"{path}: is no whole Parquet file ({_first_line(error)}); fetch it again, or leave it out"
            ) from None
        _chosen(schema, columns, str(path))
        units += cut(str(name), count, unit_samples)
    return ParquetSource(
        root=root, units=units, fingerprint=fingerprint_of(stamps_of(root, files)), ignored=ignored, columns=columns
    )


def _chosen(schema: pa.Schema, columns: Columns, where: str) -> tuple[str, str]:
    """Return which columns hold images and captions; raise DataError where there is none, or several."""
    held = [field.name for field in schema if _holds_pictures(field)]
    image = choose_column(schema.names, columns.image, IMAGE_COLUMNS, where, "image", held)
    return image, choose_column(schema.names, columns.caption, CAPTION_COLUMNS, where, "caption")


def _holds_pictures(field: pa.Field) -> bool:
    """Return whether a column is of bytes with a path, as `datasets` stores pictures, or of bytes and called so."""
    if pa.types.is_struct(field.type):
        return {"bytes", "path"} <= {part.name for part in field.type}
    is_binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    return is_binary and field.name.lower() in IMAGE_COLUMNS


def _is_bytes(field: pa.Field, name: str) -> bool:
    """Return whether a column, or its part `bytes`, of that name in a file is of bytes."""
    kind = field.type
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return name == f"{field.name}.bytes" and index >= 0 and pa.types.is_binary(kind.field(index).type)
    return name == field.name and bool(pa.types.is_binary(kind))


def _sizes(pictures: pa.Array) -> list[int]:
    """Return how many bytes each picture of a column has, without making any; 0 for what is no bytes."""
    if pa.types.is_struct(pictures.type):
        if pictures.type.get_field_index("bytes") < 0:
            return [0] * len(pictures)
        pictures = pictures.field("bytes")
    values = pictures.dictionary if pa.types.is_dictionary(pictures.type) else pictures
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        return [0] * len(pictures)
    lengths = pc.binary_length(values)
    if pa.types.is_dictionary(pictures.type):
        lengths = lengths.take(pictures.indices)
    return [length or 0 for length in lengths.to_pylist()]


def _batches(file: pq.ParquetFile, unit: Unit, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield rows `unit.start` to `unit.stop`, reading only the row groups they are in."""
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if first < unit.stop and unit.start < first + count:
            place = first
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=names):
                begin, end = max(0, unit.start - place), min(len(batch), unit.stop - place)
                if begin < end:
                    yield batch.slice(begin, end - begin)
                place += len(batch)
                if place >= unit.stop:
                    return
        first += count


def _content(value: Any, root: Path) -> bytes | Cause:
    """Return the image that a cell holds, or the content of the file that it names."""
    if isinstance(value, dict):
        # Where a picture came from does not matter once its bytes are here; `read_inside` judges the path otherwise.
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and value:
        return read_inside(root, value)
    return value if isinstance(value, bytes) else "no image"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSource:
    """Rows of a dataset of the `datasets` library; a `Source`."""

    rows: datasets.Dataset
    """In the format `arrow`."""
    roots: Sequence[Path]
    """Resolved; images given by their path lie within one of them."""
    image: str
    caption: str
    captions: Captions
    units: Sequence[Unit]
    fingerprint: str
    ignored: Mapping[str, int]
    kind: str = "Hugging Face dataset"
    reads_singly: bool = True
    revision: str | None = None

    def read(self, unit: Unit) -> Iterator[RawSample | BadSample]:
        """Yield rows in order, or why they are no samples."""
        for i in range(unit.start, unit.stop):
            try:
                row = checked_rows(self.rows, i, i + 1)[0]
            except _FAILURES:
                yield BadSample(cause="damaged archive", name=f"row {i}")
                continue
            found = [_content(row[self.image], root) for root in self.roots]
            content = next((one for one in found if one != "outside the source"), found[0])
            yield from self.captions.samples(f"row-{i}", content, row[self.caption])


def open_saved(root: Path, split: str | None, *, unit_samples: int, columns: Columns) -> HuggingFaceSource:
    """Open a folder that `save_to_disk` wrote.

    Raises:
        DataError: it is damaged, names files outside itself, has no such split, or lacks a column.
    """
    if split is not None and not (root / "dataset_dict.json").is_file():
        raise DataError(f"{root}: has no splits, so --split {split} has no effect on it; leave it out")
    rows, facts = load_saved(root, split or "train")
    return _of_rows(rows, [root], str(root), facts, unit_samples, columns)


def load_saved(root: Path, split: str) -> tuple[datasets.Dataset, Sequence[object]]:
    """Return the rows of a folder that `save_to_disk` wrote, and facts of the files they are in, for a fingerprint.

    The rows are as they are stored: a format that they were saved with (torch, arrow, some columns only) changes what
    rows look like, may need a library that is not here, and is not of interest.

    Args:
        root: resolved.
        split: of several; rows that were saved without splits are read whatever it is.

    Raises:
        DataError: it is damaged, names files outside itself, or has no such split.
    """
    folder = root
    try:
        if (root / "dataset_dict.json").is_file():
            splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
            if split not in splits:
                raise DataError(f"{root}: has no split {split}; choose from {', '.join(splits)}")
            folder = root / split
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict):
            raise DataError(f"{folder / 'state.json'}: holds no JSON object; save the dataset again")
        if state.get("_indices_data_files"):
            raise DataError(
                f"{folder}: was saved by an old `datasets`, its rows out of order; save it again with {_OURS}"
            )
        names = [file["filename"] for file in state["_data_files"]]
        for name in names:
            if not (folder / name).resolve().is_relative_to(root):
                raise DataError(f"{folder / 'state.json'}: names {name}, which lies outside {root}; mend it")
        # Not `load_from_disk`, which would apply the format.
        parts = [datasets.Dataset.from_file(str(folder / name)) for name in names]
        if not any(map(len, parts)):
            raise DataError(f"{folder}: is empty: it was saved without a row; name a dataset that has some")
        return datasets.concatenate_datasets(parts), stamps_of(folder, names)
    except _FAILURES as error:
        raise DataError(f"{folder}: is no whole dataset on disk ({_first_line(error)}); save it again") from None


def checked_rows(rows: datasets.Dataset, start: int, stop: int) -> list[dict[str, Any]]:
    """Return rows of a dataset, as they are stored, none of whose places lies outside its file.

    Arrow files are mapped and believed: a damaged place would read elsewhere in memory, or end the process.

    Args:
        rows: in the format `arrow`, which costs more to choose than a row to read.

    Raises:
        pa.ArrowInvalid: one does.
    """
    table: pa.Table = rows[start:stop]
    table.validate(full=True)
    return list(table.to_pylist())


def open_hub(name: str, split: str, *, unit_samples: int, columns: Columns) -> HuggingFaceSource:
    """Open a dataset of the Hugging Face hub, or of its local cache when offline.

    Raises:
        DataError: it cannot be had, or lacks a column.
    """
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the hub's client raises, of its own classes and of several libraries'
        raise DataError(
            f"{name}: is neither here nor a dataset that the hub gave ({_first_line(error)}); name a file or folder"
        ) from None
    from huggingface_hub import constants  # seconds, that training need not wait for

    # Where the hub's clients put the files of this dataset, and what they unpacked of its archives.
    snapshots = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    roots = [snapshots.resolve(), Path(datasets.config.DOWNLOADED_DATASETS_PATH).resolve()]
    source = _of_rows(rows, roots, name, [rows._fingerprint, len(rows)], unit_samples, columns)
    # As in hf://datasets/owner/name@COMMIT/data/part.parquet.
    commits = (re.search(r"@([0-9a-f]{40})/", file) for file in rows.info.download_checksums or ())
    return replace(source, revision=next((commit[1] for commit in commits if commit), None))


def _of_rows(
    rows: datasets.Dataset,
    roots: Sequence[Path],
    where: str,
    facts: Sequence[object],
    unit_samples: int,
    columns: Columns,
) -> HuggingFaceSource:
    image, caption = _chosen(rows.features.arrow_schema, columns, where)
    rows = rows.with_format(None).select_columns([image, caption])
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return HuggingFaceSource(
        rows=rows.with_format("arrow"), roots=roots, image=image, caption=caption,
        captions=columns.captions, units=cut("rows", len(rows), unit_samples), fingerprint=fingerprint_of(facts),
        ignored={},
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
