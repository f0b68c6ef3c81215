"""Initial weights by name: a parameter's values depend on the seed and its name, never on the layout.

0                        biases, all modulation (adaLN-Zero: a block starts as the identity, DiT), the output
                         projection, and cross-attention's output matrix, which has no gate (PixArt-alpha)
1                        norm scales
normal, std 0.02         routers: near-uniform scores
uniform, Xavier          any other matrix, and each expert's, over its own in and out (DiT)
"""

import math

import torch
from torch import Tensor, nn

from ecdit_ds.parallel.sharding import shard_of
from ecdit_ds.seeding import parameter_generator

_ZERO = ("modulation", "final.linear", "cross_attention.out")
_ROUTER_STD = 0.02


@torch.no_grad()
def initialize_by_name(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` in place.

    Experts draw from `(seed, name, global expert index)`, so an expert has the same weights on whatever rank it is.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:  # experts: (local experts, in, out)
            first = shard_of(parameter).offset[0]
            for local, weight in enumerate(parameter):
                weight.copy_(_xavier(weight.shape[0], weight.shape[1], seed, name, first + local).T)
        elif any(part in name for part in _ZERO) or name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        elif "router" in name or "gate.wg" in name:
            generator = parameter_generator(seed, name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _ROUTER_STD)
        else:
            parameter.copy_(_xavier(parameter.shape[1], parameter.shape[0], seed, name))


def _xavier(fan_in: int, fan_out: int, seed: int, name: str, *index: int) -> Tensor:
    """Return an (out, in) matrix, uniform in +-sqrt(6 / (in + out))."""
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    uniform = torch.rand(fan_out, fan_in, generator=parameter_generator(seed, name, *index))
    return (2.0 * uniform - 1.0) * bound
