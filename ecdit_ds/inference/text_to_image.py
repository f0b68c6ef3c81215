"""From prompts to images: what training's sample grids, the pipeline and the tools draw with."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecdit_ds.config.recipe import Recipe, SampleConfig
from ecdit_ds.config.yaml_loader import recipe_from_dict
from ecdit_ds.data.encoders.base import ImageEncoder, TextEmbeddings, TextEncoder
from ecdit_ds.errors import DataError, NonFiniteError
from ecdit_ds.flow.guidance import with_cfg
from ecdit_ds.flow.samplers import NoiseFn, StepCallback, VelocityFn, integrate, make_sampler, time_grid
from ecdit_ds.model.ecdit import ECDiT, Prediction
from ecdit_ds.model.moe import with_capacity_factor
from ecdit_ds.seeding import sample_rng


def noise_from_seeds(seeds: Sequence[int], shape: tuple[int, ...]) -> NoiseFn:
    """Return what draws noise (B, *shape): a picture's own by its seed, whoever its neighbours are."""
    generators = [sample_rng(seed, 0, "sample") for seed in seeds]

    def draw() -> Tensor:
        return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in generators]))

    return draw


@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """A model with its encoders. Under a layout each rank has its own, and all call alike."""

    model: ECDiT
    recipe: Recipe
    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    device: torch.device
    null_text: TextEmbeddings | None = None
    """What training dropped texts to; by default the text encoder's own."""

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        sample: SampleConfig,
        negative_prompts: Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Return images_B3HW in [-1, 1], one a prompt; each starts from the noise of its own seed.

        Args:
            prompts: B texts.
            seeds: as many.
            sample: sampler, number of steps, guidance and capacity factor; its prompts are not looked at.
            negative_prompts: as many, what guidance leads away from; by default it leads away from no text.
            height: image pixels; the recipe's by default.
            width: image pixels.
            callback: told the latents at the start of each interval.

        Raises:
            DataError: a prompt is longer than the text encoder takes, or the size does not fit the patches.
            NonFiniteError: latents or pictures are; raised when all of a layout's ranks are done with one another.
        """
        noise = noise_from_seeds(seeds, self.latent_shape(height, width))
        latents = self.denoise(
            prompts, noise=noise, sample=sample, negative_prompts=negative_prompts, callback=callback
        )
        return self.decode(latents, prompts)

    def decode(self, latents_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return images_B3HW in [-1, 1].

        Raises:
            NonFiniteError: naming the prompt.
        """
        images = self.image_encoder.decode(latents_BCHW)
        require_finite("pictures", images, prompts, "the decoder of latents overflows or is damaged")
        return images

    @torch.no_grad()
    def denoise(
        self,
        prompts: Sequence[str],
        *,
        noise: NoiseFn,
        sample: SampleConfig,
        negative_prompts: Sequence[str] | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Return latents_BCHW of B prompts, as `draw`; the first noise drawn is where the path starts.

        The text's keys and values are computed once and serve all steps. Images of another size than the recipe's
        shift times by the root of the ratio of tokens (SD3, arXiv 2403.03206 sec. 5.3.2).

        Raises:
            NonFiniteError: naming the prompt, and where it comes from.
        """
        texts = self.text_encoder.encode(prompts)
        null_text = self.null_text or self.text_encoder.null()
        opposite = self.text_encoder.encode(negative_prompts) if negative_prompts else null_text
        # A pool of several images must be full: repeat the last one, draw it, and drop it.
        lacking = -len(prompts) % self.recipe.model.routing_group

        def full_pools(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor[-1:].expand(lacking, *tensor.shape[1:])]) if lacking else tensor

        start = full_pools(noise()).to(self.device)

        def tell(step: int, time: float, latents: Tensor, /) -> Tensor | None:
            replaced = None if callback is None else callback(step, time, latents[: len(prompts)])
            return None if replaced is None else torch.cat([replaced.to(latents), latents[len(prompts) :]])

        velocity = with_cfg(
            self.velocity(_each(full_pools, texts)),
            self.velocity(_each(full_pools, opposite) if negative_prompts else opposite),
            sample.guidance_scale,
            (sample.guidance_interval[0], sample.guidance_interval[1]),
        )
        step = make_sampler(sample, lambda: full_pools(noise()).to(self.device))(velocity)
        times = time_grid(sample.num_steps, self.timestep_shift(start.shape))
        with with_capacity_factor(self.model, sample.capacity_factor):
            latents = integrate(step, start, times, tell)[: len(prompts)]
        require_finite("latents", latents, prompts, _cause_of_nonfinite(start, texts, opposite))
        return latents

    def velocity(self, text: TextEmbeddings) -> VelocityFn:
        """Return the velocity under `text`, one caption for each image or one for all, which is read once."""
        embeds, mask, pooled = (t.to(self.device) for t in (text.embeds_BTD, text.mask_BT, text.pooled_BD))
        with torch.no_grad():
            text_kvs = self.model.text_kv(embeds)

        def velocity(latents: Tensor, time: float) -> Tensor:
            count = len(latents)
            prediction: Prediction = self.model(
                latents,
                torch.full((count,), time, device=self.device),
                [memory.expand(count) for memory in text_kvs],
                mask.expand(count, -1),
                pooled.expand(count, -1),
            )
            return prediction.velocity_BCHW

        return velocity

    def settings(self, **given: Any) -> SampleConfig:
        """Return the recipe's drawing settings with what is given (None is not) put over them.

        Raises:
            ConfigError: no such setting, or a value that cannot work with this model.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        # What belongs to the recipe's own sampler and scale has no meaning under others.
        if chosen.get("sampler", "euler_ancestral") != "euler_ancestral":
            chosen = {"eta": 1.0} | chosen
        if chosen.get("guidance_scale") == 1.0:
            chosen = {"guidance_interval": (0.0, 1.0)} | chosen
        recipe = self.recipe.to_dict()
        return recipe_from_dict(recipe | {"sample": recipe["sample"] | chosen}).sample

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of an image; sizes left out are the recipe's.

        Raises:
            DataError: the size is not a multiple of what a patch covers.
        """
        config, pixels = self.recipe.model, self.image_encoder.downsampling
        sides = []
        for name, given, own in (("height", height, config.latent_height), ("width", width, config.latent_width)):
            side = own * pixels if given is None else given
            unit = config.patch_size * pixels
            if side < unit or side % unit:
                near = max(unit, round(side / unit) * unit)
                raise DataError(
                    f"{name}: {side} pixels is not a multiple of {unit}, which a patch covers (patch_size "
                    f"{config.patch_size} x {pixels} pixels a latent); the nearest is {near}"
                )
            sides.append(side // pixels)
        return config.in_channels, sides[0], sides[1]

    def timestep_shift(self, latents_shape: Sequence[int]) -> float:
        """Return the recipe's shift, times the root of the ratio of these latents' tokens to the recipe's."""
        config = self.recipe.model
        tokens = latents_shape[-2] * latents_shape[-1] // config.patch_size**2
        return self.recipe.flow.timestep_shift * math.sqrt(tokens / config.num_tokens)


def require_finite(what: str, values_B: Tensor, prompts: Sequence[str], cause: str) -> None:
    """Refuse NaN and infinities, of which pictures would be made as of any other numbers; the host waits.

    Args:
        what: they are called.
        values_B: one of the leading axis for each prompt.
        cause: to be told.

    Raises:
        NonFiniteError: with the first prompt they are of.
    """
    is_finite_B = values_B.flatten(1).isfinite().all(dim=1).tolist()
    if bad := [prompt for prompt, is_finite in zip(prompts, is_finite_B, strict=True) if not is_finite]:
        raise NonFiniteError(f"{len(bad)} of {len(prompts)} {what} are not finite, such as of {bad[0]!r}: {cause}")


def _cause_of_nonfinite(noise: Tensor, *texts: TextEmbeddings) -> str:
    vectors = [tensor for text in texts for tensor in (text.embeds_BTD, text.pooled_BD)]
    if not all(bool(tensor.isfinite().all()) for tensor in vectors):
        return "the text encoder's vectors are not; it overflows or is damaged"
    if not bool(noise.isfinite().all()):
        return "what they start from is not"
    return "the model overflows; use a checkpoint from before, fp32, or less guidance"


def _each(change: Callable[[Tensor], Tensor], text: TextEmbeddings) -> TextEmbeddings:
    return TextEmbeddings(
        embeds_BTD=change(text.embeds_BTD), mask_BT=change(text.mask_BT), pooled_BD=change(text.pooled_BD)
    )
