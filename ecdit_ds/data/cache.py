"""Folders of encoded samples: written whole or not at all, verified when opened.

A folder holds `samples.arrow` (Hugging Face `datasets`), `null_text.safetensors` (the text of no text, in the same
encoding) and `index.json` (count, shapes, sizes and checksums of both). It is written beside its place and renamed, so
processes may race for it, and one that is killed leaves nothing that is ever read.
"""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy.typing as npt
import pyarrow as pa
import xxhash
from datasets.arrow_writer import ArrowWriter
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from ecdit_ds.durable import put_on_disk
from ecdit_ds.errors import DataError

SCHEMA_VERSION = 3
"""Raise it when scenes or columns change, so that no older folder is taken for a new one."""
ARROW_FILE = "samples.arrow"
NULL_TEXT_FILE = "null_text.safetensors"
INDEX_FILE = "index.json"


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """What `index.json` holds."""

    schema: int
    settings: dict[str, str | int]
    """All that the samples depend on."""
    count: int
    latents_shape: tuple[int, int, int]
    """(C, H, W)."""
    text_shape: tuple[int, int]
    """(T, D)."""
    arrow_bytes: int
    arrow_xxh3: str
    null_text_bytes: int
    null_text_xxh3: str


def write_folder(
    folder: Path,
    tables: Iterator[pa.Table],
    *,
    null_text: dict[str, npt.NDArray[Any]],
    settings: dict[str, str | int],
    count: int,
    latents_shape: tuple[int, int, int],
    text_shape: tuple[int, int],
) -> None:
    """Write samples beside `folder` and rename them there; where another process was faster, keep its folder.

    Args:
        folder: does not exist yet; its parents may not either.
        tables: the samples in order, in the columns caption, kind, latents, text_embeds, text_mask, text_pooled.
        null_text: the text of no text, by column.
        settings: all that the samples depend on, for the index.
        count: number of samples.
        latents_shape: (C, H, W).
        text_shape: (T, D).

    Raises:
        OSError: no space, or no permission.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The name is new for every try: what a killed process left behind is never met again.
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        _write_arrow(draft / ARROW_FILE, tables, count)
        save_file(null_text, draft / NULL_TEXT_FILE)
        index = CacheIndex(
            schema=SCHEMA_VERSION,
            settings=settings,
            count=count,
            latents_shape=latents_shape,
            text_shape=text_shape,
            arrow_bytes=(draft / ARROW_FILE).stat().st_size,
            arrow_xxh3=_checksum(draft / ARROW_FILE),
            null_text_bytes=(draft / NULL_TEXT_FILE).stat().st_size,
            null_text_xxh3=_checksum(draft / NULL_TEXT_FILE),
        )
        (draft / INDEX_FILE).write_text(json.dumps(dataclasses.asdict(index), indent=2) + "\n", encoding="ascii")
        for path in (*(draft / name for name in (ARROW_FILE, NULL_TEXT_FILE, INDEX_FILE)), draft):
            put_on_disk(path)
        try:
            os.rename(draft, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its folder says the same
                raise
        put_on_disk(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_folder(folder: Path) -> tuple[CacheIndex, datasets.Dataset, dict[str, npt.NDArray[Any]]]:
    """Verify a folder that `write_folder` wrote, and map it into memory.

    Returns:
        The index, the rows as pyarrow tables, and the null text by column.

    Raises:
        DataError: a file is missing or damaged; names it.
    """
    index = read_index(folder)
    _verify(folder / ARROW_FILE, index.arrow_bytes, index.arrow_xxh3)
    _verify(folder / NULL_TEXT_FILE, index.null_text_bytes, index.null_text_xxh3)
    rows = datasets.Dataset.from_file(str(folder / ARROW_FILE)).with_format("arrow")
    return index, rows, load_file(folder / NULL_TEXT_FILE)


def _write_arrow(path: Path, tables: Iterator[pa.Table], count: int) -> None:
    features = datasets.Features({
        "caption": datasets.Value("string"),
        "kind": datasets.Value("string"),
        **{name: datasets.Value("binary") for name in ("latents", "text_embeds", "text_mask", "text_pooled")},
    })  # fmt: skip
    # disable=None shows the bar on terminals only.
    with (
        ArrowWriter(path=str(path), features=features) as writer,
        tqdm(total=count, desc="encoding scenes", unit="scene", disable=None) as progress,
    ):
        for table in tables:
            writer.write_table(table)
            progress.update(len(table))
        writer.finalize()


def read_index(folder: Path) -> CacheIndex:
    """Read what a folder says of itself; whether its files are whole, `read_folder` finds out.

    Raises:
        DataError: there is no index, or a damaged one, or another version's.
    """
    path = folder / INDEX_FILE
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
        shapes = {name: tuple(fields.pop(name)) for name in ("latents_shape", "text_shape")}
        index = CacheIndex(**(fields | shapes))
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; delete the folder {folder} to have it written anew") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: is no index of an encoded set ({error}); delete the folder {folder} to have it written anew"
        ) from None
    if index.schema != SCHEMA_VERSION:
        raise DataError(
            f"{path}: has schema {index.schema}, this version reads {SCHEMA_VERSION}; delete the folder {folder}"
        )
    return index


def _verify(path: Path, wanted_bytes: int, wanted_checksum: str) -> None:
    way_out = f"delete the folder {path.parent} to have it written anew"
    if not path.is_file():
        raise DataError(f"{path}: is missing; {way_out}")
    size = path.stat().st_size
    if size != wanted_bytes:
        raise DataError(f"{path}: has {size} bytes, but its index says {wanted_bytes}; {way_out}")
    checksum = _checksum(path)
    if checksum != wanted_checksum:
        raise DataError(f"{path}: has checksum {checksum}, but its index says {wanted_checksum}; {way_out}")


def _checksum(path: Path) -> str:
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()
