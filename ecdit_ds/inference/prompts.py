"""Where prompts come from: files and columns of data sets."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ecdit_ds.data.sources.tables import check_packing
from ecdit_ds.errors import DataError

_LOADERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_TABLES = _LOADERS.keys() - {".jsonl"} | {".tsv", ".arrow"}
_MAX_BYTES = 2**28
"""Most bytes of prompts; a million of them take a quarter of it."""
_SPACE = re.compile(r"\s*")


def require_words(prompts: Sequence[str]) -> None:
    """Refuse prompts that say nothing: pictures of no text are asked for by a guidance of 0.

    Raises:
        DataError: naming the first.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise DataError(f"prompt {number} of {len(prompts)}: {prompt!r} is empty; say what to draw")


def read_prompt_file(path: Path) -> list[tuple[str, int | None]]:
    """Return (prompt, seed or None) of each line: a prompt a line, or JSON lines where the name ends in .jsonl.

    Empty lines of a text file are skipped.

    Raises:
        DataError: the file cannot be read, holds nothing, or has a bad line (named).
    """
    if path.suffix.lower() in _TABLES:
        mend = f"--dataset {path} reads it" if path.suffix in _LOADERS else "write its prompts into a text file"
        raise DataError(f"{path}: is a table, whose lines are no prompts; {mend}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path}: holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [(line, None) for _, line in numbered]
    return [_from_json(line, f"{path} line {number}") for number, line in numbered]


def read_dataset_prompts(name: str, column: str, split: str) -> list[str]:
    """Return a column of texts of a data set.

    Args:
        name: a folder that `datasets` saved, a parquet, csv or json file, or a name on the hub.
        column: of texts.
        split: such as train; a saved folder of one split has none.

    Raises:
        DataError: no such data set, split or column, or a column of other things.
    """
    import datasets  # takes seconds, and few prompts come from one

    from ecdit_ds.data.sources.dataset_rows import checked_table, load_saved

    path = Path(name)
    if path.is_file() and path.suffix not in _LOADERS:
        raise DataError(f"--dataset {name}: is none of {', '.join(_LOADERS)}; name its kind, or use --prompts")
    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            found: Any = load_saved(path.resolve(), split)[0]
        elif path.is_file():
            _refuse_lost_columns(path, column)
            found = datasets.load_dataset(_LOADERS[path.suffix], data_files={split: str(path)})
        else:
            found = datasets.load_dataset(name)
    except Exception as error:  # each kind of file has errors of its own
        raise DataError(f"--dataset {name}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    if isinstance(found, dict):
        if split not in found:
            raise DataError(f"--dataset {name}: has no split {split}; choose from {', '.join(map(str, found))}")
        found = found[split]
    if column not in found.column_names:
        raise DataError(f"--dataset {name}: has no column {column}; choose from {', '.join(found.column_names)}")
    try:
        table = checked_table(found.select_columns([column]).with_format("arrow"), 0, len(found))
        if table.nbytes > _MAX_BYTES:
            raise ValueError(f"it has {table.nbytes:,} bytes, more than {_MAX_BYTES:,}; split the table")
        told = table.column(column).to_pylist()
    except (ValueError, OSError) as error:
        raise DataError(f"--dataset {name}: column {column} is damaged: {' '.join(str(error).split())[:200]}") from None
    texts = [text.removeprefix("\ufeff") if isinstance(text, str) else text for text in told]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"--dataset {name}: row {row} of column {column} is {type(text).__name__}, not text")
    if not texts:
        raise DataError(f"--dataset {name}: has no rows")
    return texts


def _refuse_unpacked(path: Path, column: str) -> None:
    """Refuse a table whose texts are far larger than its file, such as one text in a million rows.

    Raises:
        ValueError: telling how large.
    """
    total = 0
    with pq.ParquetFile(path, read_dictionary=[column]) as file:
        check_packing(file.metadata, (column,))
        for batch in file.iter_batches(columns=[column]):
            texts = batch.column(0)
            words = texts.dictionary if pa.types.is_dictionary(texts.type) else texts
            if not (pa.types.is_string(words.type) or pa.types.is_large_string(words.type)):
                return  # and refused by what it is
            lengths = pc.binary_length(words)
            total += pc.sum(lengths.take(texts.indices) if words is not texts else lengths).as_py() or 0
            if total > _MAX_BYTES:
                raise ValueError(f"column {column} unpacks to more than {_MAX_BYTES:,} bytes; split the table")


def _refuse_lost_columns(path: Path, column: str) -> None:
    """Refuse a table that `datasets` would read, but not as it is: a column twice, or values under another's name.

    Raises:
        ValueError: it is such a table; names both places.
    """
    names: list[str] = []
    if path.suffix == ".parquet":
        names = pq.read_schema(path).names
        if names.count(column) == 1:
            _refuse_unpacked(path, column)
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                names = next(reader, [])
                for row in reader:
                    if len(row) > len(names):
                        raise ValueError(
                            f"line {reader.line_num} has {len(row)} fields, the head line has {len(names)}"
                        )
            except csv.Error as error:
                raise ValueError(f"{error} by line {reader.line_num}; is a quotation mark left open?") from None
    else:
        for names in _names_in_json(path.read_text(encoding="utf-8-sig")):
            if names.count(column) > 1:
                break
    if names.count(column) > 1:
        places = " and ".join(str(i) for i, name in enumerate(names, 1) if name == column)
        raise ValueError(f"column {column} comes twice (as column {places}); rename one")


def _names_in_json(text: str) -> Iterator[list[str]]:
    """Yield the names of every object in a file of JSON or JSON lines, as often as they come."""
    found: list[list[str]] = []
    decoder, place = json.JSONDecoder(object_pairs_hook=lambda pairs: found.append([name for name, _ in pairs])), 0
    while place < len(text):
        _, place = decoder.raw_decode(text, place)
        place = _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing, too
        yield from found
        found.clear()


def _from_json(line: str, where: str) -> tuple[str, int | None]:
    try:
        data = json.loads(line)
        for names in _names_in_json(line):
            if len(set(names)) < len(names):
                raise DataError(f"{where}: gives a name twice ({', '.join(names)}); keep one of each")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}") from None
    prompt, seed = (data.get("prompt"), data.get("seed")) if isinstance(data, dict) else (None, None)
    if not isinstance(prompt, str):
        raise DataError(f'{where}: has no "prompt" with a text')
    if seed is not None and (type(seed) is not int or seed < 0):
        raise DataError(f"{where}: seed is {seed!r}, not a whole number from 0 on")
    return prompt, seed
