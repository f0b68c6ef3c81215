"""How DeepSpeed 0.19.8 lays the parameters of a rank out in flat groups, and which pieces a rank keeps.

Parameters stand in groups: the decayed ones (matrices), the rest, and experts apart. ZeRO-1 and 2 flatten a group,
pad it to twice its number of ranks and cut it into equal parts, so a part may begin and end inside a parameter. ZeRO-3
cuts each parameter into equal parts, the last one padded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.parallel.partition_rules import sharded_axes
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.parameters import Parameter, parameters

_ALIGNMENT = 2
"""Numbers a rank: DeepSpeed's "nccl_start_alignment_factor"."""
_MAX_EXPERT_GROUP = 178_956_971
"""Numbers in a group of experts: DeepSpeed starts another one rather than exceed it."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are updated together, as one rank's model has them."""

    sizes: tuple[int, ...]
    """Elements of each, in order."""
    ranks: int
    """Over which the group is cut: data-parallel ones, or copies of the experts."""
    is_expert: bool

    @property
    def part(self) -> int:
        """Numbers that a rank updates under ZeRO-1 and 2."""
        alignment = _ALIGNMENT * self.ranks
        return math.ceil(sum(self.sizes) / alignment) * alignment // self.ranks

    def touched(self) -> list[int]:
        """Return for each rank the numbers in parameters of which its part holds a piece."""
        found, start, part = [0] * self.ranks, 0, self.part
        for size in self.sizes:
            for rank in range(start // part, (start + size - 1) // part + 1):
                found[rank] += size
            start += size
        return found


def local_size(parameter: Parameter, tp: int, ep: int) -> int:
    """Return how many of a parameter's numbers one rank's model has."""
    ways = {"tp": tp, "ep": ep}
    return parameter.size // math.prod(ways[way] for way in sharded_axes(parameter.name))


def local_groups(recipe: Recipe, topology: Topology) -> list[Group]:
    """Return the groups of ZeRO-1 and 2."""
    return list(_groups(recipe.model, topology))


@lru_cache(maxsize=256)
def _groups(model: ModelConfig, topology: Topology) -> tuple[Group, ...]:
    decayed, rest, experts = list[int](), list[int](), list[int]()
    for parameter in parameters(model):
        is_matrix = len(parameter.shape) >= 2 and "table" not in parameter.name
        into = experts if parameter.is_expert else decayed if is_matrix else rest
        into.append(local_size(parameter, topology.tp, topology.ep))
    groups = [Group(sizes=tuple(sizes), ranks=topology.dp, is_expert=False) for sizes in (decayed, rest)]
    chunks = _expert_chunks(experts)
    return (*groups, *(Group(sizes=tuple(chunk), ranks=topology.edp, is_expert=True) for chunk in chunks))


def touched_numbers(groups: Sequence[Group], topology: Topology, rank: int | None) -> int:
    """Return the numbers in parameters of which `rank` holds pieces, over all groups; None for the fullest rank."""
    touched = _touched_by_dp(tuple(groups), topology)
    return max(touched) if rank is None else touched[topology.coordinates(rank).dp]


@lru_cache(maxsize=256)
def _touched_by_dp(groups: tuple[Group, ...], topology: Topology) -> tuple[int, ...]:
    dense = _summed([group.touched() for group in groups if not group.is_expert])
    experts = _summed([group.touched() for group in groups if group.is_expert]) or [0] * topology.edp
    return tuple(dense[dp] + experts[dp // topology.ep] for dp in range(topology.dp))


def _expert_chunks(sizes: list[int]) -> list[list[int]]:
    chunks: list[list[int]] = [[]]
    for size in sizes:
        if chunks[-1] and sum(chunks[-1]) + size > _MAX_EXPERT_GROUP:
            chunks.append([])
        chunks[-1].append(size)
    return [chunk for chunk in chunks if chunk]


def _summed(columns: list[list[int]]) -> list[int]:
    return [sum(values) for values in zip(*columns, strict=True)]
