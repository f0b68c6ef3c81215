"""Writing so that it is still there after the power fails: `fsync`, then rename, then `fsync` of the folder."""

import os
from io import FileIO
from pathlib import Path

_WRITE_BYTES = 2**20  # a page cache that takes 4 MiB at once may take them ten times as long (docs/LOG.md)


def put_on_disk(path: Path) -> None:
    """Return once a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_new(path: Path) -> FileIO:
    """Open a new file for writing; what had its name is unlinked before, so a link is removed and never followed."""
    path.unlink(missing_ok=True)
    return path.open("xb", buffering=0)


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Write all of `content`, however little the system takes at once."""
    left = memoryview(content)
    while left:
        left = left[file.write(left[:_WRITE_BYTES]) :]


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and put it on the disk; after a crash it may be there in part."""
    with open_new(path) as file:
        write_all(file, content)
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Put a file in the place of another: after a crash either is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    write_durably(temporary, content)
    os.replace(temporary, path)
