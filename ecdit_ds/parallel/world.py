"""The processes that train together: who am I, and what do we all say.

The launcher tells each process its place through the environment; a process started alone is a world of one.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from ecdit_ds.errors import EcditError, RankLostError, TopologyError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """This process among the others, as the launcher says."""

    rank: int
    local_rank: int
    local_size: int
    world_size: int


def rank_info_from_env() -> RankInfo:
    """Read RANK, LOCAL_RANK, LOCAL_SIZE and WORLD_SIZE; without a launcher, become a world of one and say so there."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    world_size = _number("WORLD_SIZE", None)
    return RankInfo(
        rank=_number("RANK", None),
        local_rank=_number("LOCAL_RANK", 0),
        local_size=_number("LOCAL_SIZE", _number("LOCAL_WORLD_SIZE", world_size)),
        world_size=world_size,
    )


def meet_alone(backend: str, timeout: timedelta) -> bool:
    """Join the process group where this process is the only one, and return whether it is; nobody else needs a port.

    There is no store, which would take anybody's word; what gloo and NCCL listen on, only this machine reaches.
    """
    if dist.is_initialized() or os.environ.get("WORLD_SIZE") != "1":
        return False
    loopback = _loopback()
    os.environ.update({"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback})
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return True


def _loopback() -> str:
    """Return the interface that only this machine reaches: `lo` on Linux, `lo0` on a Mac."""
    addresses = psutil.net_if_addrs()
    return next((name for name, own in addresses.items() if any(is_at.address == "127.0.0.1" for is_at in own)), "lo")


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise TopologyError(
            f"environment variable {name}: {text!r} is not a number; start with `deepspeed`, or unset RANK"
        )
    return int(text)


class World:
    """Agreement among all processes; collective, so every process must ask the same question."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and return its value everywhere; where it raises an EcditError, all raise it.

        Where it raises anything else, which is a defect, the others raise that rank 0 was lost.
        """
        outcome: tuple[Any, EcditError | None] = (None, None)
        defect: Exception | None = None
        if self.rank == 0:
            try:
                outcome = (work(), None)
            except EcditError as error:
                outcome = (None, error)
            except Exception as error:
                defect, outcome = error, (None, RankLostError(f"rank 0 failed: {type(error).__name__}: {error}"))
        value, fault = self.broadcast(outcome)
        if defect is not None:
            raise defect
        if fault is not None:
            raise fault
        result: T = value
        return result

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; where it raises an EcditError on any, all raise the first."""
        result, fault = None, None
        try:
            result = work()
        except EcditError as error:
            fault = error
        faults = [found for found in self.share(fault) if found is not None]
        if faults:
            raise faults[0]
        return result  # type: ignore[return-value]

    def share(self, value: T) -> list[T]:
        """Return everybody's value, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any] | None:
        """Return everybody's value on rank 0, None elsewhere."""
        values = self.share(value)
        return values if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_true(self, ok: bool) -> bool:
        """Return whether everybody is; nobody goes on before all have answered."""
        flag = torch.tensor([int(ok)], device=_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise mean of an fp64 or fp32 tensor over all processes."""
        return self.sum(values) / self.size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum over all processes."""
        total = values.detach().clone().to(_device())
        dist.all_reduce(total)
        return total


def _device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
