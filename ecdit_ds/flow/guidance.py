"""Classifier-free guidance as a wrapper around the velocity function."""

from torch import Tensor

from ecdit_ds.flow.samplers import VelocityFn


def with_cfg(
    conditional: VelocityFn,
    unconditional: VelocityFn,
    guidance_scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> VelocityFn:
    """Return v_null + s * (v_text - v_null); s = 1 is the conditional velocity, and costs one evaluation.

    The two halves are two calls, never one concatenated batch: with pools of several images, an expert would
    otherwise choose between an image and its own unconditional twin.

    Args:
        conditional: under the prompt.
        unconditional: under no text, or under what the picture shall not show.
        guidance_scale: s.
        interval: times, ends included, within which guidance acts (Kynkaanniemi et al., arXiv 2404.07724); outside it
            the conditional velocity is used.
    """
    if guidance_scale == 1.0:
        return conditional

    def velocity(latents: Tensor, time: float) -> Tensor:
        v_text = conditional(latents, time)
        if not interval[0] <= time <= interval[1]:
            return v_text
        v_null = unconditional(latents, time)
        return v_null + guidance_scale * (v_text - v_null)

    return velocity
