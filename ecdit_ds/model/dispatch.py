"""Tokens to the experts that chose them, and back: static shapes.

Suffixes: B pools, S tokens of a pool, T tokens of all pools, D hidden_size, E experts, L local experts, C expert
capacity, R rows of one local expert (ep * B * C), or of all experts where no L stands before it. `LocalDispatcher` is
the specification; those of `ecdit_ds.parallel.dispatch` agree with it on any number of ranks.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

ApplyExperts = Callable[[Tensor], Tensor]
"""x_LRD -> y_LRD: local expert l applied to its rows."""


class Dispatcher(Protocol):
    """Moves tokens to experts and back."""

    def __call__(self, x_BSD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, experts: ApplyExperts) -> Tensor:
        """Return y_BSD, each token the gated sum over the experts that took it; zero where none did."""
        ...


class LocalDispatcher:
    """All experts are here."""

    def __call__(self, x_BSD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, experts: ApplyExperts) -> Tensor:
        return combine(experts(gather(x_BSD, indices_BEC)), gates_BEC, indices_BEC, x_BSD.shape[1])


def gather(x_BSD: Tensor, indices_BEC: Tensor) -> Tensor:
    """Return x_ERD, the rows each expert took: ordered by pool, then by place."""
    x_RD = rearrange(x_BSD, "b s d -> (b s) d").index_select(0, _flat_rows(indices_BEC, x_BSD.shape[1]))
    return rearrange(x_RD, "(e r) d -> e r d", e=indices_BEC.shape[1])


def combine(y_ERD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, num_tokens: int) -> Tensor:
    """Return y_BSD, each token the gated sum of its experts' rows."""
    batch, _, _ = indices_BEC.shape
    y_RD = rearrange(y_ERD, "e r d -> (e r) d")
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


def _flat_rows(indices_BEC: Tensor, num_tokens: int) -> Tensor:
    """Return row numbers of the flattened (b s), in the order expert, pool, place."""
    pool_starts_B = torch.arange(indices_BEC.shape[0], device=indices_BEC.device) * num_tokens
    return rearrange(indices_BEC + rearrange(pool_starts_B, "b -> b 1 1"), "b e c -> (e b c)")
