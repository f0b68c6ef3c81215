"""Files that are read by position, a range or a box of a tensor at a time, so that memory does not grow with the file.

A file is open only while something is read from it: a checkpoint may have more files than a process may open.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.errors import CheckpointError

CHUNK_BYTES = 4 * 2**20


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system refuses into one line that begins with the path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def require_plain_file(path: Path) -> None:
    """Refuse a pipe or a device, from which reading might never end; what cannot be seen is found by opening it.

    Raises:
        CheckpointError: naming it.
    """
    with suppress(OSError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is no plain file; use another checkpoint")


class RangedFile:
    """A file to read from, by any number of threads.

    Raises:
        CheckpointError: it is no plain file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_plain_file(path)

    def _open(self) -> FileIO:
        with reading(self.path):
            return self.path.open("rb", buffering=0)

    def _read_exactly(self, file: FileIO, into: memoryview, position: int) -> None:
        done = 0
        while done < len(into):
            with reading(self.path):
                count = os.preadv(file.fileno(), [into[done:]], position + done)
            if count == 0:
                raise CheckpointError(f"{self.path}: ends early, at byte {position + done}; use another checkpoint")
            done += count

    def _chunks(self, file: FileIO, begin: int, nbytes: int) -> Iterator[memoryview]:
        """Yield bytes in order; each part is valid until the next is asked for."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, nbytes)))
        for start in range(0, nbytes, CHUNK_BYTES):
            part = buffer[: nbytes - start]
            self._read_exactly(file, part, begin + start)
            yield part

    def _xxh3(self, file: FileIO, begin: int, nbytes: int) -> str:
        digest = xxhash.xxh3_64()
        for part in self._chunks(file, begin, nbytes):
            digest.update(part)
        return digest.hexdigest()

    def _read_box(self, file: FileIO, begin: int, shape: tuple[int, ...], box: Box, out: Tensor) -> None:
        """Fill `out` with a box of the row-major tensor of `shape` that begins at byte `begin`.

        Of what is not in the box, at most a chunk is held.
        """
        first, row_bytes = sum(box.offset[:1]), math.prod(shape[1:]) * out.itemsize
        if box.shape[1:] == shape[1:]:
            self._read_exactly(file, bytes_of(out), begin + first * row_bytes)
            return
        inner = Box(box.offset[1:], box.shape[1:])
        if row_bytes > CHUNK_BYTES:
            for row, into in enumerate(out, start=first):
                self._read_box(file, begin + row * row_bytes, shape[1:], inner, into)
            return
        for rows in out.split(CHUNK_BYTES // row_bytes):
            # Whole rows, then what is wanted of them: many small reads would take longer.
            whole = torch.empty((len(rows), *shape[1:]), dtype=out.dtype)
            self._read_exactly(file, bytes_of(whole), begin + first * row_bytes)
            rows.copy_(whole[:, *inner.within((0,) * len(inner.shape))])
            first += len(rows)


def bytes_of(data: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy."""
    return data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else memoryview(b"")
