"""Writing so that it is still there after the power fails: `fsync`, then rename, then `fsync` of the folder."""

import os
from pathlib import Path


def put_on_disk(path: Path) -> None:
    """Return once a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and put it on the disk; after a crash it may be there in part."""
    path.write_bytes(content)
    put_on_disk(path)


def replace_durably(path: Path, content: bytes) -> None:
    """Put a file in the place of another: after a crash either is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    write_durably(temporary, content)
    os.replace(temporary, path)
