"""The sets that a recipe names, checked against its model and opened."""

from pathlib import Path

from ecdit_ds.config import Recipe
from ecdit_ds.data.dataset import LatentDataset, SampleSet
from ecdit_ds.data.digit_scenes import Split
from ecdit_ds.data.encoders import ImageEncoder, TextEncoder
from ecdit_ds.data.folder import SetIndex, read_index
from ecdit_ds.data.raw_set import open_raw_set, open_raw_source
from ecdit_ds.data.scene_set import open_digit_scenes
from ecdit_ds.errors import DataError
from ecdit_ds.model_config import ModelConfig


def open_split(
    recipe: Recipe, split: Split, encoders: tuple[ImageEncoder, TextEncoder] | None, *, whole: bool = True
) -> SampleSet:
    """Open the training or the held-out set of a recipe; digit scenes are encoded first where they are missing.

    Args:
        encoders: for digit scenes and raw files; an encoded corpus needs none.
        whole: compare an encoded corpus with its checksums, which reads all of it; else with its sizes.

    Raises:
        DataError: the set does not fit the model, cannot be written, or is damaged.
    """
    if recipe.data.dataset == "digit_scenes":
        assert encoders is not None
        image_encoder, text_encoder = encoders
        return open_digit_scenes(
            recipe.model, recipe.data, split=split, seed=recipe.data.seed,
            image_encoder=image_encoder, text_encoder=text_encoder,
        )  # fmt: skip
    path = _path_of(recipe, split)
    if recipe.data.is_online:
        assert encoders is not None
        image_encoder, text_encoder = encoders
        size = (recipe.model.latent_height, recipe.model.latent_width)
        height, width = (side * image_encoder.downsampling for side in size)
        return open_raw_set(path, recipe.data, size=(height, width), text_encoder=text_encoder)
    check_split(recipe, split)
    return LatentDataset(Path(path), whole=whole)


def _paths(recipe: Recipe, split: Split) -> tuple[str, ...]:
    heldout = recipe.data.heldout_path
    return recipe.data.paths if split == "train" else () if heldout is None else (heldout,)


def _path_of(recipe: Recipe, split: Split) -> str:
    key, paths = "path" if split == "train" else "heldout_path", _paths(recipe, split)
    if not paths and recipe.data.is_online:
        raise DataError(f"data.{key}: names no pictures, which data.encode: online reads; --set data.{key}=SRC")
    if not paths:
        raise DataError(f"data.{key}: names no encoded set, which data.dataset: encoded reads; --set data.{key}=DIR")
    return paths[0]


def check_split(recipe: Recipe, split: Split) -> int:
    """Check a set by its index, or raw files by their names, without reading all; return the number of samples.

    Of archives that do not say how many they hold, each counts as one.

    Raises:
        DataError: it is not named, not there, cannot be read, or does not fit the model.
    """
    key, path = "path" if split == "train" else "heldout_path", _path_of(recipe, split)
    if recipe.data.is_online:
        units = open_raw_source(path, recipe.data).units
        return sum(unit.stop - unit.start if unit.stop >= 0 else 1 for unit in units)
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


def sets_without_text(recipe: Recipe) -> dict[str, SetIndex]:
    """Return the encoded sets of a recipe whose captions the text encoder reads beside training, by their paths.

    Raises:
        DataError: a set's index cannot be read.
    """
    if recipe.data.dataset != "encoded" or recipe.data.is_online:
        return {}
    paths = [path for path in (*_paths(recipe, "train"), *_paths(recipe, "heldout")) if Path(path).is_dir()]
    indices = {path: read_index(Path(path)) for path in paths}
    return {path: index for path, index in indices.items() if not index.has_text}
