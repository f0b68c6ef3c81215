"""The sets that a recipe names, checked against its model and opened."""

from pathlib import Path

from ecdit_ds.config import Recipe
from ecdit_ds.data.dataset import LatentDataset
from ecdit_ds.data.digit_scenes import Split
from ecdit_ds.data.encoders import ImageEncoder, TextEncoder
from ecdit_ds.data.folder import SetIndex, read_index
from ecdit_ds.data.scene_set import open_digit_scenes
from ecdit_ds.errors import DataError
from ecdit_ds.model_config import ModelConfig


def open_split(
    recipe: Recipe, split: Split, encoders: tuple[ImageEncoder, TextEncoder] | None, *, whole: bool = True
) -> LatentDataset:
    """Open the training or the held-out set of a recipe; digit scenes are encoded first where they are missing.

    Args:
        encoders: for digit scenes; an encoded corpus needs none.
        whole: compare an encoded corpus with its checksums, which reads all of it; else with its sizes.

    Raises:
        DataError: the set does not fit the model, cannot be written, or is damaged.
    """
    if encoders is not None:
        image_encoder, text_encoder = encoders
        return open_digit_scenes(
            recipe.model, recipe.data, split=split, seed=recipe.data.seed,
            image_encoder=image_encoder, text_encoder=text_encoder,
        )  # fmt: skip
    check_split(recipe, split)
    return LatentDataset(Path(_paths(recipe, split)[0]), whole=whole)


def _paths(recipe: Recipe, split: Split) -> tuple[str, ...]:
    heldout = recipe.data.heldout_path
    return recipe.data.paths if split == "train" else () if heldout is None else (heldout,)


def check_split(recipe: Recipe, split: Split) -> int:
    """Check an encoded set by its index, without reading it whole, and return its number of samples.

    Raises:
        DataError: it is not named, not there, or does not fit the model.
    """
    key, paths = "path" if split == "train" else "heldout_path", _paths(recipe, split)
    if not paths:
        raise DataError(f"data.{key}: names no encoded set, which data.dataset: encoded reads; --set data.{key}=DIR")
    path = paths[0]
    if not Path(path).is_dir():
        raise DataError(f"data.{key}: {path} is no folder; encode the corpus there, or name another")
    index = read_index(Path(path))
    _check_fits(index, recipe.model, f"data.{key}: {path}")
    return index.count


def _check_fits(index: SetIndex, model: ModelConfig, who: str) -> None:
    latents_shape = (model.in_channels, model.latent_height, model.latent_width)
    text_shape = (model.max_text_tokens, model.text_embed_dim)
    held = " and ".join(map(str, index.buckets))
    if len(index.buckets) > 1:
        raise DataError(f"{who}: holds latents {held}, but training reads sets of one size; encode without --buckets")
    if latents_shape not in index.buckets:
        raise DataError(f"{who}: holds latents {held}, but the model's are {latents_shape}; set "
                        "model.in_channels, latent_height and latent_width to the former")  # fmt: skip
    if index.text_shape != text_shape:
        raise DataError(f"{who}: holds texts {index.text_shape}, but the model's are {text_shape} (tokens, width); "
                        "set model.max_text_tokens and text_embed_dim to the former")  # fmt: skip
    if index.pooled_width != model.text_embed_dim:
        raise DataError(f"{who}: holds pooled texts of width {index.pooled_width}, but the model reads them as it "
                        f"reads texts, {model.text_embed_dim} wide; use encoders where they agree")  # fmt: skip
