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
from ecdit_ds.model.sharding import WHOLE, Share
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.parallel.world import World, place_from_environment
from ecdit_ds.runtime.exit_report import let_go_of_closed_streams

T = TypeVar("T")


class Alone:
    """Agreement with nobody else, for a process without others; as `World`."""

    rank = 0
    size = 1

    def on_first(self, work: Callable[[], T]) -> T:
        return work()

    def together(self, work: Callable[[], T]) -> T:
        return work()

    def share(self, value: T) -> list[T]:
        return [value]

    def sum(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True, kw_only=True)
class Crew:
    """This process among those that work together."""

    world: World | Alone
    device: torch.device
    layers: LayerFactory
    """This rank's part of a model."""
    dp: Share
    """Which part of the work is its own; ranks of one tensor-parallel group have the same."""
    is_speaker: bool
    """Whether it writes what its tensor-parallel group worked out."""

    @property
    def is_first(self) -> bool:
        return self.world.rank == 0


def join_crew(tp: int = 1, ep: int = 1) -> Crew:
    """Join the other processes; a process that nobody else belongs to needs no communication at all.

    Args:
        tp: tensor-parallel ranks.
        ep: expert-parallel ranks.

    Raises:
        TopologyError: the degrees do not divide the processes that were started.
    """
    place = place_from_environment()
    topology = Topology(world_size=place.world_size, tp=tp, ep=ep)
    if place.world_size == 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Crew(world=Alone(), device=device, layers=serial_layers(), dp=WHOLE, is_speaker=True)
    # DeepSpeed takes seconds to import, and a single process does without.
    from ecdit_ds.parallel.setup import create_grid, initialize_distributed

    device = initialize_distributed()
    world = World()
    at = topology.coordinates(world.rank)
    grid = create_grid(topology, dispatch_chunks=1)
    dp = Share(index=at.dp, count=topology.dp)
    return Crew(world=world, device=device, layers=grid.layers, dp=dp, is_speaker=at.tp == 0)


def leave(code: int) -> NoReturn:
    """End this process with an exit code; call it when all is said and on the disk.

    One of many leaves at once: threads of process groups that Python takes down may abort it, or wait for the dead.
    """
    if dist.is_initialized():
        let_go_of_closed_streams()
        os._exit(code)
    sys.exit(code)
