"""What saving asks of the processes that save together: three collective calls, handed in.

So storage knows neither torch.distributed nor what a rank stands for, and a test can save with threads.
"""

from typing import Any, Protocol


class Peers(Protocol):
    """The processes that save one checkpoint together. All call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """Which writer this is, from 0."""

    @property
    def size(self) -> int:
        """How many writers there are."""

    def gather(self, obj: Any) -> list[Any] | None:
        """Return everyone's (JSON-able) objects by rank on rank 0, None elsewhere."""

    def all_true(self, ok: bool) -> bool:
        """Return whether all peers said True, once all have spoken."""

    def broadcast(self, obj: Any) -> Any:
        """Return rank 0's (JSON-able) object on every peer."""


class SoloPeers:
    """Peers of a process that saves alone."""

    rank = 0
    size = 1

    def gather(self, obj: Any) -> list[Any] | None:
        """Return the one object."""
        return [obj]

    def all_true(self, ok: bool) -> bool:
        """Return `ok`."""
        return ok

    def broadcast(self, obj: Any) -> Any:
        """Return `obj`."""
        return obj
