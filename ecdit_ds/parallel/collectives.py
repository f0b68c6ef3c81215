"""Collectives that gradients pass through.

Expert choice needs one only: an all-to-all with equal splits. Its shape is known before the router runs, so no
counts are exchanged and the host never waits for the device.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _EqualAllToAll(torch.autograd.Function):
    """Chunk i of dimension 0 goes to peer i. The exchange is its own transpose, so backward is the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, grads[0].contiguous(), group=ctx.group)
        return out, None


def equal_all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange equal chunks of dimension 0 among the ranks of `group`, with gradients.

    Args:
        x: any shape and dtype; dimension 0 a multiple of the group's size, equal on all ranks.
        group: the ranks that take part.

    Returns:
        A tensor of x's shape; chunk j came from peer j.
    """
    return _EqualAllToAll.apply(x, group)
