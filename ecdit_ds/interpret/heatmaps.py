"""Where a model spends its compute: how many experts took each patch, by layer and time.

Suffixes: B images, S image tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn

from ecdit_ds.config import SampleConfig
from ecdit_ds.errors import ConfigError
from ecdit_ds.model.moe import ExpertChoiceRouter, Routing, experts_per_token
from ecdit_ds.pictures import save_figure, to_uint8
from ecdit_ds.pipeline import TextToImage

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


@dataclass
class _RouterWatch:
    """Keeps the latest counts of the first image, from the conditional half only when it is the last to run."""

    latest: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, model: nn.Module) -> list[Any]:
        routers = [(name, m) for name, m in model.named_modules() if isinstance(m, ExpertChoiceRouter)]
        return [router.register_forward_hook(self._hook(name)) for name, router in routers]

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, routing: Routing) -> None:
            self.latest[name] = experts_per_token(routing)[0]

        return hook


def compute_maps(pipeline: TextToImage, prompt: str, *, seed: int, sample: SampleConfig) -> ComputeMaps:
    """Draw `prompt` once and count experts per patch early, in the middle and late.

    Raises:
        ConfigError: the model has no expert-choice layer.
    """
    config, model = pipeline.recipe.model, pipeline.model
    assert isinstance(model, nn.Module)
    watch = _RouterWatch()
    handles = watch.attach(model)
    if not handles:
        raise ConfigError(f"model.ffn: {config.ffn} has no expert-choice layers, so there is no routing to show")
    steps = {round(share * (sample.num_steps - 1)): name for name, share in _MOMENTS}
    taken: list[tuple[str, float, dict[str, Tensor]]] = []
    waiting: list[tuple[str, float]] = []

    def at_step(step: int, time: float, _latents: Tensor) -> None:
        # Counts of a step are known once the next begins: guidance runs the conditional half last.
        taken.extend((name, t, dict(watch.latest)) for name, t in waiting)
        waiting[:] = [(steps[step], time)] if step in steps else []

    try:
        image = pipeline.draw([prompt], seed=seed, sample=sample, callback=at_step)
    finally:
        for handle in handles:
            handle.remove()
    at_step(sample.num_steps, 0.0, image)
    rows = config.latent_height // config.patch_size
    counts = [
        torch.stack([rearrange(c[: config.num_tokens], "(h w) -> h w", h=rows) for c in by_layer.values()])
        for _, _, by_layer in taken
    ]
    return ComputeMaps(
        image_HWC=to_uint8(image)[0],
        layers=[name.split(".")[1] for name in taken[0][2]],
        moments=[(name, time) for name, time, _ in taken],
        counts=torch.stack(counts).cpu().numpy(),
        expected=config.num_experts
        * config.expert_capacity(config.num_tokens * config.routing_group)
        / (config.num_tokens * config.routing_group),
    )


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
    figure.suptitle(f'"{prompt}"', fontsize=10)
    save_figure(figure, path)
