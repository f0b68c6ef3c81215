"""Writes folders of encoded samples, which `index.py` describes and reads.

It imports `datasets`, which takes a second: whoever only reads must not import it.
"""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import save
from torch import Tensor

from ecdit_ds.data.latents.index import (
    INDEX_FILE,
    NULL_TEXT_FILE,
    TENSOR_COLUMNS,
    TEXT_COLUMNS,
    LatentIndex,
    checksum_of,
)
from ecdit_ds.files.durable import make_folders, put_on_disk, write_durably


class ShardWriter:
    """Writes one shard, table by table; the same tables give the same bytes."""

    def __init__(self, path: Path, *, has_text: bool = True) -> None:
        """Begin a file that does not exist yet, with or without columns of text vectors."""
        tensors = TENSOR_COLUMNS if has_text else TENSOR_COLUMNS[:1]
        features = datasets.Features(
            {name: datasets.Value("string") for name in TEXT_COLUMNS}
            | {name: datasets.Value("binary") for name in tensors}
        )
        self._path, self._count = path, 0
        self._writer = ArrowWriter(path=str(path), features=features)

    def write(self, table: pa.Table) -> None:
        """Append rows with the columns of this shard; a tensor column's rows all have one size."""
        self._writer.write_table(table)
        self._count += len(table)

    def finish(self) -> tuple[int, int, str]:
        """Put the file on the disk; return number of samples, size in bytes and checksum, as `ShardInfo` has them."""
        self._writer.finalize()
        self._writer.close()
        put_on_disk(self._path)
        return self._count, self._path.stat().st_size, checksum_of(self._path)

    def abandon(self) -> None:
        """Close the file, which stays as far as it was written; again is harmless."""
        with suppress(OSError, ValueError, pa.ArrowException):
            self._writer.close()


def write_arrow_shard(path: Path, tables: Iterable[pa.Table], *, has_text: bool = True) -> tuple[int, int, str]:
    """Write a shard of some tables at once, as `ShardWriter`; return number of samples, size in bytes and checksum.

    Raises:
        OSError: no space, or no permission.
    """
    writer = ShardWriter(path, has_text=has_text)
    try:
        for table in tables:
            writer.write(table)
        return writer.finish()
    finally:
        writer.abandon()


def write_null_text(folder: Path, null_text: dict[str, Tensor]) -> dict[str, Any]:
    """Write the text of no text, by column with B = 1; return what the index says of the file."""
    path = folder / NULL_TEXT_FILE
    # Not `save_file`: its errors are no OSErrors, and a full disk or a folder that is gone would look like a bug.
    write_durably(path, save({name: part.to("cpu").contiguous() for name, part in null_text.items()}))
    return {"null_text_bytes": path.stat().st_size, "null_text_xxh3": checksum_of(path)}


def write_index(folder: Path, index: LatentIndex) -> None:
    """Write `index.json`, the last file of a set, and put it and the folder on the disk."""
    text = json.dumps(dataclasses.asdict(index), indent=2) + "\n"
    draft = folder / f".{INDEX_FILE}.{uuid.uuid4().hex}"
    write_durably(draft, text.encode("ascii"))
    os.replace(draft, folder / INDEX_FILE)
    put_on_disk(folder)


def create_staging_dir(folder: Path) -> Path:
    """Make and return a new folder beside `folder`, to write a set in; the parents may not exist yet.

    The name is unique per attempt, so that leftovers of killed processes are never reused.
    """
    make_folders(folder.parent)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    draft.mkdir()
    return draft


def commit_dataset(draft: Path, folder: Path) -> None:
    """Rename a whole set from where it was written to its place; where another process was faster, keep that one's.

    Raises:
        OSError: it could not be renamed, and there is no set.
    """
    try:
        os.rename(draft, folder)
    except OSError:
        if not (folder / INDEX_FILE).is_file():  # else another process was faster, and its folder says the same
            raise
        shutil.rmtree(draft, ignore_errors=True)
    put_on_disk(folder.parent)
