"""Making a model, and its initial weights by name: they depend on the seed and the name, never on the layout.

0                        biases, all modulation (adaLN-Zero: a block starts as the identity, DiT), the output
                         projection, and cross-attention's output matrix, which has no gate (PixArt-alpha)
1                        norm scales
normal, std 0.02         routers: near-uniform scores; the mask token (MAE, arXiv 2111.06377)
uniform, Xavier          any other matrix, and each expert's, over its own in and out (DiT)
"""

import math

import torch
from torch import Tensor, nn

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.model.ecdit import ECDiT, RunBlock, run_block
from ecdit_ds.model.layers import LayerFactory
from ecdit_ds.model.sharding import shard_of
from ecdit_ds.seeding import parameter_generator

_ZERO = ("modulation", "final.linear", "cross_attention.out")
_SMALL = ("router", "gate.wg", "mask_token")
_SMALL_STD = 0.02


def empty_model(
    config: ModelConfig,
    layers: LayerFactory,
    device: torch.device,
    *,
    run_block: RunBlock = run_block,
    dtype: torch.dtype = torch.float32,
) -> ECDiT:
    """Return the model on `device` with memory for its parameters, and nothing in it."""
    with torch.device("meta"):
        model = ECDiT(config, layers, run_block).to(dtype)
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    model.to_empty(device=device)  # makes new parameters, without the marks that say what is an expert
    for name, parameter in model.named_parameters():
        vars(parameter).update(marks[name])
    return model


def initialize_by_name(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` in place."""
    for name, parameter in model.named_parameters():
        initialize_parameter(name, parameter, seed)


@torch.no_grad()
def initialize_parameter(name: str, parameter: nn.Parameter, seed: int) -> None:
    """Fill the parameter of that name in place.

    A cut parameter takes its box of the global tensor. Experts draw from `(seed, name, global expert index)`, so an
    expert has the same weights on whatever rank it is.
    """
    shard = shard_of(parameter)
    if parameter.dim() == 3:  # experts: (experts, in, out)
        for local, weight in enumerate(parameter):
            shape, expert = shard.global_shape[:0:-1], shard.offset[0] + local
            whole = _xavier(shape[0], shape[1], seed, name, expert).T
            weight.copy_(_box(whole, shard.offset[1:], weight.shape))
    elif any(part in name for part in _ZERO) or name.endswith("bias"):
        parameter.zero_()
    elif any(part in name for part in _SMALL):
        generator = parameter_generator(seed, name)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * _SMALL_STD)
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        whole = _xavier(shard.global_shape[0], shard.global_shape[1], seed, name)
        parameter.copy_(_box(whole, shard.offset, parameter.shape))


def _box(whole: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]


def _xavier(fan_out: int, fan_in: int, seed: int, name: str, *index: int) -> Tensor:
    """Return an (out, in) matrix, uniform in +-sqrt(6 / (in + out))."""
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    uniform = torch.rand(fan_out, fan_in, generator=parameter_generator(seed, name, *index))
    return (2.0 * uniform - 1.0) * bound
