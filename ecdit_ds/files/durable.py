"""Writing so that it is still there after the power fails: `fsync`, then rename, then `fsync` of the folder.

A file's content is on the disk once the file was synced, its name once its folder was, and a new folder's name once
that one's was. So whatever is put in its place by a rename is synced before, and the folder that it comes to after:
checkpoints and `latest`, recipe and logs as a life begins, encoded sets with their plan and records, converted folders,
tables of verdicts, statistics, plans, pictures. Written in place, with a name that is synced too: the lease, and the
lives of a job.

A file that is written in place is opened by `own_file`, which follows no link: a folder that was unpacked or is
shared may hold one to anything. All others are made anew.

Not promised, since it is made again or missed by nobody: what is appended between two renames (`metrics.jsonl`, rows of
one process of a ledger, TensorBoard), notes on a conversion's files, locks, and that what was removed stays away.
"""

import errno
import os
import stat
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import IO

_WRITE_BYTES = 2**20  # a page cache that takes 4 MiB at once may take them ten times as long (docs/LOG.md)


def put_on_disk(path: Path) -> None:
    """Return once a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # which some network file systems say of every folder
            raise
    finally:
        os.close(descriptor)


def plain_file(path: Path) -> Path:
    """Return a path that may be opened and read to its end: a pipe of that name might keep a reader for ever.

    Raises:
        OSError: it is one, or a device.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is no plain file", str(path))
    return path


def make_folders(folder: Path) -> None:
    """Make a folder that may be there already, and its parents, with names that are on the disk.

    Raises:
        OSError: as `Path.mkdir`.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        put_on_disk(made.parent)


def open_new(path: Path) -> FileIO:
    """Open a new file for writing; what had its name is unlinked before, so a link is removed and never followed."""
    path.unlink(missing_ok=True)
    return path.open("xb", buffering=0)


def own_file(path: str, flags: int) -> int:
    """Open a file that is written in place, as an `opener` of `open`; a link of either kind is refused, not followed.

    Raises:
        OSError: it cannot be opened, or is a link, or no regular file.
    """
    return _open_own(path, flags, 0o666)


def private_file(path: str, flags: int) -> int:
    """Open a file that processes lock, as `own_file`; none but its owner may open it, and so none else may lock it."""
    descriptor = _open_own(path, flags, 0o600)
    if os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, 0o600)  # one that is there already
    return descriptor


def _open_own(path: str, flags: int, mode: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "is a link, through which nothing is written; remove it", path) from None
    facts = os.fstat(descriptor)
    if stat.S_ISREG(facts.st_mode) and facts.st_nlink < 2:
        return descriptor
    os.close(descriptor)
    why = "is a hard link; make it a copy" if stat.S_ISREG(facts.st_mode) else "is no regular file; remove it"
    raise OSError(errno.EINVAL, why, path)


def is_still(file: IO[str], path: Path) -> bool:
    """Return whether a path names an open file, and not none or another: who waited for its lock may find it gone."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Write all of `content`, however little the system takes at once."""
    left = memoryview(content)
    while left:
        left = left[file.write(left[:_WRITE_BYTES]) :]


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and put its content on the disk; after a crash it may be there in part, or not at all."""
    with open_new(path) as file:
        write_all(file, content)
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Put a file in the place of another and return when it is on the disk; after a crash either is there, whole.

    Raises:
        OSError: it cannot be written; the other one is untouched, and nothing is left beside it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    put_on_disk(path.parent)
