"""Sources that are tables: Parquet files, and what rows of any table hold."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ecdit_ds.data.sources.bad_sample import BadSample, BadSampleReason
from ecdit_ds.data.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    Columns,
    RawSample,
    Unit,
    choose_column,
    cut,
    fingerprint_of,
    read_inside,
    stamps_of,
)
from ecdit_ds.data.sources.images import MAX_FILE_BYTES
from ecdit_ds.errors import DataError
from ecdit_ds.files.durable import plain_file

_ROWS_AT_ONCE = 16
FAILURES = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError)
"""What pyarrow raises for damaged tables."""


MAX_CAPTION_BYTES = 2**20
_MAX_UNPACKED_BYTES, _MAX_PACKING = 2**28, 100
"""Limits of an unpacked column of a row group: pictures are compressed already, and texts pack to a tenth."""


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Rows of Parquet files; an `ImageSource`."""

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
            metadata = pq.read_metadata(plain_file(path))
            schema = metadata.schema.to_arrow_schema()
            image, caption = chosen_columns(schema, self.columns, str(path))
            check_packing(metadata, (image, caption))
            # As a dictionary, a picture that stands in many rows is held once.
            once = [name for name in (image, f"{image}.bytes") if _is_bytes(schema.field(image), name)]
            with pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True, read_dictionary=once) as file:
                for batch in _batches(file, unit, [image, caption]):
                    pictures, captions = batch.column(image), batch.column(caption)
                    for row, size in enumerate(_sizes(pictures)):
                        # Else nothing of it is copied.
                        is_small = size <= MAX_FILE_BYTES and captions.slice(row, 1).nbytes <= MAX_CAPTION_BYTES
                        content = content_of(pictures[row].as_py(), self.root) if is_small else "too many bytes"
                        said = captions[row].as_py() if is_small else None
                        yield from self.columns.captions.samples(f"{unit.name}#{done}", content, said)
                        done += 1
        except FAILURES:
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
            with pq.ParquetFile(plain_file(path)) as file:
                count, schema = file.metadata.num_rows, file.schema_arrow
        except FAILURES as error:
            raise DataError(
                f"{path}: is no whole Parquet file ({first_line(error)}); fetch it again, or leave it out"
            ) from None
        chosen_columns(schema, columns, str(path))
        units += cut(str(name), count, unit_samples)
    return ParquetSource(
        root=root, units=units, fingerprint=fingerprint_of(stamps_of(root, files)), ignored=ignored, columns=columns
    )


def chosen_columns(schema: pa.Schema, columns: Columns, where: str) -> tuple[str, str]:
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


def check_packing(metadata: Any, names: Collection[str]) -> None:
    """Refuse a table whose columns say that they are far larger than they are in the file, before memory is taken.

    Raises:
        ValueError: naming the column.
    """
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            size, stored = column.total_uncompressed_size, column.total_compressed_size
            is_asked = column.path_in_schema.split(".")[0] in names
            if is_asked and size > max(_MAX_UNPACKED_BYTES, _MAX_PACKING * stored):
                raise ValueError(
                    f"column {column.path_in_schema} unpacks {stored:,} bytes to {size:,}, over {_MAX_PACKING} times"
                )


def content_of(value: Any, root: Path) -> bytes | BadSampleReason:
    """Return the image that a cell holds, or the content of the file that it names."""
    if isinstance(value, dict):
        # Where a picture came from does not matter once its bytes are here; `read_inside` judges the path otherwise.
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and value:
        return read_inside(root, value)
    return value if isinstance(value, bytes) else "no image"


def first_line(error: Exception) -> str:
    """Return how an error of a library begins."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
