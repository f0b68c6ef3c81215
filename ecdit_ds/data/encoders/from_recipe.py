"""The frozen encoders that a recipe's data goes through, and what a checkpoint says of them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.digit_scenes.dataset import check_digit_scenes
from ecdit_ds.data.encoders.base import HashedWordEncoder, ImageEncoder, PixelVAE, TextEmbeddings, TextEncoder
from ecdit_ds.data.encoders.folders import folder_of
from ecdit_ds.data.encoders.online import check_encoders_fit
from ecdit_ds.data.encoders.pretrained import load_image_encoder, load_text_encoder
from ecdit_ds.data.encoders.spec import (
    image_encoder_spec,
    null_text_facts,
    open_image_encoder,
    open_text_encoder,
    text_encoder_spec,
)
from ecdit_ds.data.latents.index import read_index
from ecdit_ds.data.splits import measured_codec, pixel_codec, sets_without_text
from ecdit_ds.errors import DataError


def encoders_of(recipe: Recipe, device: torch.device | None = None) -> tuple[ImageEncoder, TextEncoder]:
    """Return the frozen encoders that a recipe's data goes through; those of the last call are kept.

    Args:
        device: where encoders with weights are; by default in host memory.

    Raises:
        DataError: those that an encoded set was made with, or that the recipe names, are not where it says.
    """
    data, model, place = recipe.data, recipe.model, str(device or "cpu")
    if data.is_online:
        return _encoders_online(data, model, place)
    if data.dataset == "encoded":
        if not data.paths:
            raise DataError("data.path: names no encoded set, which would say what encoders draw; --set data.path=DIR")
        image_encoder, text_encoder = _encoders_of_set(data.paths[0], place)  # of several sets, all have the same
        return pixel_codec(recipe) or image_encoder, text_encoder
    return PixelVAE(), HashedWordEncoder(embed_dim=model.text_embed_dim, max_tokens=model.max_text_tokens)


def fetch_typed(data: DataConfig, overrides: Sequence[str]) -> None:
    """Fetch frozen encoders whose names on the hub were typed; those of a recipe's file are never asked for.

    Args:
        overrides: of the command line, such as `data.vae=NAME`.

    Raises:
        DataError: the hub does not give one.
    """
    typed = {override.partition("=")[0].strip() for override in overrides} if data.is_online else set()
    if "data.vae" in typed and data.vae:
        folder_of(data.vae, "image encoder", may_fetch=True, revision=None)
    for name in data.text if "data.text" in typed else ():
        folder_of(name, "text encoder", may_fetch=True, revision=None)


def describe_encoders(recipe: Recipe, null_text: TextEmbeddings, device: torch.device | None = None) -> dict[str, Any]:
    """Return what a checkpoint says of the encoders of its run, as JSON: drawing from it needs nothing else.

    Those of an encoded set are not loaded.

    Args:
        null_text: what training drops texts to.
        device: as `encoders_of`, where the run has them.
    """
    data = recipe.data
    if data.dataset == "encoded" and not data.is_online:
        index = read_index(Path(data.paths[0]))
        codec = pixel_codec(recipe)
        image, text = image_encoder_spec(codec) if codec else dict(index.image_encoder), dict(index.text_encoder)
    else:
        image_encoder, text_encoder = encoders_of(recipe, device)
        image = image_encoder_spec(image_encoder, data.vae and place_of(data.vae))
        text = text_encoder_spec(text_encoder, [place_of(name) for name in data.text])
    return {"image": image, "text": text, "null_text": null_text_facts(null_text)}


def earlier_encoder_facts(recipe: Recipe) -> dict[str, Any]:
    """Return the same, without the text of no text, for a checkpoint of a release that did not say it.

    All pixels went through the factors of digit scenes then, whatever the set holds by now.

    Raises:
        DataError: the encoded set that the recipe names is not there.
    """
    data, model = recipe.data, recipe.model
    image = image_encoder_spec(PixelVAE())
    text = text_encoder_spec(HashedWordEncoder(embed_dim=model.text_embed_dim, max_tokens=model.max_text_tokens))
    if data.dataset == "encoded" and not data.is_online:
        if not data.paths:
            raise DataError("data.path: names no encoded set, which would say what encoders draw; --set data.path=DIR")
        index = read_index(Path(data.paths[0]))
        image, text = image if index.holds_pixels else dict(index.image_encoder), dict(index.text_encoder)
    if data.vae:
        image = image_encoder_spec(load_image_encoder(data.vae, may_fetch=False), data.vae)
    if data.text:
        encoder = load_text_encoder(data.text, max_tokens=model.max_text_tokens, may_fetch=False)
        text = text_encoder_spec(encoder, data.text)
    return {"image": image, "text": text}


def place_of(name: str) -> str:
    """Return a folder's absolute path, or a hub name as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


@functools.lru_cache(maxsize=1)
def _encoders_of_set(path: str, device: str) -> tuple[ImageEncoder, TextEncoder]:
    index = read_index(Path(path))
    at = torch.device(device)
    return open_image_encoder(index.image_encoder, device=at), open_text_encoder(index.text_encoder, device=at)


@functools.lru_cache(maxsize=1)
def _encoders_online(data: DataConfig, model: ModelConfig, device: str) -> tuple[ImageEncoder, TextEncoder]:
    at = torch.device(device)
    text: TextEncoder = HashedWordEncoder(embed_dim=model.text_embed_dim, max_tokens=model.max_text_tokens)
    if data.text:
        text = load_text_encoder(data.text, max_tokens=model.max_text_tokens, device=at, may_fetch=False)
    if data.vae is None:
        return measured_codec(data, model, text), text
    return load_image_encoder(data.vae, device=at, may_fetch=False), text


def runs_encoders(recipe: Recipe) -> bool:
    """Return whether frozen encoders run beside training: raw files are read, or sets without text vectors."""
    return recipe.data.is_online or bool(sets_without_text(recipe))


def check_encodable(recipe: Recipe, device: torch.device | None = None) -> None:
    """Check, before anything is trained, that the encoders fit the model and the recipe's prompts fit the encoder.

    Args:
        device: of the encoders, as `encoders_of` has it.

    Raises:
        DataError: naming the fields, or the prompt that is too long.
    """
    is_corpus = recipe.data.dataset == "encoded"
    if is_corpus and recipe.sample.scenes_per_kind:
        raise DataError(
            f"sample.scenes_per_kind: {recipe.sample.scenes_per_kind} with data.dataset: encoded: only models of "
            "digit scenes draw them; leave it out"
        )
    if recipe.data.is_online:
        check_encoders_fit(recipe.model, *encoders_of(recipe, device))
    elif not is_corpus:
        check_digit_scenes(recipe.model, *encoders_of(recipe, device))
    for path, index in sets_without_text(recipe).items():
        given, wanted = encoders_of(recipe, device)[1].identity, index.text_encoder["identity"]
        if given != wanted:
            raise DataError(
                f"{path}: its captions are for the text encoder {wanted}, but those of data.path go "
                f"through {given}; encode it with the latter"
            )
    if recipe.sample.prompts:
        encoders_of(recipe, device)[1].encode(recipe.sample.prompts)
