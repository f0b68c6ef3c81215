"""Classifier-free guidance as a wrapper around the velocity function."""

from torch import Tensor

from ecdit_ds.flow.samplers import VelocityFn


def guided(conditional: VelocityFn, unconditional: VelocityFn, guidance_scale: float) -> VelocityFn:
    """Return v_null + s * (v_text - v_null); s = 1 is the conditional velocity, and costs one evaluation.

    The two halves are two calls, never one concatenated batch: with pools of several images, an expert would
    otherwise choose between an image and its own unconditional twin.
    """
    if guidance_scale == 1.0:
        return conditional

    def velocity(latents: Tensor, timesteps_B: Tensor) -> Tensor:
        v_null = unconditional(latents, timesteps_B)
        return v_null + guidance_scale * (conditional(latents, timesteps_B) - v_null)

    return velocity
