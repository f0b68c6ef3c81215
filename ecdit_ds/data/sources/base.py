"""What every source of pictures with captions is: units of work, each of which gives samples or says why not.

A unit is read anew as often as it is asked for and gives the same each time, so work can be dealt out, killed and
taken up again. Nothing is read outside the source's folder, whatever a link or a name in a file says.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, Literal, Protocol, get_args

import xxhash

from ecdit_ds.data.sources.bad_sample import BadSample, BadSampleReason, SystemFile
from ecdit_ds.data.sources.images import MAX_FILE_BYTES
from ecdit_ds.errors import DataError
from ecdit_ds.seeding import stable_seed

IMAGE_COLUMNS = ("image", "image_path", "path", "file_name", "filename", "file", "filepath", "img", "jpg", "png")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description", "captions", "txt")
KEY_COLUMNS = ("key", "__key__", "id")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
_SYSTEM_FILES = (
    "._*",
    ".DS_Store",
    "__MACOSX",
    "Thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "@eaDir",
    "PaxHeader",
    "PaxHeaders.*",
    "$RECYCLE.BIN",
    "System Volume Information",
    "Icon\r",
)
"""What macOS, Windows, network drives and unpackers leave beside files: names of files or of folders around them."""
HIDDEN = ".*"
_STAMP_THREADS = 16
_STAMPS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """An image file's bytes and its caption, neither looked at yet."""

    key: str
    content: bytes
    caption: str
    converted: tuple[str, ...] = ()
    """What was chosen or changed to get here, for the report."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a source that is worked on at once."""

    name: str
    """The file it is of, relative to the source."""
    start: int = 0
    stop: int = -1
    """Samples `start` to `stop`, without `stop`; -1 where only reading tells how many there are."""


Choice = Literal["first", "random", "all"]
CHOICES: tuple[Choice, ...] = get_args(Choice)


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Which of a picture's captions to take where a list, the lines of a text file or rows of a list hold several."""

    choice: Choice | None = None
    """None takes the first of a list, all lines of a text file as one, and a list's second row for a duplicate."""
    seed: int = 0
    """Seed of `random`; with the sample's key it fixes the caption, whoever reads it and whenever."""

    def in_file(self, text: str) -> Any:
        """Return what a text file says: a caption, or one a line."""
        lines = [line for line in text.split("\n") if line.strip()] if self.choice else []
        return lines or text

    def samples(self, key: str, content: bytes | BadSampleReason, caption: Any) -> list[RawSample | BadSample]:
        """Return the samples of a picture, one unless all captions are taken; captions that say nothing are passed over
        where another one does."""
        if self.choice is None or isinstance(content, str) or not isinstance(caption, list | tuple):
            return [raw_sample(key, content, caption)]
        said = (
            plain for each in caption if isinstance(plain := plain_caption(each), str) and plain and _is_text(plain)
        )
        several = list(dict.fromkeys(said))
        if self.choice == "all" and len(several) > 1:
            told = ("each of several captions",)
            return [
                RawSample(key=f"{key}#{i}", content=content, caption=one, converted=told)
                for i, one in enumerate(several)
            ]
        if self.choice == "random" and len(several) > 1:
            one = several[stable_seed(self.seed, "caption", key) % len(several)]
            return [RawSample(key=key, content=content, caption=one, converted=("one of several captions",))]
        return [raw_sample(key, content, several or caption)]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table to read, or files of a tar's samples; None takes the only one of the usual names."""

    image: str | None = None
    caption: str | None = None
    captions: Captions = Captions()
    """Which of those that the column holds."""


class ImageSource(Protocol):
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

    @property
    def revision(self) -> str | None:
        """The commit that it is of, where the hub gave it and says so."""

    def read(self, unit: Unit) -> Iterator[RawSample | BadSample | SystemFile]:
        """Yield the samples of a unit in order, or why they are none, and what else lies between them."""


def samples_of(source: ImageSource, unit: Unit) -> Iterator[RawSample | BadSample]:
    """Yield the samples of a unit alone, or why they are none."""
    return (one for one in source.read(unit) if not isinstance(one, SystemFile))


def raw_sample(key: str, content: bytes | BadSampleReason, caption: Any) -> RawSample | BadSample:
    """Return a sample of what was read of it, or what is wrong with it."""
    if isinstance(content, str):
        return BadSample(cause=content, name=key)
    is_one_of_several = isinstance(caption, list | tuple) and len(caption) > 1
    caption = plain_caption(caption)
    if caption is None:
        return BadSample(cause="no caption", name=key)
    if not isinstance(caption, str) or not _is_text(caption):
        return BadSample(cause="caption is not text", name=key)
    if not caption:
        return BadSample(cause="empty caption", name=key)
    told = ("first of several captions",) if is_one_of_several else ()
    return RawSample(key=key, content=content, caption=caption, converted=told)


def plain_caption(caption: Any) -> Any:
    """Return a caption, or the first of a list, without byte order marks and needless spaces; no text as it is."""
    if isinstance(caption, list | tuple) and caption:
        caption = caption[0]
    return " ".join(caption.replace("\ufeff", "").split()) if isinstance(caption, str) else caption


def telling(captions: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of several captions, by where they stand, that say something; if none does, the first."""
    said = {
        where: caption
        for where, caption in captions.items()
        if isinstance(plain := plain_caption(caption), str) and plain
    }
    return said or dict(list(captions.items())[:1])


def _is_text(caption: str) -> bool:
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:  # bytes that were no text, kept as surrogates
        return False
    return "\x00" not in caption


def json_object(content: bytes) -> tuple[dict[str, Any], list[str]] | None:
    """Return a JSON object and its names that come twice, of which a parser drops one unseen; None where it is none.

    Names within its values are not looked at: nothing reads them.
    """
    repeated: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        # An object ends after those in it, so what is left in the end is of the outermost.
        repeated[:] = (
            []
            if len(found) == len(pairs)
            else [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
        )
        return found

    try:
        found = json.loads(content, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        return None
    return (found, repeated) if isinstance(found, dict) else None


def with_names(sample: str, names: Iterable[str]) -> str:
    """Return a sample's name for a report, with those of its parts that are meant."""
    return f"{sample} ({', '.join(sorted(map(repr, names)))})"


def system_file(path: PurePath) -> str | None:
    """Return what kind of file that operating systems leave behind a path names, or lies in; None for all others."""
    kinds = (kind for part in path.parts for kind in _SYSTEM_FILES if fnmatchcase(part.lower(), kind.lower()))
    return next(kinds, None)


def read_inside(root: Path, name: str, *, missing: BadSampleReason = "no image") -> bytes | BadSampleReason:
    """Return the content of a regular file within `root`, or why it cannot be used.

    Args:
        root: resolved.
        name: relative to it, or absolute within it; links are followed only to places within it.
        missing: the cause where there is no such file.
    """
    if system_file(PurePath(name)):
        return "system file"
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


def files_below(root: Path) -> tuple[list[Path], list[str], Counter[str]]:
    """Return all files below a folder, relative and sorted, and the links to folders, which are not followed.

    Files that systems leave behind, and hidden files and folders, are not looked at: third, how many of each kind.

    Raises:
        DataError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}; make it readable") from None

    files, links, ignored = [], [], Counter[str]()
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        place = Path(folder)
        ignored[HIDDEN] += sum(name.startswith(".") for name in subfolders)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        links += [str((place / name).relative_to(root)) for name in subfolders if (place / name).is_symlink()]
        for file in [(place / name).relative_to(root) for name in names]:
            kind = kind_of_ignored(file)
            if kind is None:
                files.append(file)
            else:
                ignored[kind] += 1
    return sorted(files, key=str), sorted(links), +ignored


def kind_of_ignored(file: PurePath) -> str | None:
    """Return why a file is not looked at where files are found rather than named: left by a system, or hidden.

    Args:
        file: relative to the source; it is hidden where a folder around it is.
    """
    is_hidden = any(part.startswith(".") and part not in (".", "..") for part in file.parts)
    return system_file(file) or (HIDDEN if is_hidden else None)


def kind_of_other(file: PurePath) -> str:
    """Return what a file that is neither a picture nor a caption is counted as: its suffix, or else its name."""
    return file.suffix.lower() or file.name


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


def choose_column(
    names: Sequence[str],
    asked: str | None,
    usual: Sequence[str],
    where: str,
    what: str,
    held: Collection[str] = (),
) -> str:
    """Return which column to read: what was asked for, or the only one of the usual names.

    Args:
        names: of all columns in order; one may come twice.
        held: those that hold pictures by their type. They are candidates whatever they are called, and where one of
            them has a usual name, those that could hold no more than a picture's place are none.

    Raises:
        DataError: there is no such column, or several; names those that there are.
    """
    found = [name for name in names if (name == asked if asked else plain_name(name) in usual)]
    if not asked and held:
        found = [name for name in names if name in held or (name in found and not set(found) & set(held))]
    if not found:
        wanted = f"column {asked!r}" if asked else f"column of {what}s ({', '.join(usual)})"
        raise DataError(f"{where}: has no {wanted}; it has {', '.join(map(str, names))}; name one by --{what}-column")
    if len(found) > 1:
        shown = ", ".join(f"{name!r} (column {i})" for i, name in enumerate(names, 1) if name in found)
        way_out = f"name one by --{what}-column" if len(set(found)) > 1 else "rename all but one"
        raise DataError(f"{where}: has {len(found)} columns of {what}s: {shown}; {way_out}")
    return found[0]


def plain_name(name: str) -> str:
    """Return a column's name as the usual ones are written."""
    return name.replace("\ufeff", "").strip().lower()


def cut(name: str, count: int, size: int) -> list[Unit]:
    """Return units of `size` samples of a file, the last one shorter."""
    return [Unit(name=name, start=start, stop=min(start + size, count)) for start in range(0, count, size)]
