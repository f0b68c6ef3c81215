"""Where a model spends its compute: how many experts took each patch, by layer and time.

Suffixes: B images, S image tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn

from ecdit_ds.config import SampleConfig
from ecdit_ds.drawing import TextToImage
from ecdit_ds.errors import ConfigError
from ecdit_ds.model.moe import ExpertChoiceRouter, Routing, experts_per_token
from ecdit_ds.pictures import save_figure, to_uint8

_MOMENTS = (("early", 0.1), ("middle", 0.5), ("late", 0.9))


@dataclass(frozen=True, kw_only=True)
class ComputeMaps:
    """Experts per patch of one drawn picture."""

    image_HWC: np.ndarray
    layers: list[str]
    moments: list[tuple[str, float]]
    """Name and time t of each moment."""
    counts: np.ndarray
    """(moments, layers, rows, columns): how many experts took each patch."""
    expected: float
    """Mean experts per patch."""


def compute_maps(pipeline: TextToImage, prompt: str, *, seed: int, sample: SampleConfig) -> ComputeMaps:
    """Draw `prompt` once and count experts per patch early, in the middle and late.

    The counts are those of the conditional velocity at the latents which the sampler passed through.

    Raises:
        ConfigError: the model has no expert-choice layer.
    """
    config = pipeline.recipe.model
    if config.ffn != "expert_choice":
        raise ConfigError(f"model.ffn: {config.ffn} has no expert-choice layers, so there is no routing to show")
    passed: list[tuple[float, Tensor]] = []

    def watch(_step: int, time: float, latents: Tensor, /) -> None:
        passed.append((time, latents))

    prompts = [prompt] * config.routing_group  # a full pool
    image = pipeline.draw(prompts, seeds=[seed] * len(prompts), sample=sample, callback=watch)
    velocity = pipeline.velocity(pipeline.text_encoder.encode(prompts))
    moments, counts = [], []
    steps = {round(share * (len(passed) - 1)): name for name, share in _MOMENTS}  # fewer when there are few steps
    for step, name in steps.items():
        time, latents = passed[step]
        by_layer = _experts_per_patch(pipeline, lambda: velocity(latents, time))  # noqa: B023
        moments.append((name, time))
        counts.append(torch.stack(list(by_layer.values())))
    pool = config.num_tokens * config.routing_group
    return ComputeMaps(
        image_HWC=to_uint8(image)[0],
        layers=[name.split(".")[1] for name in by_layer],
        moments=moments,
        counts=torch.stack(counts).cpu().numpy(),
        expected=config.num_experts * config.expert_capacity(pool) / pool,
    )


@torch.no_grad()
def _experts_per_patch(pipeline: TextToImage, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return, by router, (rows, columns) counts of the first image in the model's next forward."""
    config, counts = pipeline.recipe.model, dict[str, Tensor]()

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, routing: Routing) -> None:
            tokens = experts_per_token(routing)[0][: config.num_tokens]
            counts[name] = rearrange(tokens, "(h w) -> h w", h=config.latent_height // config.patch_size)

        return hook

    routers = [(name, m) for name, m in pipeline.model.named_modules() if isinstance(m, ExpertChoiceRouter)]
    handles = [router.register_forward_hook(watch(name)) for name, router in routers]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def save_compute_maps(maps: ComputeMaps, prompt: str, path: Path) -> None:
    """Write one picture: the drawing, and beside it a map for each MoE layer (across) and moment (down)."""
    moments, layers = maps.counts.shape[:2]
    figure = Figure(figsize=(2.2 * (layers + 1) + 0.8, 2.3 * moments + 0.5), layout="constrained")
    axes = figure.subplots(moments, layers + 1, squeeze=False)
    height, width = maps.image_HWC.shape[:2]
    top = maps.counts.max()
    for row, (name, time) in enumerate(maps.moments):
        axes[row, 0].imshow(maps.image_HWC, interpolation="nearest")
        axes[row, 0].set_ylabel(f"{name}, t = {time:.2f}")
        for column in range(layers):
            axis = axes[row, column + 1]
            axis.imshow(maps.image_HWC, interpolation="nearest", extent=(0, width, height, 0))
            shown = axis.imshow(
                maps.counts[row, column], cmap="inferno", vmin=0, vmax=top, alpha=0.8, extent=(0, width, height, 0),
                interpolation="nearest",
            )  # fmt: skip
            if row == 0:
                axis.set_title(f"layer {maps.layers[column]}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(shown, ax=axes[:, 1:], label=f"experts per patch (mean {maps.expected:g})")
    figure.suptitle(f'"{prompt}"', fontsize=10, parse_math=False)
    save_figure(figure, path)
