"""Digit scenes through the embedded encoders: written once for each setting, then read like any other set.

Suffixes: B batch, C channels, H, W pixels of the canvas.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from tqdm import tqdm

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.data.digit_scenes.scenes import Split, check_canvas, draw_scene
from ecdit_ds.data.encoders.base import HashedWordEncoder, ImageEncoder, PixelVAE, TextEncoder
from ecdit_ds.data.encoders.online import check_encoders_fit
from ecdit_ds.data.encoders.spec import image_encoder_spec, text_encoder_spec
from ecdit_ds.data.latents.columns import LatentStats, null_columns, sum_stats, to_table
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.latents.index import SCHEMA_VERSION, LatentIndex, ShardInfo, read_index
from ecdit_ds.errors import DataError
from ecdit_ds.seeding import stable_seed

_ROWS_PER_BATCH = 256
_SHARD_FILE = "shard-00000.arrow"
_OF_SCENES = {"split", "count", "canvas_height", "canvas_width"}
"""Settings by which a set says that it is of digit scenes: no corpus has them."""


def open_digit_scenes(
    model: ModelConfig,
    data: DataConfig,
    *,
    split: Split,
    seed: int,
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
) -> LatentDataset:
    """Open a split of the digit scenes, encoded; write it first where `data.cache_dir` does not hold it yet.

    Args:
        model: gives the sizes of latents and text.
        data: gives the number of scenes and the folder of the cache.
        split: `train` or `heldout`.
        seed: of the corpus.
        image_encoder: its downsampling times the latent size is the canvas.
        text_encoder: must have the model's text sizes.

    Raises:
        DataError: encoders do not fit the model, the folder cannot be written, or what is there is damaged.
    """
    check_digit_scenes(model, image_encoder, text_encoder)
    settings: dict[str, str | int] = {
        "schema": SCHEMA_VERSION,
        "split": split,
        "seed": seed,
        "count": data.num_train if split == "train" else data.num_heldout,
        "canvas_height": model.latent_height * image_encoder.downsampling,
        "canvas_width": model.latent_width * image_encoder.downsampling,
        "image_encoder": image_encoder.identity,
        "text_encoder": text_encoder.identity,
    }
    digest = f"{stable_seed('digit_scenes settings', json.dumps(settings, sort_keys=True)):016x}"
    folder = Path(data.cache_dir) / f"digit_scenes-{digest}"
    try:
        if not folder.exists():  # raises where the cache may not be searched
            _write_scenes(folder, model, settings, image_encoder, text_encoder)
    except OSError as error:
        raise DataError(
            f"data.cache_dir {data.cache_dir}: cannot write {folder.name}: {error}; free space there or set "
            "data.cache_dir elsewhere"
        ) from None
    return LatentDataset(folder)


def _write_scenes(
    folder: Path,
    model: ModelConfig,
    settings: dict[str, str | int],
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
) -> None:
    """Write a split beside its place, and publish it."""
    from ecdit_ds.data.latents.shard_writer import (
        commit_dataset,
        create_staging_dir,
        write_arrow_shard,
        write_index,
        write_null_text,
    )

    draft = create_staging_dir(folder)
    try:
        parts: list[LatentStats] = []
        tables = _encode_scenes(settings, image_encoder, text_encoder, parts)
        count, size, checksum = write_arrow_shard(draft / _SHARD_FILE, tables)
        shard = ShardInfo(file=_SHARD_FILE, bucket=0, count=count, bytes=size, xxh3=checksum)
        null_text = null_columns(text_encoder, torch.float32)
        mean, std = sum_stats(parts).statistics()
        index = LatentIndex(
            schema=SCHEMA_VERSION,
            count=count,
            image_encoder=image_encoder_spec(image_encoder),
            text_encoder=text_encoder_spec(text_encoder),
            latents_dtype="float32",
            text_shape=(model.max_text_tokens, model.text_embed_dim),
            pooled_width=null_text["text_pooled"].shape[1],
            has_text=True,
            buckets=((model.in_channels, model.latent_height, model.latent_width),),
            shards=(shard,),
            latents_mean=mean,
            latents_std=std,
            settings=settings,
            **write_null_text(draft, null_text),
        )
        write_index(draft, index)
        commit_dataset(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_digit_scenes(model: ModelConfig, image_encoder: ImageEncoder, text_encoder: TextEncoder) -> None:
    """Check that the encoders fit the model and that scenes fit the canvas.

    Raises:
        DataError: naming the fields to change.
    """
    check_encoders_fit(model, image_encoder, text_encoder)
    check_canvas(*(side * image_encoder.downsampling for side in (model.latent_height, model.latent_width)))


def require_digit_scenes(
    data: DataConfig, model: ModelConfig, encoders: Mapping[str, Any] | None, what: str, way_out: str
) -> None:
    """Refuse to judge by digit scenes a model that was trained on anything else: the table would be of zeros.

    Args:
        data: of the model's recipe, as `model`.
        encoders: as `is_of_digit_scenes`.

    Raises:
        DataError: naming `what` cannot be used, what was trained on, and the way out.
    """
    if not (is_of := is_of_digit_scenes(data, model, encoders)):
        online = ", data.encode: online" if data.is_online else ""
        through = "" if encoders is None or _are_of_scenes(model, encoders) else " through encoders of others"
        gone = ", and what is not there cannot be looked at: bring it back" if is_of is None else ""
        raise DataError(
            f"{what}: only models of digit scenes draw them, and this one was trained{through} on data.dataset: "
            f"{data.dataset}{online}, data.path: {', '.join(map(repr, data.paths)) or 'none'}{gone}; {way_out}"
        )


def is_of_digit_scenes(data: DataConfig, model: ModelConfig, encoders: Mapping[str, Any] | None) -> bool | None:
    """Return whether a model has seen digit scenes alone, encoded as it began or before; None where nothing says it.

    Args:
        data: of the model's recipe, as `model`.
        encoders: what its checkpoint says of them, which a recipe that was changed since does not; None of earlier
            releases. Where a set is not there any more, they decide.
    """
    if encoders is not None and not _are_of_scenes(model, encoders):
        return False
    if data.dataset == "digit_scenes":
        return True
    if data.is_online or not data.paths:
        return False
    found = [read_index(Path(path)).settings for path in data.paths if Path(path).is_dir()]
    if not all(settings.keys() >= _OF_SCENES for settings in found):
        return False
    return True if len(found) == len(data.paths) or encoders is not None else None


def _are_of_scenes(model: ModelConfig, encoders: Mapping[str, Any]) -> bool:
    words = HashedWordEncoder(embed_dim=model.text_embed_dim, max_tokens=model.max_text_tokens)
    of_scenes = {"image": PixelVAE().identity, "text": words.identity}
    return all(
        isinstance(facts := encoders.get(what), dict) and facts.get("identity") == identity
        for what, identity in of_scenes.items()
    )


def _encode_scenes(
    settings: dict[str, str | int], image_encoder: ImageEncoder, text_encoder: TextEncoder, parts: list[LatentStats]
) -> Iterator[pa.Table]:
    """Yield tables of encoded scenes, in order, and append the sums of each to `parts`."""
    seed, count, split = int(settings["seed"]), int(settings["count"]), cast(Split, settings["split"])
    height, width = int(settings["canvas_height"]), int(settings["canvas_width"])
    # disable=None shows the bar on terminals only.
    with tqdm(total=count, desc="encoding scenes", unit="scene", disable=None) as progress:
        for start in range(0, count, _ROWS_PER_BATCH):
            indices = range(start, min(start + _ROWS_PER_BATCH, count))
            scenes = [
                draw_scene(seed=seed, split=split, index=i, canvas_height=height, canvas_width=width) for i in indices
            ]
            images_BHWC = torch.from_numpy(np.stack([scene.image_HWC for scene in scenes]))
            images_B3HW = rearrange(images_BHWC, "b h w c -> b c h w").to(torch.float32) / 127.5 - 1.0
            captions = [scene.caption for scene in scenes]
            with torch.no_grad():
                latents_BCHW, text = image_encoder.encode(images_B3HW), text_encoder.encode(captions)
            parts.append(LatentStats.of(latents_BCHW))
            yield to_table(
                keys=[f"{split}-{i}" for i in indices],
                captions=captions,
                kinds=[scene.kind for scene in scenes],
                latents_BCHW=latents_BCHW,
                text=text,
                dtype=torch.float32,
            )
            progress.update(len(scenes))
