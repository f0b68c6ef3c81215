"""Samplers: pure functions that follow a velocity from noise (t = 1) to data (t = 0)."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ecdit_ds.flow.rectified import shift_timesteps

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(latents, timesteps (B,)) -> velocity of the latents' shape."""

StepCallback = Callable[[int, float, Tensor], None]
"""(interval number from 0, its starting time, the latents there)."""

Sampler = Callable[[VelocityFn, Tensor, Tensor, StepCallback | None], Tensor]


def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """Return num_steps + 1 fp64 times from 1 down to 0, denser towards noise when shift > 1."""
    return shift_timesteps(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64), shift)


def sample_euler(
    velocity_fn: VelocityFn, latents: Tensor, times: Tensor, callback: StepCallback | None = None
) -> Tensor:
    """Integrate by Euler's rule: first order, one evaluation an interval.

    Args:
        latents: noise at times[0].
        times: falling, as from `time_grid`.
    """
    for step, (time, next_time) in enumerate(_intervals(times)):
        if callback is not None:
            callback(step, time, latents)
        latents = latents + (next_time - time) * _velocity(velocity_fn, latents, time)
    return latents


def sample_heun(
    velocity_fn: VelocityFn, latents: Tensor, times: Tensor, callback: StepCallback | None = None
) -> Tensor:
    """Integrate by Heun's trapezoidal rule: second order, two evaluations an interval."""
    for step, (time, next_time) in enumerate(_intervals(times)):
        if callback is not None:
            callback(step, time, latents)
        velocity = _velocity(velocity_fn, latents, time)
        guess = latents + (next_time - time) * velocity
        latents = latents + (next_time - time) * 0.5 * (velocity + _velocity(velocity_fn, guess, next_time))
    return latents


def sampler_named(name: str) -> Sampler:
    """Return the sampler a recipe names."""
    return {"euler": sample_euler, "heun": sample_heun}[name]


def _intervals(times: Tensor) -> list[tuple[float, float]]:
    values = times.tolist()
    return list(itertools.pairwise(values))


def _velocity(velocity_fn: VelocityFn, latents: Tensor, time: float) -> Tensor:
    return velocity_fn(latents, torch.full((latents.shape[0],), time, device=latents.device))
