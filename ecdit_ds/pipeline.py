"""From prompts to pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.manifest import MANIFEST_NAME
from ecdit_ds.checkpoint.reader import Reader, newest_valid
from ecdit_ds.config import Recipe, SampleConfig
from ecdit_ds.data.encode import check_digit_scenes
from ecdit_ds.data.encoders import ImageEncoder, PixelCodec, TextEmbeddings, TextEncoder, WordEncoder
from ecdit_ds.errors import CheckpointError, ConfigError
from ecdit_ds.flow.guidance import guided
from ecdit_ds.flow.objective import Predicted, draw_noise
from ecdit_ds.flow.samplers import StepCallback, VelocityFn, sampler_named, time_grid
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.parallel.layers import SerialLayers
from ecdit_ds.recipe_file import recipe_from_dict


def encoders_of(recipe: Recipe) -> tuple[ImageEncoder, TextEncoder]:
    """Return the frozen encoders that a recipe's data goes through."""
    text = WordEncoder(embed_dim=recipe.model.text_embed_dim, max_tokens=recipe.model.max_text_tokens)
    return PixelCodec(), text


def check_encodable(recipe: Recipe) -> None:
    """Check, before anything is trained, that the encoders fit the model and the recipe's prompts fit the encoder.

    Raises:
        DataError: naming the fields, or the prompt that is too long.
    """
    image_encoder, text_encoder = encoders_of(recipe)
    check_digit_scenes(recipe.model, image_encoder, text_encoder)
    if recipe.sample.prompts:
        text_encoder.encode(recipe.sample.prompts)


@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """A model with its encoders."""

    model: nn.Module
    """As `flow.objective.VelocityModel`."""
    recipe: Recipe
    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    device: torch.device

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], *, seed: int, sample: SampleConfig, callback: StepCallback | None = None
    ) -> Tensor:
        """Return images_B3HW in [-1, 1], one a prompt; prompt i starts from noise of (seed, i).

        Args:
            sample: sampler, number of steps and guidance.
            callback: told the latents at the start of each interval.

        Raises:
            DataError: a prompt is longer than the text encoder takes.
        """
        config, count = self.recipe.model, len(prompts)
        # A pool of several images must be full: repeat the last prompt, draw it, and drop it.
        group = config.routing_group
        padded = list(prompts) + [prompts[-1]] * (-count % group)
        shape = (config.in_channels, config.latent_height, config.latent_width)
        latents = draw_noise(shape, torch.arange(len(padded)), seed, "sample").to(self.device)
        velocity = guided(
            self.velocity(self.text_encoder.encode(padded)),
            self.velocity(self.text_encoder.null()),
            sample.guidance_scale,
        )
        times = time_grid(sample.num_steps, self.recipe.flow.timestep_shift)
        latents = sampler_named(sample.sampler)(velocity, latents, times, callback)
        return self.image_encoder.decode(latents)[:count]

    def velocity(self, text: TextEmbeddings) -> VelocityFn:
        """Return the velocity under `text`, one caption for each image or one for all."""
        embeds, mask, pooled = (t.to(self.device) for t in (text.embeds_BTD, text.mask_BT, text.pooled_BD))

        def velocity(latents: Tensor, timesteps_B: Tensor) -> Tensor:
            texts = (t.expand(len(latents), *t.shape[1:]) for t in (embeds, mask, pooled))
            prediction: Predicted = self.model(latents, timesteps_B.to(self.device), *texts)
            return prediction.velocity_BCHW

        return velocity


def open_checkpoint(path: Path) -> Reader:
    """Open a checkpoint folder, or the newest valid checkpoint of a run's folder.

    Raises:
        CheckpointError: neither, or damaged.
    """
    if (path / MANIFEST_NAME).is_file():
        return Reader(path)
    for root in (path / "checkpoints", path):
        reader, rejections = newest_valid(root)
        for rejection in rejections:
            print(f"skipped {rejection}")
        if reader is not None:
            return reader
    raise CheckpointError(f"--checkpoint {path}: is neither a checkpoint nor a run with checkpoints")


def load_pipeline(path: Path, *, weights: str = "ema", device: torch.device | None = None) -> TextToImage:
    """Load a model for sampling, from any layout's checkpoint, in one process.

    Args:
        path: a checkpoint or a run's folder.
        weights: `ema` for the average, `weight` for the last step's.

    Raises:
        CheckpointError: missing or damaged.
    """
    reader = open_checkpoint(path)
    try:
        recipe = recipe_from_dict(dict(reader.manifest.meta["recipe"]))
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{reader.folder}: its recipe cannot be used: {error}") from None
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ECDiT(recipe.model, SerialLayers()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            reader.expect(f"{weights}/{name}", shape)
            reader.read_into(f"{weights}/{name}", Box((0,) * len(shape), shape), parameter)
    image_encoder, text_encoder = encoders_of(recipe)
    return TextToImage(
        model=model.to(device), recipe=recipe, image_encoder=image_encoder, text_encoder=text_encoder, device=device
    )
