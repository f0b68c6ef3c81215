"""The layers that `tools/bench.py moe` times, built to equal activated FLOPs a token, and one timing of one of them.

"Activated" counts the experts a token passes: with f = 2 that is 2 x 2 D F multiply-adds for two-matrix experts.

Suffixes: B images, S tokens of an image, D hidden_size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.model.moe import DenseFFN, ExpertChoiceFFN
from ecdit_ds.seeding import parameter_generator

CAPACITY_FACTOR = 2
PEERS = ("dense", "deepspeed", "nucleus", "nucleus_grouped")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One layer under test."""

    name: str
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    """x_BSD -> y_BSD."""


def build_side(name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Side:
    """Return the side `name` with seeded weights: normal, std 0.02, drawn by parameter name."""
    module, forward = _build_layer(name, config)
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            generator = parameter_generator(0, parameter_name)
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    module.to(device=device, dtype=dtype)
    return Side(name=name, module=module, forward=forward)


def _build_layer(name: str, config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    if name == "ours":
        layer = ExpertChoiceFFN(SerialLayers(), config)
        return layer, lambda x_BSD: layer(x_BSD, x_BSD)
    if name == "dense":
        dense = DenseFFN(SerialLayers(), config, copies=CAPACITY_FACTOR)
        return dense, dense
    if name == "deepspeed":
        moe = _deepspeed_layer(config)
        return moe, lambda x_BSD: moe(x_BSD)[0]
    nucleus = _nucleus_layer(config, use_grouped_mm=name == "nucleus_grouped")
    return nucleus, lambda x_BSD: nucleus(x_BSD, x_BSD, timestep=x_BSD.new_zeros(len(x_BSD), config.hidden_size))


def _deepspeed_layer(config: ModelConfig) -> nn.Module:
    """Return DeepSpeed's token choice; k = 2 doubles its capacity factor of 1. No process group: ep_size is 1."""
    from deepspeed.moe.layer import MoE

    return MoE(
        config.hidden_size,
        DenseFFN(SerialLayers(), config),
        config.num_experts,
        ep_size=1,
        k=CAPACITY_FACTOR,
        capacity_factor=1.0,
        min_capacity=1,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )


def _nucleus_layer(config: ModelConfig, *, use_grouped_mm: bool) -> nn.Module:
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer

    # Equal work a token: three matrices of width w for f routed experts and a shared one, two of width F for f of ours.
    exact = 2 * CAPACITY_FACTOR * config.ffn_hidden_size / (3 * (CAPACITY_FACTOR + 1))
    return NucleusMoELayer(
        config.hidden_size,
        moe_intermediate_dim=8 * round(exact / 8),
        num_experts=config.num_experts,
        capacity_factor=CAPACITY_FACTOR,
        use_sigmoid=False,
        route_scale=1.0,
        use_grouped_mm=use_grouped_mm,
    )


def forward_backward_ms(side: Side, x_BSD: Tensor, grad_BSD: Tensor) -> float:
    """Run forward and backward once from gradients that are None and return the time it took."""
    x_BSD.grad = None
    side.module.zero_grad(set_to_none=True)
    if x_BSD.is_cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        side.forward(x_BSD).backward(grad_BSD)
        end.record()
        torch.cuda.synchronize()
        elapsed_ms = begin.elapsed_time(end)
    else:
        start_s = time.process_time()
        side.forward(x_BSD).backward(grad_BSD)
        elapsed_ms = 1e3 * (time.process_time() - start_s)
    side.module.zero_grad(set_to_none=True)  # so that one side's gradients at a time are in memory
    return elapsed_ms


def count_flops(side: Side, x_BSD: Tensor, grad_BSD: Tensor) -> int:
    """Return the FLOPs of one forward and backward; a multiply-add is two. It also warms the side up."""

    def grouped_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
        # Rows x in x out, whether the groups share out the rows (forward) or are summed over (weight gradient).
        return int(2 * a[0] * a[1] * b[-1])

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops}) as counter:
        forward_backward_ms(side, x_BSD, grad_BSD)
    return counter.get_total_flops()
