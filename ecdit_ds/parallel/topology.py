"""Rank arithmetic: one set of ranks, seen in two ways.

    dense view    rank = tp + TP * dp            dp x tp
    expert view   dp = ep + EP * edp             edp x ep x tp

Expert parallelism re-slices the data-parallel ranks; it takes no ranks of its own. The order is that of
megatron-core's "tp-cp-ep-dp-pp" and of DeepSpeed's expert groups. Pure Python: it runs on a laptop for any world.
"""

from dataclasses import dataclass
from typing import Literal

from ecdit_ds.config.validation import divisors
from ecdit_ds.errors import TopologyError

Axis = Literal["tp", "dp", "ep", "edp"]


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where one rank stands on each axis."""

    tp: int
    dp: int
    ep: int
    """Which slice of the experts it holds."""
    edp: int
    """Which copy of that slice."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A layout of `world_size` ranks.

    Raises:
        TopologyError: the degrees do not divide the world.
    """

    world_size: int
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.tp < 1 or self.world_size % self.tp:
            raise TopologyError(
                f"parallel.tp({self.tp}) does not divide the {self.world_size} ranks that were started; "
                f"choose tp from {divisors(self.world_size)}"
            )
        if self.ep < 1 or self.dp % self.ep:
            raise TopologyError(
                f"parallel.ep({self.ep}) does not divide the {self.dp} data-parallel ranks "
                f"(world {self.world_size} / tp {self.tp}); choose ep from {divisors(self.dp)} or start other ranks"
            )

    @property
    def dp(self) -> int:
        """Data-parallel ranks of the dense view."""
        return self.world_size // self.tp

    @property
    def edp(self) -> int:
        """Copies of each expert."""
        return self.dp // self.ep

    def coordinates(self, rank: int) -> Coordinates:
        """Return where `rank` stands on each axis."""
        dp, tp = divmod(rank, self.tp)
        edp, ep = divmod(dp, self.ep)
        return Coordinates(tp=tp, dp=dp, ep=ep, edp=edp)

    def rank_lists(self, axis: Axis) -> list[list[int]]:
        """Return the groups of `axis`: ranks that differ in that coordinate alone, each in its order."""
        fixed = {"tp": ("dp",), "dp": ("tp",), "ep": ("tp", "edp"), "edp": ("tp", "ep")}[axis]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            at = self.coordinates(rank)
            groups.setdefault(tuple(getattr(at, name) for name in fixed), []).append(rank)
        return list(groups.values())
