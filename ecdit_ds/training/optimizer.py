"""Optimizers, parameter groups and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from ecdit_ds.config.recipe import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return named groups: matrices are decayed, vectors and modulation tables are not.

    DeepSpeed splits experts off each group and needs every group named.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.dim() >= 2 and "table" not in name]
    rest = [p for name, p in named if p.dim() < 2 or "table" in name]
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": rest, "weight_decay": 0.0, "name": "not_decayed"},
    ]


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, *, is_offloaded: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe; fused where it works on a GPU, or on a CPU beside one."""
    if config.name == "rmsprop":
        return torch.optim.RMSprop(
            groups, lr=config.learning_rate, alpha=config.smoothing, eps=config.eps, momentum=config.momentum
        )
    is_fused = is_offloaded or groups[0]["params"][0].is_cuda
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=is_fused)


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the rate of optimizer step `step` (from 0): a linear warm-up, then the schedule until max_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.final_lr_fraction
    return config.learning_rate * (floor + (1.0 - floor) * shape)
