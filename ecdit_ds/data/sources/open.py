"""From what a user names to a source: a folder, a list, Parquet files, tars, or a Hugging Face dataset."""

import re
from collections import Counter
from pathlib import Path

from ecdit_ds.data.sources.base import IMAGE_SUFFIXES, Columns, ImageSource, files_below, kind_of_other
from ecdit_ds.data.sources.image_lists import LIST_SUFFIXES, open_folder, open_list
from ecdit_ds.data.sources.tables import open_parquet
from ecdit_ds.data.sources.tars import open_tars
from ecdit_ds.errors import DataError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def open_source(
    name: str,
    *,
    unit_samples: int,
    columns: Columns | None = None,
    split: str | None = None,
    images: Path | None = None,
) -> ImageSource:
    """Open what a user names.

    Args:
        name: a folder, a `.csv`, `.tsv`, `.jsonl`, `.parquet` or `.tar` file, or a dataset's name on the hub.
        unit_samples: samples of a unit of work, where the source can be cut; a tar is a unit.
        columns: which to read of a table; by default the usual names.
        split: of a Hugging Face dataset; `train` by default.
        images: what paths in a list are relative to; by default the list's folder.

    Raises:
        DataError: there is no such thing, or it cannot be read as a whole.
    """
    columns = columns or Columns()
    path = Path(name).absolute()
    if images is not None and path.suffix.lower() not in LIST_SUFFIXES:
        raise DataError(f"{name}: is no list ({', '.join(LIST_SUFFIXES)}), so --images {images} has no effect on it")
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if split is not None and path.exists() and not is_saved:
        raise DataError(f"{name}: has no splits, so --split {split} has no effect on it; leave it out")
    if path.is_file():
        return _open_file(path.resolve(), unit_samples, columns, images)
    if is_saved or not path.is_dir():
        return _open_dataset(path.resolve() if is_saved else None, name, split, unit_samples, columns)
    root = path.resolve()

    files, _links, system_files = files_below(root)
    packed = [file for file in files if file.name.lower().endswith(_COMPRESSED_TARS)]
    if packed:
        raise DataError(f"{root / packed[0]}: is a compressed tar, and {len(packed)} of them are here; unpack it first")
    of_kind = {
        kind: [file for file in files if file.suffix.lower() in suffixes]
        for kind, suffixes in (("tars", (".tar",)), ("Parquet files", (".parquet",)), ("pictures", IMAGE_SUFFIXES))
    }
    kinds = [kind for kind, found in of_kind.items() if found]
    if len(kinds) > 1:
        counts = " and ".join(f"{len(of_kind[kind])} {kind}" for kind in kinds)
        raise DataError(f"{root}: holds {counts}; name a folder that holds one kind, so that none is left out unseen")
    wanted = of_kind[kinds[0]] if kinds else []
    is_wanted = set(wanted)
    ignored = system_files + Counter(kind_of_other(file) for file in files if file not in is_wanted)
    if kinds == ["tars"]:
        return open_tars(root, wanted, columns=columns, ignored=ignored)
    if kinds == ["Parquet files"]:
        return open_parquet(root, wanted, unit_samples=unit_samples, columns=columns, ignored=ignored)
    return open_folder(root, unit_samples=unit_samples, columns=columns)


def _open_dataset(root: Path | None, name: str, split: str | None, unit_samples: int, columns: Columns) -> ImageSource:
    from ecdit_ds.data.sources.dataset_rows import open_hub, open_saved

    if root is not None:
        return open_saved(root, split, unit_samples=unit_samples, columns=columns)
    if not _HUB_NAME.fullmatch(name):
        raise DataError(f"{name}: is no file or folder, nor can it be a dataset's name on the hub")
    return open_hub(name, split or "train", unit_samples=unit_samples, columns=columns)


def _open_file(path: Path, unit_samples: int, columns: Columns, images: Path | None) -> ImageSource:
    suffix, name = path.suffix.lower(), Path(path.name)
    if suffix in LIST_SUFFIXES:
        root = (images or path.parent).resolve()
        return open_list(path, root, unit_samples=unit_samples, columns=columns)
    if suffix == ".tar":
        return open_tars(path.parent, [name], columns=columns, ignored={})
    if suffix == ".parquet":
        return open_parquet(path.parent, [name], unit_samples=unit_samples, columns=columns, ignored={})
    raise DataError(f"{path}: is of no known kind ({', '.join((*LIST_SUFFIXES, '.parquet', '.tar'))}, or a folder)")
