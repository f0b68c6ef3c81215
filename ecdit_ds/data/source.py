"""What every source of pictures with captions is: units of work, each of which gives samples or says why not.

A unit is read anew as often as it is asked for and gives the same each time, so work can be dealt out, killed and
taken up again. Nothing is read outside the source's folder, whatever a link or a name in a file says.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from ecdit_ds.data.causes import BadSample, Cause
from ecdit_ds.data.images import MAX_FILE_BYTES
from ecdit_ds.errors import DataError

IMAGE_COLUMNS = ("image", "image_path", "path", "file_name", "filename", "file", "filepath", "img", "jpg", "png")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description", "captions", "txt")
KEY_COLUMNS = ("key", "__key__", "id")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
_STAMP_THREADS = 16
_STAMPS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """An image file's bytes and its caption, neither looked at yet."""

    key: str
    content: bytes
    caption: str


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a source that is worked on at once."""

    name: str
    """The file it is of, relative to the source."""
    start: int = 0
    stop: int = -1
    """Samples `start` to `stop`, without `stop`; -1 where only reading tells how many there are."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table to read; None takes the first of the usual names."""

    image: str | None = None
    caption: str | None = None


class Source(Protocol):
    """Pictures with captions, in a fixed order."""

    @property
    def kind(self) -> str:
        """What it is, in a word or two."""

    @property
    def fingerprint(self) -> str:
        """A name of what is in it: names, sizes and times of its files; one that was touched counts as changed."""

    @property
    def units(self) -> Sequence[Unit]:
        """All of it, in order."""

    @property
    def reads_singly(self) -> bool:
        """Whether a part of a unit is read without the rest of it."""

    @property
    def ignored(self) -> Mapping[str, int]:
        """How many files of each suffix are no part of it."""

    def read(self, unit: Unit) -> Iterator[RawSample | BadSample]:
        """Yield the samples of a unit in order, or why they are none."""


def raw_sample(key: str, content: bytes | Cause, caption: Any) -> RawSample | BadSample:
    """Return a sample of what was read of it, or what is wrong with it."""
    if isinstance(content, str):
        return BadSample(cause=content, name=key)
    if isinstance(caption, list | tuple) and caption:
        caption = caption[0]
    if caption is None:
        return BadSample(cause="no caption", name=key)
    if not isinstance(caption, str) or not _is_text(caption):
        return BadSample(cause="caption is not text", name=key)
    caption = " ".join(caption.split())
    return RawSample(key=key, content=content, caption=caption) if caption else BadSample(
        cause="empty caption", name=key
    )  # fmt: skip


def _is_text(caption: str) -> bool:
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:  # bytes that were no text, kept as surrogates
        return False
    return "\x00" not in caption


def read_inside(root: Path, name: str, *, missing: Cause = "no image") -> bytes | Cause:
    """Return the content of a regular file within `root`, or why it cannot be used.

    Args:
        root: resolved.
        name: relative to it, or absolute within it; links are followed only to places within it.
        missing: the cause where there is no such file.
    """
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            return "outside the source"
        # A pipe or a device might wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                return "no regular file"
            return "too many bytes" if facts.st_size > MAX_FILE_BYTES else file.read()
    except FileNotFoundError:
        return missing
    except (OSError, ValueError, RuntimeError):
        return "no regular file"


def files_below(root: Path) -> tuple[list[Path], list[str]]:
    """Return all files below a folder, relative and sorted, and the links to folders, which are not followed.

    Hidden files and folders are not looked at.

    Raises:
        DataError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}; make it readable") from None

    files, links = [], []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        place = Path(folder)
        links += [str((place / name).relative_to(root)) for name in subfolders if (place / name).is_symlink()]
        files += [(place / name).relative_to(root) for name in names if not name.startswith(".")]
    return sorted(files, key=str), sorted(links)


def stamps_of(root: Path, files: Sequence[Path | str]) -> list[tuple[str, int, int]]:
    """Return name, size and time of change (ns) of files, for a fingerprint; -1 of one that cannot be looked at."""

    def look(names: Sequence[Path | str]) -> list[tuple[str, int, int]]:
        return [_stamp_of(root, str(name)) for name in names]

    parts = [files[start : start + _STAMPS_AT_ONCE] for start in range(0, len(files), _STAMPS_AT_ONCE)]
    with ThreadPoolExecutor(_STAMP_THREADS) as pool:  # a file of a network's takes a round trip
        return [stamp for part in pool.map(look, parts) for stamp in part]


def _stamp_of(root: Path, name: str) -> tuple[str, int, int]:
    try:
        facts = os.stat(os.path.join(root, name))
    except (OSError, ValueError):
        return name, -1, -1
    return name, facts.st_size, facts.st_mtime_ns


def fingerprint_of(facts: Iterable[object]) -> str:
    """Return a name of some facts, alike for equal ones."""
    state = xxhash.xxh3_128()
    for fact in facts:
        state.update(repr(fact).encode("utf-8", "backslashreplace") + b"\n")
    return state.hexdigest()


def choose_column(names: Sequence[str], asked: str | None, usual: Sequence[str], where: str, what: str) -> str:
    """Return which column to read: what was asked for, or the first of the usual names.

    Raises:
        DataError: there is no such column; names those that there are.
    """
    lower = {name.lower(): name for name in reversed(names)}
    found = asked if asked in names else None if asked else next((lower[u] for u in usual if u in lower), None)
    if found is None:
        wanted = f"column {asked!r}" if asked else f"column of {what}s ({', '.join(usual)})"
        raise DataError(f"{where}: has no {wanted}; it has {', '.join(map(str, names))}; name one by --{what}-column")
    return found


def cut(name: str, count: int, size: int) -> list[Unit]:
    """Return units of `size` samples of a file, the last one shorter."""
    return [Unit(name=name, start=start, stop=min(start + size, count)) for start in range(0, count, size)]
