"""The sets that a recipe names, checked against its model and each other, and opened."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe, SampleConfig
from ecdit_ds.data.digit_scenes.dataset import open_digit_scenes
from ecdit_ds.data.digit_scenes.scenes import Split
from ecdit_ds.data.encoders.base import ImageEncoder, PixelVAE, TextEncoder
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.latents.index import LatentIndex, VerifyOptions, read_index
from ecdit_ds.data.mixture import Bucket, SampleSet, held_by, shares_of
from ecdit_ds.data.normalization import Moments, codec_in, mixed, normalizing_codec, warning_of
from ecdit_ds.data.raw_dataset import count_samples, measure_pixels, open_raw_set, open_raw_source
from ecdit_ds.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What a split holds, from its sets' indexes alone."""

    count: int
    """Samples in all sets."""
    sets: Mapping[str, Fraction]
    """Path -> share of what is read."""
    buckets: Mapping[Bucket, Fraction]
    """(C, H, W) of latents -> share of what is read."""
    held: Mapping[Bucket, int]
    """(C, H, W) of latents -> samples in all sets."""
    codec: PixelVAE | None = None
    """As `pixel_codec`."""
    warning: str | None = None
    """What is to be said of latents, as the model reads them, that are far from mean 0 and deviation 1."""


def open_split(
    recipe: Recipe,
    split: Split,
    encoders: tuple[ImageEncoder, TextEncoder] | None,
    *,
    check: VerifyOptions | None = None,
) -> tuple[SampleSet, ...]:
    """Open the training sets or the held-out set of a recipe; digit scenes are encoded first where they are missing.

    Args:
        encoders: for digit scenes and raw files; an encoded corpus needs none. Where it holds pixels, they are
            normalised as these say, or, without, as the training sets do.
        check: which shards of an encoded corpus are compared with its index, and how; by default all, whole.

    Raises:
        DataError: a set does not fit the model or another one, cannot be written, or is damaged.
    """
    if recipe.data.dataset == "encoded" and not recipe.data.is_online:
        facts, given = validate_split(recipe, split), encoders[0] if encoders else None
        codec = given if isinstance(given, PixelVAE) else facts.codec
        return tuple(LatentDataset(Path(path), check=check, codec=codec) for path in _paths(recipe, split))
    assert encoders is not None, "pictures are encoded here"
    image_encoder, text_encoder = encoders
    if recipe.data.is_online:
        latents = _own_bucket(recipe.model)
        return tuple(
            open_raw_set(
                path, recipe.data, latents=latents, downsampling=image_encoder.downsampling, text_encoder=text_encoder
            )
            for path in _paths(recipe, split)
        )
    scenes = open_digit_scenes(
        recipe.model,
        recipe.data,
        split=split,
        seed=recipe.data.seed,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
    )
    return (scenes,)


def _paths(recipe: Recipe, split: Split) -> tuple[str, ...]:
    heldout = recipe.data.heldout_path
    return recipe.data.paths if split == "train" else () if heldout is None else (heldout,)


def validate_split(recipe: Recipe, split: Split) -> SplitInfo:
    """Check encoded sets by their indexes, and raw files by their names, and return what they hold.

    Raises:
        DataError: one is not named, not there, holds nothing, or does not fit the model or what it is mixed with.
    """
    key, paths = "path" if split == "train" else "heldout_path", _paths(recipe, split)
    _check_twice(f"data.{key}", paths)
    if recipe.data.is_online:
        return _check_raw(recipe, split, f"data.{key}", paths)
    if not paths:
        raise DataError(f"data.{key}: names no encoded set, which data.dataset: encoded reads; --set data.{key}=DIR")
    indexes: dict[str, LatentIndex] = {}
    for path in paths:
        if not Path(path).is_dir():
            raise DataError(f"data.{key}: {path} is no folder; encode the corpus there, or name another")
        indexes[path] = read_index(Path(path))
        _check_alike(f"data.{key}", paths[0], indexes[paths[0]], path, indexes[path])
    held = _held(indexes)
    is_of_one_size = len(set().union(*held.values())) == 1
    for path, index in indexes.items():
        who = f"data.{key}: {path}"
        for bucket in held[path]:
            _check_size(bucket, recipe, who, is_of_one_size=is_of_one_size)
        _check_texts(index, recipe.model, who)
    if split == "heldout":
        _check_encoders(indexes[paths[0]], paths[0], recipe)
    facts = _facts_of(held, recipe.data.weights if split == "train" else ())
    codec = _codec_of(recipe, indexes) if split == "train" else pixel_codec(recipe)
    latents, first = _moments_of(indexes, facts.sets), indexes[paths[0]]
    if codec is not None and first.holds_pixels:
        latents = latents.after(codec)
    warning = warning_of(latents, is_of_pixels=first.image_encoder.get("kind") == "pixels")
    return replace(facts, codec=codec, warning=warning)


def pixel_codec(recipe: Recipe) -> PixelVAE | None:
    """Return what normalises the pixels that the encoded sets of a recipe hold; None where they hold latents.

    It is what the recipe says, or follows from the training sets: the held-out set goes through the same.

    Raises:
        DataError: the recipe says it of sets that hold latents.
    """
    return _codec_of(recipe, {path: read_index(Path(path)) for path in recipe.data.paths if Path(path).is_dir()})


def _codec_of(recipe: Recipe, indexes: Mapping[str, LatentIndex]) -> PixelVAE | None:
    asked = codec_in(recipe.data)
    for path, index in indexes.items():
        if not index.holds_pixels and asked is not None:
            raise DataError(
                f"data.shift_factor: {list(recipe.data.shift_factor)} has no effect on {path}, which holds "
                f"latents of {index.image_encoder.get('identity')}; leave it out"
            )
    if asked is not None or not indexes or not all(index.holds_pixels for index in indexes.values()):
        return asked
    weights = recipe.data.weights if len(indexes) == len(recipe.data.paths) else ()
    return normalizing_codec(_moments_of(indexes, _facts_of(_held(indexes), weights).sets))


def measured_codec(data: DataConfig, model: ModelConfig, text_encoder: TextEncoder) -> PixelVAE:
    """Return what normalises the pixels of raw files: what the recipe says, or what follows from pictures looked at.

    Raises:
        DataError: a source of the training set cannot be read.
    """
    asked, bucket = codec_in(data), _own_bucket(model)
    if asked is not None or not data.paths:
        return asked or PixelVAE()
    sets = {
        path: open_raw_set(path, data, latents=bucket, downsampling=1, text_encoder=text_encoder) for path in data.paths
    }
    moments = [measure_pixels(of_set) for of_set in sets.values()]
    shares = _facts_of({path: {bucket: len(of_set)} for path, of_set in sets.items()}, data.weights).sets
    return normalizing_codec(mixed(moments, list(map(float, shares.values()))))


def _moments_of(indexes: Mapping[str, LatentIndex], shares: Mapping[str, Fraction]) -> Moments:
    """Return those of latents as the sets store them, read by their shares."""
    return mixed([index.moments for index in indexes.values()], [float(shares[path]) for path in indexes])


def _held(indexes: Mapping[str, LatentIndex]) -> dict[str, Mapping[Bucket, int]]:
    return {
        path: held_by(index.buckets, [(shard.bucket, shard.count) for shard in index.shards])
        for path, index in indexes.items()
    }


def _check_twice(key: str, paths: tuple[str, ...]) -> None:
    """Refuse a set that is named twice, be it by other names; `DataConfig` compares names alone."""
    named: dict[Path, str] = {}
    for path in paths:
        first = named.setdefault(Path(path).resolve(), path)
        if first != path:
            raise DataError(f"{key}: {first} and {path} are the same; name one, and give it a higher data.weights")


def _check_raw(recipe: Recipe, split: Split, key: str, paths: tuple[str, ...]) -> SplitInfo:
    if not paths:
        raise DataError(f"{key}: names no pictures, which data.encode: online reads; --set {key}=SRC")
    bucket = _own_bucket(recipe.model)
    held = {path: {bucket: count_samples(open_raw_source(path, recipe.data), path)} for path in paths}
    return _facts_of(held, recipe.data.weights if split == "train" else ())


def _own_bucket(model: ModelConfig) -> Bucket:
    return model.in_channels, model.latent_height, model.latent_width


def _facts_of(held: Mapping[str, Mapping[Bucket, int]], weights: tuple[float, ...]) -> SplitInfo:
    shares = shares_of(list(held.values()), weights)
    return SplitInfo(
        count=sum(sum(of_set.values()) for of_set in held.values()),
        sets={
            path: sum((of_bucket.get(number, Fraction()) for of_bucket in shares.values()), Fraction())
            for number, path in enumerate(held)
        },
        buckets={bucket: sum(of_sets.values(), Fraction()) for bucket, of_sets in shares.items()},
        held={bucket: sum(of_set.get(bucket, 0) for of_set in held.values()) for bucket in shares},
    )


def _check_alike(key: str, path: str, index: LatentIndex, other_path: str, other: LatentIndex) -> None:
    """Refuse to mix what the model would have to tell apart."""

    def channels(of_set: LatentIndex) -> list[int]:
        return sorted({bucket[0] for bucket in of_set.buckets})

    for what, here, there in (
        ("image encoder", index.image_encoder.get("identity"), other.image_encoder.get("identity")),
        ("text encoder", index.text_encoder.get("identity"), other.text_encoder.get("identity")),
        ("texts (tokens, width)", index.text_shape, other.text_shape),
        ("width of pooled texts", index.pooled_width, other.pooled_width),
        ("channels", channels(index), channels(other)),
        ("text vectors", _stored(index), _stored(other)),
    ):
        if here != there:
            raise DataError(
                f"{key}: {path} and {other_path} cannot be mixed: {what} {here} in the former, {there} in the latter; "
                "encode both alike"
            )


def _check_encoders(heldout: LatentIndex, path: str, recipe: Recipe) -> None:
    """Refuse a held-out set of other encoders than the training set's: its loss would say nothing."""
    trained = recipe.data.paths[0] if recipe.data.paths else None
    if trained is None or not Path(trained).is_dir():  # which is told where the training set is checked
        return
    index = read_index(Path(trained))
    for what, here, there in (
        ("image encoder", heldout.image_encoder.get("identity"), index.image_encoder.get("identity")),
        ("text encoder", heldout.text_encoder.get("identity"), index.text_encoder.get("identity")),
    ):
        if here != there:
            raise DataError(
                f"data.heldout_path: {path} was encoded by {what} {here}, but {trained}, which is trained "
                f"on, by {there}; encode both alike"
            )


def _stored(index: LatentIndex) -> str:
    return "stored" if index.has_text else "not stored"


def _check_size(bucket: Bucket, recipe: Recipe, who: str, *, is_of_one_size: bool) -> None:
    model = recipe.model
    channels, height, width = bucket
    own = _own_bucket(model)
    if is_of_one_size and bucket != own:
        raise DataError(
            f"{who}: holds latents {bucket}, but the model's are {own}; set "
            "model.in_channels, latent_height and latent_width to the former"
        )
    if channels != model.in_channels:
        raise DataError(
            f"{who}: holds latents of {channels} channels, but the model's have {model.in_channels}; set "
            "model.in_channels to the former"
        )
    try:
        # Of the whole recipe, since a mask must leave enough of small pictures too; drawing has sizes of its own.
        sized = replace(recipe, model=model.resized(height, width), sample=SampleConfig()).model
    except ConfigError as error:
        raise DataError(
            f"{who}: holds latents {bucket}, which the model cannot take ({error}); encode with other "
            "--buckets, or without"
        ) from None
    if sized.num_tokens > model.num_tokens:
        raise DataError(
            f"{who}: holds latents {bucket}, {sized.num_tokens} tokens, but memory is planned for the "
            f"model's {own}, {model.num_tokens} tokens; set model.latent_height and latent_width to the "
            "largest size"
        )


def _check_texts(index: LatentIndex, model: ModelConfig, who: str) -> None:
    text_shape = (model.max_text_tokens, model.text_embed_dim)
    if index.text_shape != text_shape:
        raise DataError(
            f"{who}: holds texts {index.text_shape}, but the model's are {text_shape} (tokens, width); "
            "set model.max_text_tokens and text_embed_dim to the former"
        )
    if index.pooled_width != model.text_embed_dim:
        raise DataError(
            f"{who}: holds pooled texts of width {index.pooled_width}, but the model reads them as it "
            f"reads texts, {model.text_embed_dim} wide; use encoders where they agree"
        )


def sets_without_text(recipe: Recipe) -> dict[str, LatentIndex]:
    """Return the encoded sets of a recipe whose captions the text encoder reads beside training, by their paths.

    Raises:
        DataError: a set's index cannot be read.
    """
    if recipe.data.dataset != "encoded" or recipe.data.is_online:
        return {}
    paths = [path for path in (*_paths(recipe, "train"), *_paths(recipe, "heldout")) if Path(path).is_dir()]
    indexes = {path: read_index(Path(path)) for path in paths}
    return {path: index for path, index in indexes.items() if not index.has_text}
