"""The experts of one layer, as batched matrix products.

Expert choice gives every expert the same number of rows, so no grouped kernel is needed. Weights are
`(experts, in, out)`: on a CPU `torch.bmm` is then as fast as a dense product from 128 rows an expert on, and ahead
of a loop over experts below (docs/LOG.md, 2026-11-21).

Suffixes: L local experts, R rows of one local expert, D hidden_size, F ffn_hidden_size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ecdit_ds.config.model_config import Activation
from ecdit_ds.model.sharding import UNSHARDED, ShardIndex, set_shard

_MAX_SLICES = 8
"""Groups of experts that backward takes one after another; a handful keeps each product large."""


class Experts(nn.Module):
    """`num_experts` two-matrix feed-forward networks without biases, of which this rank holds an equal share.

    Args:
        num_experts: of the whole layer, E.
        hidden_size: D.
        ffn_hidden_size: inner width, F.
        activation: `gelu`: GELU(x w1) w2, 2DF parameters an expert (paper sec. 3.3);
            `swiglu`: (SiLU(x wg) * (x wu)) w2, with the columns of wg and wu taking turns in w1, so that any slice of
            it holds pairs.
        ep: which share of the experts is here.
        tp: which share of each expert's inner width; the outputs of all shares are still to be added up.

    Source: arXiv 2410.02098 eq. 8.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        activation: Activation,
        ep: ShardIndex = UNSHARDED,
        tp: ShardIndex = UNSHARDED,
    ) -> None:
        nn.Module.__init__(self)  # not super(): a marker class may stand between (deepspeed_moe.py)
        num_local, width = ep.of(num_experts), tp.of(ffn_hidden_size)
        self.num_experts = num_experts
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(num_local, hidden_size, width * (2 if activation == "swiglu" else 1)))
        self.w2 = nn.Parameter(torch.empty(num_local, width, hidden_size))
        set_shard(self.w1, (0, ep), (2, tp), is_tp_sharded=tp.count > 1)
        set_shard(self.w2, (0, ep), (1, tp), is_tp_sharded=tp.count > 1)

    def forward(self, x_LRD: Tensor) -> Tensor:
        """Apply local expert l to its rows x_LRD[l]."""
        return _ActivatedProducts.apply(x_LRD, self.w1, self.w2, self.activation)


class _ActivatedProducts(torch.autograd.Function):
    """activate(x w1) w2, whose backward goes a few experts at a time.

    The inner width is the widest thing in the layer. Plain autograd writes two gradients of it; here they exist for
    one slice of experts at a time, in memory that the next slice uses again.
    """

    @staticmethod
    def forward(ctx: Any, x_LRD: Tensor, w1: Tensor, w2: Tensor, activation: Activation) -> Tensor:
        inner_LRF = torch.bmm(x_LRD, w1)
        activated_LRF = activate(inner_LRF, activation)
        ctx.save_for_backward(x_LRD, w1, w2, inner_LRF, activated_LRF)
        ctx.activation = activation
        return torch.bmm(activated_LRF, w2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_LRD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_LRD, w1, w2, inner_LRF, activated_LRF = ctx.saved_tensors
        grad_x_LRD, grad_w1 = x_LRD.new_empty(x_LRD.shape), torch.empty_like(w1)
        slices = _expert_slices(x_LRD, w1, w2, inner_LRF, grad_y_LRD, grad_x_LRD, grad_w1)
        for x, into, out_of, inner, grad_y, grad_x, grad_into in slices:
            grad_inner = _activate_backward(torch.bmm(grad_y, out_of.mT), inner, ctx.activation)
            torch.bmm(x.mT, grad_inner, out=grad_into)
            torch.bmm(grad_inner, into.mT, out=grad_x)
        return grad_x_LRD, grad_w1, torch.bmm(activated_LRF.mT, grad_y_LRD), None


def _expert_slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk along the experts of all tensors at once, at most `_MAX_SLICES` steps."""
    return zip(*(tensor.chunk(_MAX_SLICES) for tensor in tensors), strict=True)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply the feed-forward activation to the last dimension; swiglu halves it."""
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    gate, up = rearrange(x, "... (f two) -> two ... f", two=2)
    return F.silu(gate) * up


def _activate_backward(grad: Tensor, x: Tensor, activation: Activation) -> Tensor:
    """Return the gradient of activate's input x."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    gate, up = rearrange(x, "... (f two) -> two ... f", two=2)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.stack([grad_gate, grad * F.silu(gate)], dim=-1).flatten(-2)
