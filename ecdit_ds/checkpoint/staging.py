"""A copy of this process's pieces in host memory, so that training may go on while they are written."""

import dataclasses
from collections.abc import Iterable

import torch

from ecdit_ds.checkpoint.writer import TensorShard

_ALIGNMENT = 64


class StagingBuffer:
    """Memory that each save uses again: to copy into warm pages takes a fraction of what new ones cost.

    Args:
        pieces: such as will be copied.
        is_pinned: page-locked, which copies from a CUDA device need to run at full speed.
    """

    def __init__(self, pieces: Iterable[TensorShard], *, is_pinned: bool) -> None:
        self._buffer = torch.empty(_room_for(pieces), dtype=torch.uint8, pin_memory=is_pinned).fill_(0)

    def of(self, pieces: list[TensorShard]) -> list[TensorShard]:
        """Return the pieces with copied data, which is valid until the next call; grows where it must."""
        need, is_pinned = _room_for(pieces), self._buffer.is_pinned()
        if need > self._buffer.numel():
            self._buffer = torch.empty(0, dtype=torch.uint8)  # let the old one go first
            self._buffer = torch.empty(need, dtype=torch.uint8, pin_memory=is_pinned)
        copies, at = [], 0
        for piece in pieces:
            room = self._buffer.narrow(0, at, piece.data.nbytes)
            copy = room.view(piece.data.dtype).view(piece.box.shape)
            copy.copy_(piece.data.detach(), non_blocking=True)
            copies.append(dataclasses.replace(piece, data=copy))
            at += _aligned(piece.data.nbytes)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def _room_for(pieces: Iterable[TensorShard]) -> int:
    return sum(_aligned(piece.data.nbytes) for piece in pieces)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
