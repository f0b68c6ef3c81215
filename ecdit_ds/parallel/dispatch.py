"""Tokens to the experts that chose them, and back: two verbs, static shapes.

Suffixes: B pools, S tokens of a pool, T tokens of all pools, D hidden_size, E experts, L local experts, C expert
capacity, R rows of one local expert (ep * B * C), or of all experts where no L stands before it. `LocalDispatcher` is
the specification; `AllToAllDispatcher` agrees with it on any number of ranks, because every rank sends every peer
exactly L * B * C rows.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from einops import einsum, rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecdit_ds.parallel.collectives import equal_all_to_all


class Dispatcher(Protocol):
    """Moves tokens to experts and back."""

    def dispatch(self, x_BSD: Tensor, indices_BEC: Tensor) -> Tensor:
        """Return x_LRD, the rows that each local expert computes."""
        ...

    def combine(self, y_LRD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, num_tokens: int) -> Tensor:
        """Return y_BSD, each token the gated sum over the experts that took it; zero where none did."""
        ...


class LocalDispatcher:
    """All experts are here."""

    def dispatch(self, x_BSD: Tensor, indices_BEC: Tensor) -> Tensor:
        rows_R = _flat_rows(indices_BEC, x_BSD.shape[1])
        x_RD = rearrange(x_BSD, "b s d -> (b s) d").index_select(0, rows_R)
        return rearrange(x_RD, "(e r) d -> e r d", e=indices_BEC.shape[1])

    def combine(self, y_LRD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, num_tokens: int) -> Tensor:
        batch, _, _ = indices_BEC.shape
        y_RD = rearrange(y_LRD, "e r d -> (e r) d")
        gates_R = rearrange(gates_BEC, "b e c -> (e b c)").to(y_RD.dtype)
        y_TD = _GatedSum.apply(y_RD, gates_R, _flat_rows(indices_BEC, num_tokens), batch * num_tokens)
        return rearrange(y_TD, "(b s) d -> b s d", b=batch)


class _GatedSum(torch.autograd.Function):
    """Row t is the sum over r with rows_R[r] == t of gates_R[r] * y_RD[r].

    Plain autograd would write two more tensors of y's size in backward, for the gradients of the product.
    """

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gates_R: Tensor, rows_R: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(y_RD, gates_R, rows_R)
        # One expert takes a token at most once, but several experts may: the sum's order is fixed on a CPU.
        return y_RD.new_zeros(num_rows, y_RD.shape[1]).index_add_(0, rows_R, y_RD * gates_R[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, gates_R, rows_R = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, rows_R)
        grad_gates_R = einsum(grad_RD, y_RD, "r d, r d -> r")
        return grad_RD.mul_(gates_R[:, None]), grad_gates_R, None, None


class AllToAllDispatcher:
    """Experts are spread over the ranks of `group`, in order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._local = LocalDispatcher()

    def dispatch(self, x_BSD: Tensor, indices_BEC: Tensor) -> Tensor:
        x_ERD = equal_all_to_all(self._local.dispatch(x_BSD, indices_BEC), self._group)
        return rearrange(x_ERD, "(ep l) r d -> l (ep r) d", ep=self._group.size())

    def combine(self, y_LRD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, num_tokens: int) -> Tensor:
        y_ERD = rearrange(y_LRD, "l (ep r) d -> (ep l) r d", ep=self._group.size())
        y_ERD = equal_all_to_all(y_ERD, self._group)
        return self._local.combine(y_ERD, gates_BEC, indices_BEC, num_tokens)


def _flat_rows(indices_BEC: Tensor, num_tokens: int) -> Tensor:
    """Return row numbers of the flattened (b s), in the order expert, pool, place."""
    pool_starts_B = torch.arange(indices_BEC.shape[0], device=indices_BEC.device) * num_tokens
    return rearrange(indices_BEC + rearrange(pool_starts_B, "b -> b 1 1"), "b e c -> (e b c)")
