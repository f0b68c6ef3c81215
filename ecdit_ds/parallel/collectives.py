"""Collectives that gradients pass through.

Expert choice needs one: an all-to-all with equal splits. Its shape is known before the router runs, so no counts are
exchanged and the host never waits for the device. It comes in two halves, so that other work fits between them, in
forward and in backward alike. Tensor parallelism needs Megatron-LM's conjugate pair f and g (1909.08053 fig. 3).
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class AsyncAllToAll:
    """One all-to-all on its way; shared by its two halves."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._held: Tensor | None = None

    def launch(self, x: Tensor) -> Tensor:
        """Return where the exchanged chunks of dimension 0 will be; not to be read before `land`."""
        chunk = x.shape[0] // self._group.size()
        splits = [chunk] * self._group.size()
        self._held = x.contiguous()  # the device may read it until the flight has landed
        return torch.ops._c10d_functional.all_to_all_single(self._held, splits, splits, self._group.group_name)

    def land(self, out: Tensor) -> Tensor:
        """Let what follows wait for the exchange into `out`; on a GPU the device waits, not the host."""
        torch.ops._c10d_functional.wait_tensor(out)
        self._held = None
        return out


class _Launch(torch.autograd.Function):
    """First half in forward; in backward the second half of the gradients' exchange, which `_Land` launched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: AsyncAllToAll) -> Tensor:
        ctx.flight = flight
        return _exchange.get()(lambda: flight.launch(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(grads[0]), None


class _Land(torch.autograd.Function):
    """Second half in forward; an exchange is its own transpose, so backward launches one with the gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, flight: AsyncAllToAll) -> Tensor:
        ctx.flight = flight
        return flight.land(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.launch(grads[0]), None


def all_to_all_start(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, AsyncAllToAll]:
    """Begin to exchange equal chunks of dimension 0 among the ranks of `group`, with gradients.

    Args:
        x: any shape and dtype; dimension 0 a multiple of the group's size, equal on all ranks.
        group: the ranks that take part.

    Returns:
        What `all_to_all_wait` wants; the tensor must go nowhere else.
    """
    flight = AsyncAllToAll(group)
    return _Launch.apply(x, flight), flight


def all_to_all_wait(launched: tuple[Tensor, AsyncAllToAll]) -> Tensor:
    """Return the exchanged tensor, of the shape that was sent; chunk j came from peer j."""
    return _Land.apply(*launched)


class _CopyIn(torch.autograd.Function):
    """Megatron's f: identity; the gradients of all ranks add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grads[0], ctx.group), None


class _SumOut(torch.autograd.Function):
    """Megatron's g: the parts of all ranks add up; the gradient goes to each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # megatron-core 0.16.1 reduces nothing, and says nothing, when the tensor is not contiguous.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def copy_to_tp_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Hand x, equal on all ranks, to computations that differ by rank; its gradient is the sum of theirs."""
    return _CopyIn.apply(x, group)


def reduce_from_tp_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of x over the ranks of `group`, equal on all; the gradient passes through unchanged."""
    return _SumOut.apply(x, group)


Launch = Callable[[], Tensor]
_exchange: ContextVar[Callable[[Launch], Tensor]] = ContextVar("exchange", default=lambda launch: launch())
"""How exchanges of the forward pass are had: launched, launched and kept, or taken from those that were kept."""


def save_all_to_all() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return two contexts: exchanges launched under the first are kept, and given again, in order, under the second.

    For activation checkpointing: computing a block again then communicates nothing. torch's own selective policy
    wants the very same operators both times, which ZeRO-3, gathering weights when they are missing, does not do.
    """
    tape: deque[Tensor] = deque()

    def launch_and_keep(launch: Launch) -> Tensor:
        out = launch()
        tape.append(out.detach())
        return out

    return _exchanging(launch_and_keep), _exchanging(lambda launch: tape.popleft())


@contextmanager
def _exchanging(how: Callable[[Launch], Tensor]) -> Iterator[None]:
    token = _exchange.set(how)
    try:
        yield
    finally:
        _exchange.reset(token)
