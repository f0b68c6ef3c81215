"""Rectified flow. The convention, fixed here: t = 0 is data, t = 1 is noise.

    x_t = (1 - t) * latents + t * noise          the straight path
    v   = dx_t / dt = noise - latents            what the model predicts

Sampling therefore integrates from t = 1 down to t = 0. Source: arXiv 2410.02098 eq. 1; SD3, arXiv 2403.03206.
"""

import torch
from torch import Tensor

from ecdit_ds.config.recipe import FlowConfig

_UNIFORM_EDGE = 1e-6


def interpolate(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
    """Return the noisy latents at each sample's own time."""
    t = timesteps_B.view(-1, 1, 1, 1).to(latents_BCHW.dtype)
    return (1 - t) * latents_BCHW + t * noise_BCHW


def velocity_target(latents_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Return the path's constant velocity."""
    return noise_BCHW - latents_BCHW


def timesteps_from_uniform(uniform_B: Tensor, config: FlowConfig) -> Tensor:
    """Map uniform numbers in [0, 1) to training timesteps by the inverse distribution function.

    Evenly spread numbers give evenly spread quantiles, so stratified input stays stratified.
    `logit_normal`: t = sigmoid(mean + std * z), z standard normal (SD3 sec. 3.1). Then the resolution shift.
    """
    uniform_B = uniform_B.double().clamp(_UNIFORM_EDGE, 1 - _UNIFORM_EDGE)
    if config.timestep_density == "logit_normal":
        t = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(uniform_B))
    else:
        t = uniform_B
    return shift_timesteps(t, config.timestep_shift).float()


def shift_timesteps(timesteps: Tensor, shift: float) -> Tensor:
    """Move times towards noise: s t / (1 + (s - 1) t), with s = sqrt(m / n) from n to m tokens (SD3 sec. 5.3.2)."""
    return shift * timesteps / (1 + (shift - 1) * timesteps)
