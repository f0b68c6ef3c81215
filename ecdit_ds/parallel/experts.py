"""The experts of one layer, as one batched matrix product.

Expert choice gives every expert the same number of rows, so no grouped kernel is needed. Weights are
`(experts, in, out)`: on a CPU `torch.bmm` is then as fast as a dense product from 128 rows an expert on, and ahead
of a loop over experts below (docs/LOG.md, 2026-11-21).
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ecdit_ds.config import Activation
from ecdit_ds.parallel.sharding import set_shard


class Experts(nn.Module):
    """`num_experts` two-matrix feed-forward networks without biases, of which this rank holds an equal share.

    Args:
        num_experts: of the whole layer, E.
        hidden_size: D.
        ffn_hidden_size: inner width, F.
        activation: `gelu`: GELU(x w1) w2, 2DF parameters an expert (paper sec. 3.3);
            `swiglu`: (SiLU(x wg) * (x wu)) w2, with wg and wu side by side in w1.
        ep_rank, ep_size: which share.

    Source: arXiv 2410.02098 eq. 8.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        activation: Activation,
        ep_rank: int = 0,
        ep_size: int = 1,
    ) -> None:
        nn.Module.__init__(self)  # not super(): a marker class may stand between (deepspeed_moe.py)
        num_local, width = num_experts // ep_size, ffn_hidden_size * (2 if activation == "swiglu" else 1)
        self.num_experts = num_experts
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(num_local, hidden_size, width))
        self.w2 = nn.Parameter(torch.empty(num_local, ffn_hidden_size, hidden_size))
        for weight in (self.w1, self.w2):
            set_shard(weight, axis=0, index=ep_rank, count=ep_size)

    def forward(self, x_LRD: Tensor) -> Tensor:
        """Apply local expert l to its rows x_LRD[l]."""
        return torch.bmm(activate(torch.bmm(x_LRD, self.w1), self.activation), self.w2)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply the feed-forward activation to the last dimension; swiglu halves it."""
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    gate, up = rearrange(x, "... (two f) -> two ... f", two=2)
    return F.silu(gate) * up
