"""WebDataset tars as a source: members of one sample stand together and share their name up to the first dot.

Python's reader takes a damaged header for the end of the archive and says nothing. So after it stops, what is left is
compared with the zeros that an archive ends with: if there is more, the damage is counted and the walk goes on at the
next header whose checksum holds. How many samples such a gap held is estimated by its bytes. Of an archive that ends
early, or of which nothing can be read, nobody knows how many are lost.
"""

import os
import tarfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ecdit_ds.data.sources.bad_sample import AMBIGUOUS, BadSample, BadSampleReason, SystemFile
from ecdit_ds.data.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    Columns,
    RawSample,
    Unit,
    fingerprint_of,
    json_object,
    kind_of_ignored,
    kind_of_other,
    plain_caption,
    plain_name,
    samples_of,
    stamps_of,
    telling,
    with_names,
)
from ecdit_ds.data.sources.images import MAX_FILE_BYTES
from ecdit_ds.errors import DataError
from ecdit_ds.files.durable import plain_file

_BLOCK = tarfile.BLOCKSIZE
_END_BYTES = 2 * _BLOCK
"""Size of the end mark, which is zeros."""
_COMPRESSED = (b"\x1f\x8b", b"BZh91AY&SY", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
"""What files of gzip, bzip2, xz and Zstandard begin with."""
_LOOKING_THREADS = 16
_FAILURES = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError)
_MAX_SAMPLE_BYTES = 2 * MAX_FILE_BYTES
"""What all members of one sample may have, since they are held together."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file of an archive."""

    name: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Bytes of an archive that no member could be read from."""

    start: int
    stop: int
    is_end: bool = False
    """Whether the archive ends in it, without its end mark; what should have followed is lost too."""


@dataclass
class _Group:
    """The members of one sample."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    """Content by suffix."""


@dataclass(frozen=True, kw_only=True)
class TarSource:
    """WebDataset tars, each a unit; an `ImageSource`."""

    root: Path
    units: Sequence[Unit]
    fingerprint: str
    ignored: Mapping[str, int]
    columns: Columns
    kind: str = "WebDataset tars"
    reads_singly: bool = False
    revision: str | None = None

    def read(self, unit: Unit) -> Iterator[RawSample | BadSample | SystemFile]:
        """Yield the samples of a tar in order, or why they are none."""
        seen: set[str] = set()
        group: _Group | None = None
        is_cut = False
        for member in walk_tar(self.root / unit.name):
            if isinstance(member, Gap):
                is_cut = member.is_end
                yield _bad_of(member, unit, len(seen) + (group is not None))
                continue
            if isinstance(member, BadSample):
                yield member
                continue
            path = PurePosixPath(member.name)
            ignored = kind_of_ignored(path)
            if ignored is not None:
                yield SystemFile(kind=ignored)
                continue
            stem, _, suffix = path.name.partition(".")
            key = str(path.parent / stem)
            if group is not None and group.key != key:
                yield from self._finish(group, unit, seen)
                group = None
            if group is None:
                group = _Group(key=key)
            if suffix.lower() in group.parts:
                yield BadSample(cause="duplicate key", name=f"{unit.name}/{member.name}")
            elif sum(map(len, group.parts.values())) + len(member.content) > _MAX_SAMPLE_BYTES:
                yield BadSample(cause="too many bytes", name=f"{unit.name}/{member.name}")
            else:
                group.parts[suffix.lower()] = member.content
        if group is not None:
            last = self._finish(group, unit, seen)
            # What a cut leaves of its last sample was counted with the cut.
            yield from (one for one in last if not is_cut or not isinstance(one, BadSample))

    def _finish(self, group: _Group, unit: Unit, seen: set[str]) -> Iterator[RawSample | BadSample | SystemFile]:
        name = f"{unit.name}/{group.key}"
        if group.key in seen:
            yield BadSample(cause="duplicate key", name=name)
            return
        if self._is_of_other_kinds(group):
            stem = PurePosixPath(group.key)
            names = (stem.with_name(f"{stem.name}.{suffix}" if suffix else stem.name) for suffix in group.parts)
            yield from (SystemFile(kind=kind_of_other(name)) for name in names)
            return
        seen.add(group.key)
        asked = self.columns.image and self.columns.image.lower().removeprefix(".")
        images = [suffix for suffix in group.parts if (suffix == asked if asked else _is_picture(suffix))]
        image: bytes | BadSampleReason = group.parts[images[0]] if images else "no image"
        captions = self._captions(group, name)
        if len(images) > 1:
            yield BadSample(cause="several pictures", name=with_names(name, images))
        elif isinstance(captions, BadSample):
            yield captions
        elif len({repr(plain_caption(caption)) for caption in captions.values()}) > 1:
            yield BadSample(cause="several captions", name=with_names(name, captions))
        else:
            shown = with_names(name, group.parts) if asked and not images else name
            yield from self.columns.captions.samples(shown, image, next(iter(captions.values()), None))

    def _is_of_other_kinds(self, group: _Group) -> bool:
        """Return whether no member is a picture or a caption; JSON alone describes no sample, but the set perhaps."""
        asked = {name.lower().removeprefix(".") for name in (self.columns.image, self.columns.caption) if name}
        if any(_is_picture(suffix) or suffix in CAPTION_COLUMNS or suffix in asked for suffix in group.parts):
            return False
        return "json" not in group.parts or len(group.parts) == 1

    def _captions(self, group: _Group, sample: str) -> dict[str, object] | BadSample:
        """Return what may be meant, by where it stands; of what was asked for, a file comes before a field of JSON."""
        asked = [self.columns.caption.removeprefix(".")] if self.columns.caption else list(CAPTION_COLUMNS)
        content = {name: group.parts[name.lower()] for name in asked if name.lower() in group.parts}
        in_file = self.columns.captions.in_file
        found: dict[str, object] = {
            name: in_file(text.decode("utf-8", "surrogateescape")) for name, text in content.items()
        }
        if "json" not in group.parts or (found and self.columns.caption):
            return found
        parsed = json_object(group.parts["json"])
        if parsed is None:
            return telling(found) or BadSample(cause="caption is not text", name=sample)
        fields, repeated = parsed
        meant = [name for name in fields if (name in asked if self.columns.caption else plain_name(name) in asked)]
        twice = [name for name in repeated if name in meant or not found]
        if twice:
            return BadSample(cause="name given twice", name=with_names(sample, twice))
        return telling(found | {f"{name} in json": fields[name] for name in meant if fields[name] is not None})


def _is_picture(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES


def _bad_of(gap: Gap, unit: Unit, samples: int) -> BadSample:
    """Return what a gap costs: its bytes over the mean bytes of the `samples` before it, at least one."""
    name = f"{unit.name} at byte {gap.start}"
    if gap.is_end:
        return BadSample(cause="archive ends early", name=name)
    if not samples:
        return BadSample(cause="unreadable archive", name=name)
    lost = (gap.stop - gap.start) * samples // gap.start
    return BadSample(cause="damaged archive", name=name, samples=max(1, lost))


def open_tars(root: Path, files: Sequence[Path], *, columns: Columns, ignored: Mapping[str, int]) -> TarSource:
    """Open tars below a folder.

    Args:
        root: resolved.
        files: relative to it, sorted.

    Raises:
        DataError: one is a link that leads out of the folder, or the first sample leaves open what of it is meant.
    """
    for file in files:
        if not (root / file).resolve().is_relative_to(root):
            raise DataError(f"{root / file}: is a link out of {root}; copy the tar there, or leave it out")
    with ThreadPoolExecutor(_LOOKING_THREADS) as pool:
        packed = [
            file
            for file, is_packed in zip(files, pool.map(_is_compressed, map(root.joinpath, files)), strict=True)
            if is_packed
        ]
    if packed:
        raise DataError(
            f"{root / packed[0]}: is compressed, as are {len(packed)} of {len(files)} tars; unpack it first"
        )
    source = TarSource(
        root=root,
        units=[Unit(name=str(file)) for file in files],
        fingerprint=fingerprint_of(stamps_of(root, files)),
        ignored=ignored,
        columns=columns,
    )
    # Later ones are counted as bad. That all are is better told before any work, with the way out.
    samples = samples_of(source, source.units[0])
    first = next((one for one in samples if isinstance(one, RawSample) or one.cause in AMBIGUOUS), None)
    if isinstance(first, BadSample):
        flag = "--image-column" if first.cause == "several pictures" else "--caption-column"
        raise DataError(f"{root / first.name}: {first.cause}; name one by {flag}")
    return source


def _is_compressed(path: Path) -> bool:
    try:
        with plain_file(path).open("rb") as file:
            return file.read(_BLOCK).startswith(_COMPRESSED)
    except OSError:  # told when it is read
        return False


def walk_tar(path: Path) -> Iterator[Member | BadSample | Gap]:
    """Yield the files of an archive in order, and everything that is wrong with it.

    Links, devices, absolute names and names with `..` are refused; folders are no samples.
    """
    try:
        file = plain_file(path).open("rb")
    except OSError:
        yield BadSample(cause="unreadable archive", name=path.name)
        return
    with file:
        size, start = os.fstat(file.fileno()).st_size, 0
        while True:
            stopped = yield from _walk_from(file, path.name, start, size)
            if _is_zero_from(file, stopped):
                if size - stopped < _END_BYTES:
                    yield Gap(start=min(stopped, size), stop=size, is_end=True)
                return
            found = _next_header(file, stopped + _BLOCK, size)
            if found is None:
                is_end = not _is_zero_from(file, max(0, size - _END_BYTES))
                yield Gap(start=stopped, stop=size, is_end=is_end)
                return
            yield Gap(start=stopped, stop=found)
            start = found


def _walk_from(file: BinaryIO, archive: str, start: int, size: int) -> Generator[Member | BadSample, None, int]:
    """Yield the members from a place on; return where the reader stopped."""
    file.seek(start)
    stopped = start
    try:
        with tarfile.TarFile(fileobj=file, mode="r", errorlevel=0) as tar:
            stopped = max(start, tar.offset)
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # or it would keep every header of the archive
                if info.size < 0 or tar.offset < stopped:  # Python's reader would go back, and round for ever
                    break
                entry = _read_member(tar, info, archive, size)
                if entry is not None:
                    yield entry
                stopped = tar.offset
            else:
                stopped = tar.offset
    except _FAILURES:
        pass
    return stopped


def _read_member(tar: tarfile.TarFile, info: tarfile.TarInfo, archive: str, size: int) -> Member | BadSample | None:
    name = f"{archive}/{info.name}"
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or "\x00" in info.name:
        return BadSample(cause="outside the source", name=name)
    if info.isdir():
        return None
    if not info.isreg() or info.issparse():  # holes take no room in the archive, but all that they say in memory
        return BadSample(cause="no regular file", name=name)
    if info.size > MAX_FILE_BYTES:
        return BadSample(cause="too many bytes", name=name)
    try:
        reader = tar.extractfile(info)
        content = reader.read() if reader else b""
    except _FAILURES:
        content = b""
    if len(content) != info.size:
        # Where the file ends within this member, that is told once, at the end.
        return None if tar.offset > size else BadSample(cause="damaged archive", name=name)
    return Member(name=str(path), content=content)


def _is_zero_from(file: BinaryIO, start: int) -> bool:
    """Return whether all bytes from `start` on are zero."""
    file.seek(start)
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            return False
    return True


def _next_header(file: BinaryIO, start: int, size: int) -> int | None:
    """Return where the next header with a right checksum begins."""
    for place in range(start, size - _BLOCK + 1, _BLOCK):
        file.seek(place)
        block = file.read(_BLOCK)
        if block[257:262] != b"ustar":
            continue
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError:
            continue
        return place
    return None
