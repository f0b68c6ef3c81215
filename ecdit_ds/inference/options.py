"""What the flags of tools that draw mean: which model, how it draws, and what is written down of both."""

import argparse
from collections.abc import Sequence
from contextlib import suppress

import torch

from ecdit_ds.data.digit_scenes.dataset import is_of_digit_scenes
from ecdit_ds.errors import ConfigError, DataError
from ecdit_ds.inference.image_folder import OF_SCENES, GenerationSettings
from ecdit_ds.inference.load import (
    DeviceMapConfig,
    EncoderFolders,
    ModelCheckpoint,
    load_generator,
    load_with_device_map,
)
from ecdit_ds.inference.ranks import DistributedContext
from ecdit_ds.inference.text_to_image import TextToImage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def encoder_folders(options: argparse.Namespace) -> EncoderFolders:
    """Return what these flags say."""
    return EncoderFolders(vae=options.vae, text=options.text or ())


def load_for(crew: DistributedContext, options: argparse.Namespace) -> TextToImage:
    """Return this process's model.

    Raises:
        CheckpointError: as `load_generator`.
        ConfigError: flags that exclude one another.
    """
    dtype = DTYPES[options.dtype]
    if options.device_map is None:
        if options.max_memory or options.offload_folder is not None:
            raise ConfigError("--max-memory and --offload-folder have no effect without --device-map auto; add it")
        return crew.world.run_on_all(
            lambda: load_generator(
                options.checkpoint,
                kind=options.weights,
                dtype=dtype,
                device=crew.device,
                layers=crew.layers,
                folders=encoder_folders(options),
            )
        )
    if crew.world.size > 1:
        raise ConfigError(f"--device-map: is for one process, but {crew.world.size} were started; use --tp and --ep")
    spread = DeviceMapConfig(max_memory=_memory(options.max_memory), offload_folder=options.offload_folder)
    return load_with_device_map(
        options.checkpoint, spread, kind=options.weights, dtype=dtype, folders=encoder_folders(options)
    )


def brush_for(drawer: TextToImage, options: argparse.Namespace) -> GenerationSettings:
    """Return how the command line wants pictures drawn.

    Raises:
        EcditError: a setting or size that cannot work.
    """
    require_batch(options)
    sample = drawer.settings(
        num_steps=options.steps,
        sampler=options.sampler,
        eta=options.eta,
        guidance_scale=options.guidance,
        guidance_interval=options.guidance_interval,
        capacity_factor=options.capacity_factor,
    )
    if options.negative_prompt is not None and sample.guidance_scale == 1.0:
        raise ConfigError("--negative-prompt: has no effect with a guidance of 1.0; leave it out or raise --guidance")
    drawer.latent_shape(options.height, options.width)
    return GenerationSettings(
        drawer=drawer,
        sample=sample,
        batch_size=options.batch_size,
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
    )


def require_batch(options: argparse.Namespace) -> None:
    """Refuse to draw no pictures at a time."""
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size: {options.batch_size} pictures at a time are none; give 1 or more")


def generation_metadata(stored: ModelCheckpoint, options: argparse.Namespace) -> dict[str, object]:
    """Return what besides drawing settings decides how a picture looks."""
    return {
        "checkpoint": f"{stored.folder.resolve().name} {stored.identity}",
        "recipe": stored.recipe.name,
        "step": stored.step,
        "weights": stored.kind,
        "dtype": options.dtype,
    }


def origin_of(stored: ModelCheckpoint) -> dict[str, object]:
    """Return the note of a gallery that says what its model was trained on, where that is known."""
    recipe, is_of = stored.recipe, None
    with suppress(DataError):  # a set that is damaged now is of no concern to drawing
        is_of = is_of_digit_scenes(recipe.data, recipe.model, stored.encoders)
    return {} if is_of is None else {OF_SCENES: is_of}


def _memory(given: Sequence[str]) -> dict[int | str, int | str] | None:
    memory: dict[int | str, int | str] = {}
    for text in given:
        device, separator, size = text.partition("=")
        if not (separator and device and size):
            raise ConfigError(f"--max-memory {text}: write DEVICE=SIZE, such as 0=70GiB or cpu=100GiB")
        memory[int(device) if device.isdecimal() else device] = int(size) if size.isdecimal() else size
    return memory or None
