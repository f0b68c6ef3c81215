"""Samplers: rules that follow a velocity from noise (t = 1) to data (t = 0), one interval at a time.

A rule is made from a velocity and gives `step(latents, time, next_time) -> latents`; `integrate` takes it along a grid.
Latents, velocities and noise predictions at time t are related by

    x_t = (1 - t) x_0 + t noise,   v = noise - x_0,   so   x_0 = x_t - t v   and   noise = x_t + (1 - t) v.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ecdit_ds.config.recipe import SampleConfig
from ecdit_ds.flow.rectified import shift_timesteps

VelocityFn = Callable[[Tensor, float], Tensor]
"""(latents, time) -> velocity of the latents' shape. Times stay on the host, so no rule waits for a device."""

NoiseFn = Callable[[], Tensor]
"""Draws the next standard normal noise of the latents' shape."""

SamplerStep = Callable[[Tensor, float, float], Tensor]
"""(latents, time, next time) -> latents there."""


class StepCallback(Protocol):
    """Told of each interval before it is taken."""

    def __call__(self, step: int, time: float, latents: Tensor, /) -> Tensor | None:
        """Look at the latents at the start of interval `step` (from 0); what is returned takes their place."""


def time_grid(num_steps: int, shift: float = 1.0) -> list[float]:
    """Return num_steps + 1 times from 1 down to 0, denser towards noise when shift > 1."""
    return shift_timesteps(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64), shift).tolist()


def integrate(step: SamplerStep, latents: Tensor, times: list[float], callback: StepCallback | None = None) -> Tensor:
    """Return the latents at the last of `times`, from those at the first.

    Args:
        step: a rule; one that remembers is good for one path.
        times: falling, as from `time_grid`.
    """
    for i, (time, next_time) in enumerate(itertools.pairwise(times)):
        if callback is not None and (replaced := callback(i, time, latents)) is not None:
            latents = replaced
        latents = step(latents, time, next_time)
    return latents


def euler(velocity: VelocityFn) -> SamplerStep:
    """Return Euler's rule: first order, one evaluation an interval."""

    def step(latents: Tensor, time: float, next_time: float) -> Tensor:
        return latents + (next_time - time) * velocity(latents, time)

    return step


def heun(velocity: VelocityFn) -> SamplerStep:
    """Return Heun's trapezoidal rule: second order, two evaluations an interval."""

    def step(latents: Tensor, time: float, next_time: float) -> Tensor:
        here = velocity(latents, time)
        there = velocity(latents + (next_time - time) * here, next_time)
        return latents + (next_time - time) * 0.5 * (here + there)

    return step


def dpmpp_2m(velocity: VelocityFn) -> SamplerStep:
    """Return DPM-Solver++ 2M for the straight path: second order, one evaluation an interval (arXiv 2211.01095).

    As there, the linear part of the path is solved exactly and only the prediction of x_0 is approximated, from the
    last two:

        x' = t'/t x + t' * integral of x_0(u) / u^2 from u = t' to t

    The paper extends x_0 linearly in lam = log((1 - t) / t), which is infinite at both ends of this path and costs the
    second order there; here it is linear in t, x_0(u) = x_0 + slope (u - t), which has no such ends.
    """
    earlier: list[tuple[float, Tensor]] = []

    def step(latents: Tensor, time: float, next_time: float) -> Tensor:
        x_0 = latents - time * velocity(latents, time)
        kept = next_time / time
        moved = kept * latents + (1 - kept) * x_0
        if earlier:
            before, x_0_before = earlier[0]
            weight = (next_time * math.log(time / next_time) if next_time > 0.0 else 0.0) - (time - next_time)
            moved = moved + weight / (time - before) * (x_0 - x_0_before)
        earlier[:] = [(time, x_0)]
        return moved

    return step


def euler_ancestral(velocity: VelocityFn, noise: NoiseFn, eta: float) -> SamplerStep:
    """Return a stochastic rule: Euler's step to a time below the next, and noise back up to it (weak order one).

    The noise taken and given grows with the interval, so the path tends to a stochastic differential equation with the
    same distributions; errors of early steps are forgotten on the way. The last step to t = 0 adds none.

    Args:
        noise: asked once an interval.
        eta: share of the noise that is renewed; 0 is Euler's rule.
    """

    def step(latents: Tensor, time: float, next_time: float) -> Tensor:
        below = next_time * (1 + eta * (next_time / time - 1))
        latents = latents + (below - time) * velocity(latents, time)
        signal = (1 - next_time) / (1 - below)
        variance = next_time**2 - (signal * below) ** 2
        return signal * latents + math.sqrt(max(variance, 0.0)) * noise() if next_time > 0.0 else latents

    return step


def make_sampler(sample: SampleConfig, noise: NoiseFn) -> Callable[[VelocityFn], SamplerStep]:
    """Return the rule that a recipe names; `noise` is for the stochastic one."""
    rules: dict[str, Callable[[VelocityFn], SamplerStep]] = {
        "euler": euler,
        "heun": heun,
        "dpmpp_2m": dpmpp_2m,
        "euler_ancestral": partial(euler_ancestral, noise=noise, eta=sample.eta),
    }
    return rules[sample.sampler]
