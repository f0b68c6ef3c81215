"""Sources that are datasets of the `datasets` library, on disk or by name.

It imports `datasets`, which takes a second: whoever reads something else must not import it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import pyarrow as pa

from ecdit_ds.data.sources.bad_sample import BadSample
from ecdit_ds.data.sources.base import Captions, Columns, RawSample, Unit, cut, fingerprint_of, stamps_of
from ecdit_ds.data.sources.images import MAX_FILE_BYTES
from ecdit_ds.data.sources.tables import FAILURES, MAX_CAPTION_BYTES, chosen_columns, content_of, first_line
from ecdit_ds.errors import DataError

_OURS = f"datasets {datasets.__version__}"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSource:
    """Rows of a dataset of the `datasets` library; an `ImageSource`."""

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
                table = checked_table(self.rows, i, i + 1)
                if table.nbytes > MAX_FILE_BYTES + MAX_CAPTION_BYTES:  # nothing of it is copied
                    yield BadSample(cause="too many bytes", name=f"row {i}")
                    continue
                (row,) = table.to_pylist()
            except FAILURES:
                yield BadSample(cause="damaged archive", name=f"row {i}")
                continue
            found = [content_of(row[self.image], root) for root in self.roots]
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
    except FAILURES as error:
        raise DataError(f"{folder}: is no whole dataset on disk ({first_line(error)}); save it again") from None


def checked_table(rows: datasets.Dataset, start: int, stop: int) -> pa.Table:
    """Return rows of a dataset, as they are stored, none of whose places lies outside its file.

    Arrow files are mapped and believed: a damaged place would read elsewhere in memory, or end the process.

    Args:
        rows: in the format `arrow`, which costs more to choose than a row to read.

    Raises:
        pa.ArrowInvalid: one does.
    """
    table: pa.Table = rows[start:stop]
    table.validate(full=True)
    return table


def open_hub(name: str, split: str, *, unit_samples: int, columns: Columns) -> HuggingFaceSource:
    """Open a dataset of the Hugging Face hub, or of its local cache when offline.

    Raises:
        DataError: it cannot be had, or lacks a column.
    """
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the hub's client raises, of its own classes and of several libraries'
        raise DataError(
            f"{name}: is neither here nor a dataset that the hub gave ({first_line(error)}); name a file or folder"
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
    image, caption = chosen_columns(rows.features.arrow_schema, columns, where)
    rows = rows.with_format(None).select_columns([image, caption])
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return HuggingFaceSource(
        rows=rows.with_format("arrow"),
        roots=roots,
        image=image,
        caption=caption,
        captions=columns.captions,
        units=cut("rows", len(rows), unit_samples),
        fingerprint=fingerprint_of(facts),
        ignored={},
    )
