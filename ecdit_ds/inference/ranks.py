"""The processes of a tool: one alone, or as many as `deepspeed` started, in a layout."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ecdit_ds.model.layers import LayerFactory
from ecdit_ds.model.sharding import UNSHARDED, ShardIndex
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.parallel.world import World, rank_info_from_env
from ecdit_ds.runtime.exit_report import ignore_broken_pipes

T = TypeVar("T")


class SingleProcess:
    """Agreement with nobody else, for a process without others; as `World`."""

    rank = 0
    size = 1

    def on_rank0(self, work: Callable[[], T]) -> T:
        return work()

    def run_on_all(self, work: Callable[[], T]) -> T:
        return work()

    def share(self, value: T) -> list[T]:
        return [value]

    def sum(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process among those that work together."""

    world: World | SingleProcess
    device: torch.device
    layers: LayerFactory
    """This rank's part of a model."""
    dp: ShardIndex
    """Which part of the work is its own; ranks of one tensor-parallel group have the same."""
    is_tp_leader: bool
    """Whether it writes what its tensor-parallel group worked out."""

    @property
    def is_rank0(self) -> bool:
        return self.world.rank == 0


def init_ranks(tp: int = 1, ep: int = 1) -> DistributedContext:
    """Join the other processes; a process that nobody else belongs to needs no communication at all.

    Args:
        tp: tensor-parallel ranks.
        ep: expert-parallel ranks.

    Raises:
        TopologyError: the degrees do not divide the processes that were started.
    """
    place = rank_info_from_env()
    topology = Topology(world_size=place.world_size, tp=tp, ep=ep)
    if place.world_size == 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return DistributedContext(
            world=SingleProcess(), device=device, layers=serial_layers(), dp=UNSHARDED, is_tp_leader=True
        )
    # DeepSpeed takes seconds to import, and a single process does without.
    from ecdit_ds.parallel.setup import init_process_groups, initialize_distributed

    device = initialize_distributed()
    world = World()
    at = topology.coordinates(world.rank)
    grid = init_process_groups(topology, dispatch_chunks=1)
    dp = ShardIndex(index=at.dp, count=topology.dp)
    return DistributedContext(world=world, device=device, layers=grid.layers, dp=dp, is_tp_leader=at.tp == 0)


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code; call it when all is said and on the disk.

    One of many leaves at once: threads of process groups that Python takes down may abort it, or wait for the dead.
    """
    if dist.is_initialized():
        ignore_broken_pipes()
        os._exit(code)
    sys.exit(code)
