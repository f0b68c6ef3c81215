"""Encoded corpora on disk: written once through both encoders, then read memory-mapped.

Encoders run before training, not in it. One folder per setting holds what they gave; `folder.py` keeps the folders.

Suffixes: B batch, C channels, H, W pixels (of the canvas or of the latents), T text tokens, D text_embed_dim.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ecdit_ds.config import DataConfig, Recipe
from ecdit_ds.data.columns import DTYPES, LatentSums, null_columns, table_of, total_of
from ecdit_ds.data.digit_scenes import Split, draw_scene
from ecdit_ds.data.encoder_facts import image_facts, text_facts
from ecdit_ds.data.encoders import ImageEncoder, TextEmbeddings, TextEncoder
from ecdit_ds.data.folder import (
    SCHEMA_VERSION,
    SetIndex,
    ShardInfo,
    new_draft,
    publish_set,
    read_index,
    read_null_text,
    verify_set,
    write_arrow_shard,
    write_index,
    write_null_text,
)
from ecdit_ds.data.shard import Shard
from ecdit_ds.errors import DataError
from ecdit_ds.model_config import ModelConfig
from ecdit_ds.seeding import stable_seed

_ROWS_PER_BATCH = 256
_SHARD_FILE = "shard-00000.arrow"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One encoded image and its caption; floats are fp32."""

    latents_CHW: Tensor
    text_embeds_TD: Tensor
    text_mask_T: Tensor
    text_pooled_D: Tensor
    caption: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch of encoded images and their captions; floats are as the set stores them until `float` is asked for."""

    latents_BCHW: Tensor
    text_embeds_BTD: Tensor
    text_mask_BT: Tensor
    """bool, True at tokens."""
    text_pooled_BD: Tensor
    captions: tuple[str, ...]
    stream_index_B: Tensor
    """int64 address of each sample's randomness: its position in the training stream, or in a fixed set."""

    def float(self) -> "Samples":
        """Return the same samples as fp32; casting takes longer than reading, so it is left to who needs it."""
        return replace(
            self,
            latents_BCHW=self.latents_BCHW.to(torch.float32),
            text_embeds_BTD=self.text_embeds_BTD.to(torch.float32),
            text_pooled_BD=self.text_pooled_BD.to(torch.float32),
        )


class LatentDataset:
    """A memory-mapped encoded set; cheap to pickle and to fork, since only its paths travel."""

    def __init__(self, folder: Path, *, whole: bool = True) -> None:
        """Open a folder of encoded samples and verify it.

        Args:
            whole: read every byte and compare checksums; otherwise compare sizes alone.

        Raises:
            DataError: a file is missing or damaged; names it.
        """
        self.index = read_index(folder)
        verify_set(folder, self.index, whole=whole)
        self._shards = [_open_shard(folder, self.index, shard) for shard in self.index.shards]
        self._starts = np.cumsum([0, *(shard.count for shard in self.index.shards)])
        parts = read_null_text(folder)
        self.null_text = TextEmbeddings(
            embeds_BTD=parts["text_embeds"].float(), mask_BT=parts["text_mask"], pooled_BD=parts["text_pooled"].float()
        )
        """The text of no text, B = 1."""

    def __len__(self) -> int:
        return self.index.count

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        batch = self.gather(np.array([i]), np.array([i])).float()
        return Sample(
            latents_CHW=batch.latents_BCHW[0],
            text_embeds_TD=batch.text_embeds_BTD[0],
            text_mask_T=batch.text_mask_BT[0],
            text_pooled_D=batch.text_pooled_BD[0],
            caption=batch.captions[0],
            kind=self.texts("kind", np.array([i]))[0],
        )

    def buckets_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return which of `index.buckets` the latents of each sample have the shape of."""
        buckets = np.array([shard.bucket for shard in self.index.shards], dtype=np.int64)
        return buckets[np.searchsorted(self._starts, indices, side="right") - 1]

    def gather(self, indices: npt.NDArray[np.int64], stream_indices: npt.NDArray[np.int64]) -> Samples:
        """Return the samples at `indices`, in that order, repeats allowed; floats are as they are stored.

        Args:
            indices: int64 (B,) in [0, len(self)), all of one bucket.
            stream_indices: int64 (B,), carried along as `stream_index_B`.
        """
        buckets = np.unique(self.buckets_of(indices))
        assert len(buckets) == 1, f"samples of buckets {buckets.tolist()} in one batch"
        num_tokens, embed_dim = self.index.text_shape
        stored = DTYPES[self.index.latents_dtype]

        def read(column: str, dtype: torch.dtype, *row_shape: int) -> Tensor:
            return self._read_column(column, indices, dtype, row_shape)

        return Samples(
            latents_BCHW=read("latents", stored, *self.index.buckets[buckets[0]]),
            text_embeds_BTD=read("text_embeds", stored, num_tokens, embed_dim),
            text_mask_BT=read("text_mask", torch.bool, num_tokens),
            text_pooled_BD=read("text_pooled", stored, self.index.pooled_width),
            captions=tuple(self.texts("caption", indices)),
            stream_index_B=torch.from_numpy(np.array(stream_indices, dtype=np.int64)),
        )

    def texts(self, column: str, indices: npt.NDArray[np.int64]) -> list[str]:
        """Return a column of strings (`key`, `caption` or `kind`) of some samples."""
        found = [""] * len(indices)
        for shard, places, rows in self._by_shard(indices):
            for place, text in zip(places, shard.texts(column, rows), strict=True):
                found[place] = text
        return found

    def _read_column(
        self, column: str, indices: npt.NDArray[np.int64], dtype: torch.dtype, row_shape: tuple[int, ...]
    ) -> Tensor:
        """Return (B, *row_shape) of its own memory; each row is copied once."""
        tensor = torch.empty((len(indices), *row_shape), dtype=dtype)
        into = tensor.view(len(indices), -1).view(torch.uint8).numpy()
        for shard, places, rows in self._by_shard(indices):
            shard.copy_rows(column, rows, into, places)
        return tensor

    def _by_shard(
        self, indices: npt.NDArray[np.int64]
    ) -> Iterator[tuple[Shard, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yield each shard that holds some of the samples, their places among `indices`, and their rows in it."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(shards):
            places = np.flatnonzero(shards == number)
            yield self._shards[number], places, indices[places] - self._starts[number]


def _open_shard(folder: Path, index: SetIndex, shard: ShardInfo) -> Shard:
    float_bytes = DTYPES[index.latents_dtype].itemsize
    tokens, width = index.text_shape
    row_bytes = {
        "latents": math.prod(index.buckets[shard.bucket]) * float_bytes,
        "text_embeds": tokens * width * float_bytes,
        "text_mask": tokens,
        "text_pooled": index.pooled_width * float_bytes,
    }
    return Shard(path=folder / shard.file, count=shard.count, row_bytes=row_bytes)


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
    path = recipe.data.path if split == "train" else recipe.data.heldout_path
    return LatentDataset(Path(path or ""), whole=whole)


def check_split(recipe: Recipe, split: Split) -> int:
    """Check an encoded set by its index, without reading it whole, and return its number of samples.

    Raises:
        DataError: it is not named, not there, or does not fit the model.
    """
    key, path = ("path", recipe.data.path) if split == "train" else ("heldout_path", recipe.data.heldout_path)
    if path is None:
        raise DataError(f"data.{key}: names no encoded set, which data.dataset: encoded reads; --set data.{key}=DIR")
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
    if not folder.exists():
        try:
            _write_scenes(folder, model, settings, image_encoder, text_encoder)
        except OSError as error:
            raise DataError(f"data.cache_dir {data.cache_dir}: cannot write {folder.name}: {error}; "
                            "free space there or set data.cache_dir elsewhere") from None  # fmt: skip
    return LatentDataset(folder)


def _write_scenes(
    folder: Path, model: ModelConfig, settings: dict[str, str | int], image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
) -> None:  # fmt: skip
    """Write a split beside its place, and publish it."""
    draft = new_draft(folder)
    try:
        parts: list[LatentSums] = []
        tables = _encode_scenes(settings, image_encoder, text_encoder, parts)
        count, size, checksum = write_arrow_shard(draft / _SHARD_FILE, tables)
        shard = ShardInfo(file=_SHARD_FILE, bucket=0, count=count, bytes=size, xxh3=checksum)
        null_text = null_columns(text_encoder, torch.float32)
        mean, std = total_of(parts).statistics()
        index = SetIndex(
            schema=SCHEMA_VERSION, count=count, image_encoder=image_facts(image_encoder),
            text_encoder=text_facts(text_encoder), latents_dtype="float32",
            text_shape=(model.max_text_tokens, model.text_embed_dim), pooled_width=null_text["text_pooled"].shape[1],
            buckets=((model.in_channels, model.latent_height, model.latent_width),), shards=(shard,),
            latents_mean=mean, latents_std=std, settings=settings, **write_null_text(draft, null_text),
        )  # fmt: skip
        write_index(draft, index)
        publish_set(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_digit_scenes(model: ModelConfig, image_encoder: ImageEncoder, text_encoder: TextEncoder) -> None:
    """Check that the encoders fit the model and that scenes fit the canvas.

    Raises:
        DataError: naming the fields to change.
    """
    for field, wanted, given in (
        ("text_embed_dim", model.text_embed_dim, text_encoder.embed_dim),
        ("max_text_tokens", model.max_text_tokens, text_encoder.max_tokens),
    ):
        if wanted != given:
            raise DataError(f"text encoder {text_encoder.identity} gives {given}, but model.{field} is {wanted}; "
                            f"set model.{field}={given} or take another encoder")  # fmt: skip
    latents_shape = (model.in_channels, model.latent_height, model.latent_width)
    height, width = (side * image_encoder.downsampling for side in latents_shape[1:])
    with torch.no_grad():
        given_shape = tuple(image_encoder.encode(torch.zeros(1, 3, height, width)).shape[1:])
    if given_shape != latents_shape:
        raise DataError(f"image encoder {image_encoder.identity} turns {height} x {width} pixels into latents "
                        f"{given_shape}, but the model's are {latents_shape}; set model.in_channels, "
                        "latent_height and latent_width to the former")  # fmt: skip
    draw_scene(seed=0, split="train", index=0, canvas_height=height, canvas_width=width)


def _encode_scenes(
    settings: dict[str, str | int], image_encoder: ImageEncoder, text_encoder: TextEncoder, parts: list[LatentSums]
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
            parts.append(LatentSums.of(latents_BCHW))
            yield table_of(
                keys=[f"{split}-{i}" for i in indices], captions=captions, kinds=[scene.kind for scene in scenes],
                latents_BCHW=latents_BCHW, text=text, dtype=torch.float32,
            )  # fmt: skip
            progress.update(len(scenes))
