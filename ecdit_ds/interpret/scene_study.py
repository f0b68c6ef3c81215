"""Where experts go in real held-out scenes, of which it is known exactly where the objects are.

Each scene is noised as for the held-out loss, with its own noise and at the same equidistant times, and routed under
its own caption. A model of random weights goes the same way, several times over: what it shows is chance.

Suffixes: N scenes, T times, L layers of experts, P patches, H, W patches of a picture.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange

from ecdit_ds.data.digit_scenes.scenes import draw_scene
from ecdit_ds.errors import ConfigError
from ecdit_ds.evaluation.heldout import heldout_times
from ecdit_ds.flow.objective import sample_noise
from ecdit_ds.flow.rectified import interpolate
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.interpret.concentration import (
    Bools,
    Floats,
    gini,
    ink_mask,
    normalised_entropy,
    object_mask_of_scene,
    object_share,
    top_share,
    untaken_share,
)
from ecdit_ds.interpret.routing_trace import expert_layers, require_expert_choice, route_images
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.init import initialize_by_name
from ecdit_ds.parallel.expert_parallel import serial_layers

_IMAGES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class SceneCounts:
    """Experts per patch of N held-out scenes, and where their objects are."""

    times: list[float]
    layers: list[int]
    num_experts: int
    counts_NTLP: npt.NDArray[np.int64]
    in_cell_NP: Bools
    """The patches of objects' cells."""
    on_ink_NP: Bools
    """The patches with ink: a cell has margins."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measure by time and layer; NaN where it has no value."""

    mean_TL: Floats
    deviation_TL: Floats
    """Standard deviation of one of what was averaged."""
    number_TL: npt.NDArray[np.int64]
    """How many were averaged: those with a value."""

    @property
    def error_TL(self) -> Floats:
        """Standard error of the mean."""
        return self.deviation_TL / np.sqrt(np.maximum(self.number_TL, 1))


def count_scenes(pipeline: TextToImage, num_scenes: int, *, seed: int = 0) -> SceneCounts:
    """Noise the first `num_scenes` held-out scenes of the recipe's corpus and count their experts per patch.

    Args:
        seed: of the noise; 0 for that of the held-out loss.

    Raises:
        ConfigError: no scene, or a model without an expert-choice layer.
    """
    config, encoder = pipeline.recipe.model, pipeline.image_encoder
    require_expert_choice(config)
    if num_scenes < 1:
        raise ConfigError(f"--scenes {num_scenes}: is no number of scenes; give 1 or more")
    pixels = config.patch_size * encoder.downsampling
    size = {
        "canvas_height": config.latent_height * encoder.downsampling,
        "canvas_width": config.latent_width * encoder.downsampling,
    }
    # A pool is full: of several images, or, where it is a micro-batch, of the one image that sampling has.
    at_once = {"image": _IMAGES_AT_ONCE, "group": config.routing_group, "batch": 1}[config.routing_pool]
    counts, cells, ink = [], [], []
    for start in range(0, num_scenes, at_once):
        # The last pool is filled with scenes that are not counted.
        wanted = min(at_once, num_scenes - start)
        filled = at_once if config.routing_pool == "group" else wanted
        scenes = [
            draw_scene(seed=pipeline.recipe.data.seed, split="heldout", index=start + i, **size) for i in range(filled)
        ]
        images = torch.from_numpy(np.stack([scene.image_HWC for scene in scenes]))
        captions = [scene.caption for scene in scenes]
        counts.append(_count(pipeline, images, captions, start, seed)[:wanted])
        cells += [object_mask_of_scene(scene, pixels).reshape(-1) for scene in scenes[:wanted]]
        ink += [ink_mask(scene.image_HWC, pixels).reshape(-1) for scene in scenes[:wanted]]
    return SceneCounts(
        times=heldout_times().tolist(),
        layers=expert_layers(config),
        num_experts=config.num_experts,
        counts_NTLP=np.concatenate(counts),
        in_cell_NP=np.stack(cells),
        on_ink_NP=np.stack(ink),
    )


@torch.no_grad()
def _count(
    pipeline: TextToImage, images_BHWC: torch.Tensor, captions: list[str], start: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return counts (B, T, L, P) of scenes `start` and following."""
    images_B3HW = rearrange(images_BHWC, "b h w c -> b c h w").float() / 127.5 - 1.0
    latents = pipeline.image_encoder.encode(images_B3HW)
    indices = torch.arange(start, start + len(latents))
    noise = sample_noise(tuple(latents.shape[1:]), indices, seed, "heldout noise")
    velocity = pipeline.velocity(pipeline.text_encoder.encode(captions))
    by_time = []
    for time in heldout_times().tolist():
        noisy = interpolate(latents, noise, torch.full((len(latents),), time)).to(pipeline.device)
        by_time.append(route_images(pipeline, velocity, noisy, time).sum(axis=2, dtype=np.int64))
    return rearrange(np.stack(by_time), "t l b h w -> b t l (h w)")


def with_random_weights(pipeline: TextToImage, seed: int) -> TextToImage:
    """Return the same architecture as training would begin with it."""
    model = ECDiT(pipeline.recipe.model, serial_layers()).eval()
    initialize_by_name(model, seed)
    return replace(pipeline, model=model.to(pipeline.device))


def estimates(counts: SceneCounts) -> dict[str, Estimate]:
    """Return the mean and the spread over scenes of each measure.

    `cell_ratio` and `ink_ratio` are ratios of two means, since a scene's own ratio may be infinite; their deviation is
    that of the jackknife's pseudo-values, so that it makes a standard error as the others' does. Scenes without
    background, or without an object, do not take part in what compares the two.
    """
    counts_NTLP = counts.counts_NTLP
    by_scene = {
        "gini": gini(counts_NTLP),
        "entropy": normalised_entropy(counts_NTLP),
        "untaken_share": untaken_share(counts_NTLP),
        "top_share": top_share(counts_NTLP, counts.num_experts),
    }
    found = {name: _over_first(values_NTL) for name, values_NTL in by_scene.items()}
    for name, mask_NP in (("cell", counts.in_cell_NP), ("ink", counts.on_ink_NP)):
        found |= _object_estimates(name, counts_NTLP, mask_NP)
    return found


def _object_estimates(name: str, counts_NTLP: npt.NDArray[np.int64], mask_NP: Bools) -> dict[str, Estimate]:
    has_both_N = mask_NP.any(axis=1) & ~mask_NP.all(axis=1)
    shares = [object_share(c, m) for c, m in zip(counts_NTLP[has_both_N], mask_NP[has_both_N], strict=True)]
    if not shares:
        nothing = _over_first(np.full((1, *counts_NTLP.shape[1:3]), np.nan))
        return {f"{name}_{what}": nothing for what in ("experts", "background", "ratio", "rank_correlation")}
    on_object, on_background = (np.stack([getattr(s, f) for s in shares]) for f in ("on_object", "on_background"))
    return {
        f"{name}_experts": _over_first(on_object),
        f"{name}_background": _over_first(on_background),
        f"{name}_ratio": _ratio_of_means(on_object, on_background),
        f"{name}_rank_correlation": _over_first(np.stack([s.rank_correlation for s in shares])),
    }


def control_estimates(pipeline: TextToImage, num_scenes: int, *, models: int, seed: int = 0) -> dict[str, Estimate]:
    """Return what models of random weights show: the mean over models, and the deviation from one to another."""
    found = [
        estimates(count_scenes(with_random_weights(pipeline, draw), num_scenes, seed=seed)) for draw in range(models)
    ]
    return {name: _over_first(np.stack([one[name].mean_TL for one in found])) for name in found[0]}


def _over_first(values_NTL: Floats) -> Estimate:
    """Return mean and standard deviation over what has a value."""
    known = np.isfinite(values_NTL)
    size, filled = known.sum(axis=0), np.where(known, values_NTL, 0.0)
    mean = np.where(size > 0, filled.sum(axis=0) / np.maximum(size, 1), np.nan)
    squares = np.where(known, (values_NTL - mean) ** 2, 0.0).sum(axis=0)
    deviation = np.where(size > 1, np.sqrt(squares / np.maximum(size - 1, 1)), np.nan)
    return Estimate(mean_TL=mean, deviation_TL=deviation, number_TL=size)


def _ratio_of_means(above_NTL: Floats, below_NTL: Floats) -> Estimate:
    size, above, below = len(above_NTL), above_NTL.sum(axis=0), below_NTL.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = above / below
        without_one = (above - above_NTL) / (below - below_NTL)
        pseudo_values = size * ratio - (size - 1) * without_one
    return replace(_over_first(pseudo_values), mean_TL=np.where(np.isfinite(ratio), ratio, np.nan))
