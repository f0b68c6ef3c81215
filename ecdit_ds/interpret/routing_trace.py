"""Which expert took which patch, at every step of a drawing and in every layer of experts.

Suffixes: T steps, L layers of experts, B images, E experts, S tokens, H, W patches of a picture or pixels of an image,
C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor, nn

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import SampleConfig
from ecdit_ds.errors import ConfigError, NonFiniteError
from ecdit_ds.flow.samplers import StepCallback, VelocityFn
from ecdit_ds.inference.images import to_uint8
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.model.moe import ExpertChoiceRouter, Routing, with_capacity_factor


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """One drawing, and where its experts went."""

    image_HWC: npt.NDArray[np.uint8]
    """The finished picture."""
    steps: list[int]
    """The intervals of the time grid that were looked at, from 0."""
    times: list[float]
    """t at the start of each."""
    states_THWC: npt.NDArray[np.uint8]
    """What the latents were there, decoded."""
    layers: list[int]
    """The layers of experts, as the model counts its layers, from 0."""
    taken_TLEHW: npt.NDArray[np.bool_]
    """Whether an expert took a patch."""
    expected: float
    """Mean experts per patch of a pool: E * C / S."""

    @property
    def counts_TLHW(self) -> npt.NDArray[np.int64]:
        """How many experts took each patch."""
        return self.taken_TLEHW.sum(axis=2, dtype=np.int64)


def require_expert_choice(config: ModelConfig) -> None:
    """Check that there is routing to look at.

    Raises:
        ConfigError: the model has no expert-choice layer.
    """
    if config.ffn != "expert_choice":
        raise ConfigError(f"model.ffn: {config.ffn} has no expert-choice layers, so there is no routing to show")


def trace_routing(
    pipeline: TextToImage,
    prompt: str,
    *,
    seed: int,
    sample: SampleConfig,
    steps: Sequence[int] | None = None,
    callback: StepCallback | None = None,
) -> RoutingTrace:
    """Draw `prompt` once and record the routing of the conditional velocity at the latents the sampler passed through.

    In a pool of several images all are of this prompt, and the first is recorded.

    Args:
        steps: intervals of the time grid, from 0; None for all.
        callback: told the latents at the start of each interval, while drawing.

    Raises:
        ConfigError: the model has no expert-choice layer.
        DataError: the prompt is longer than the text encoder takes.
        NonFiniteError: as `TextToImage.draw`.
    """
    config = pipeline.recipe.model
    require_expert_choice(config)
    prompts = [prompt] * config.routing_group  # a full pool
    image_HWC, passed = _draw(pipeline, prompts, seed, sample, callback)
    steps = list(range(len(passed)) if steps is None else steps)
    velocity = pipeline.velocity(pipeline.text_encoder.encode(prompts))
    with with_capacity_factor(pipeline.model, sample.capacity_factor):
        routed = [route_images(pipeline, velocity, passed[step][1], passed[step][0]) for step in steps]
    with torch.no_grad():
        states = [to_uint8(pipeline.decode(passed[step][1][:1], prompts[:1]))[0] for step in steps]
    return RoutingTrace(
        image_HWC=image_HWC,
        steps=steps,
        times=[passed[step][0] for step in steps],
        states_THWC=np.stack(states),
        layers=expert_layers(config),
        taken_TLEHW=np.stack([taken_LBEHW[:, 0] for taken_LBEHW in routed]),
        expected=expected_experts(config, sample.capacity_factor),
    )


def _draw(
    pipeline: TextToImage, prompts: list[str], seed: int, sample: SampleConfig, callback: StepCallback | None
) -> tuple[npt.NDArray[np.uint8], list[tuple[float, Tensor]]]:
    """Return the first picture, and the time and the latents at the start of each interval."""
    passed: list[tuple[float, Tensor]] = []

    def keep(step: int, time: float, latents: Tensor, /) -> None:
        passed.append((time, latents))
        if callback is not None:
            callback(step, time, latents)

    images = pipeline.draw(prompts, seeds=range(seed, seed + len(prompts)), sample=sample, callback=keep)
    return to_uint8(images)[0], passed


def expert_layers(config: ModelConfig) -> list[int]:
    """Return the layers that hold experts, from 0."""
    return [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]


def expected_experts(config: ModelConfig, factor: float | None = None) -> float:
    """Return the mean number of experts per patch of a pool: E * C / S, the capacity factor but for rounding."""
    pool_tokens = config.num_tokens * config.routing_group
    return config.num_experts * config.expert_capacity(pool_tokens, factor) / pool_tokens


@torch.no_grad()
def route_images(
    pipeline: TextToImage, velocity: VelocityFn, latents_BCHW: Tensor, time: float
) -> npt.NDArray[np.bool_]:
    """Return taken_LBEHW: whether, in each layer of experts, an expert took a patch of an image at that time.

    Raises:
        NonFiniteError: the velocity is not finite, so that routers chose among nothing.
    """
    config = pipeline.recipe.model
    rows = config.latent_height // config.patch_size

    def forward() -> None:
        if not bool(velocity(latents_BCHW, time).isfinite().all()):
            raise NonFiniteError(f"the velocity at t = {time:.4f} is not finite, so there is no routing to show")

    taken = [
        rearrange(t, "b e (n h w) -> (b n) e h w", h=rows, n=t.shape[-1] // config.num_tokens)
        for t in _taken_tokens(pipeline.model, forward)
    ]
    return torch.stack(taken).cpu().numpy()


def _taken_tokens(model: nn.Module, forward: Callable[[], None]) -> list[Tensor]:
    """Return, by layer, bool (pools, experts, tokens of a pool) of the model's next forward."""
    found: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: Any, routing: Routing) -> None:
        taken_BSE = torch.zeros_like(routing.scores_BSE, dtype=torch.bool)
        found.append(rearrange(taken_BSE, "b s e -> b e s").contiguous().scatter(-1, routing.indices_BEC, True))

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, ExpertChoiceRouter)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found
