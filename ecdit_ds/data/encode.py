"""Encoded corpora on disk: written once through both encoders, then read memory-mapped.

Encoders run before training, not in it. One folder per setting holds what they gave; `cache.py` keeps the folders.

Suffixes: B batch, C channels, H, W pixels (of the canvas or of the latents), T text tokens, D text_embed_dim.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from einops import rearrange
from torch import Tensor

from ecdit_ds.config import DataConfig, Recipe
from ecdit_ds.data.cache import SCHEMA_VERSION, CacheIndex, read_folder, read_index, write_folder
from ecdit_ds.data.digit_scenes import Split, draw_scene
from ecdit_ds.data.encoders import ImageEncoder, TextEmbeddings, TextEncoder
from ecdit_ds.errors import DataError
from ecdit_ds.model_config import ModelConfig
from ecdit_ds.seeding import stable_seed

_ROWS_PER_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One encoded image and its caption."""

    latents_CHW: Tensor
    text_embeds_TD: Tensor
    text_mask_T: Tensor
    text_pooled_D: Tensor
    caption: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch of encoded images and their captions; tensors are fp32 unless said otherwise."""

    latents_BCHW: Tensor
    text_embeds_BTD: Tensor
    text_mask_BT: Tensor
    """bool, True at tokens."""
    text_pooled_BD: Tensor
    captions: tuple[str, ...]
    stream_index_B: Tensor
    """int64 address of each sample's randomness: its position in the training stream, or in a fixed set."""


class LatentDataset:
    """A memory-mapped encoded corpus; cheap to pickle and to fork, since only its path travels."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of encoded samples, verifying it whole.

        Raises:
            DataError: a file is missing or damaged; names it.
        """
        self.index, self._rows, null_text = read_folder(folder)
        parts = {name: torch.from_numpy(values) for name, values in null_text.items()}
        self.null_text = TextEmbeddings(
            embeds_BTD=parts["text_embeds"], mask_BT=parts["text_mask"], pooled_BD=parts["text_pooled"]
        )
        """The text of no text, B = 1."""

    def __len__(self) -> int:
        return self.index.count

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        batch = self.gather(np.array([i]), np.array([i]))
        return Sample(
            latents_CHW=batch.latents_BCHW[0],
            text_embeds_TD=batch.text_embeds_BTD[0],
            text_mask_T=batch.text_mask_BT[0],
            text_pooled_D=batch.text_pooled_BD[0],
            caption=batch.captions[0],
            kind=self._rows[i].column("kind")[0].as_py(),
        )

    def gather(self, indices: npt.NDArray[np.int64], stream_indices: npt.NDArray[np.int64]) -> Samples:
        """Return the samples at `indices`, in that order, repeats allowed.

        Args:
            indices: int64 (B,) in [0, len(self)).
            stream_indices: int64 (B,), carried along as `stream_index_B`.
        """
        table = self._rows[indices.tolist()]
        num_tokens, embed_dim = self.index.text_shape
        return Samples(
            latents_BCHW=_read_column(table, "latents", np.float32, self.index.latents_shape),
            text_embeds_BTD=_read_column(table, "text_embeds", np.float32, (num_tokens, embed_dim)),
            text_mask_BT=_read_column(table, "text_mask", np.bool_, (num_tokens,)),
            text_pooled_BD=_read_column(table, "text_pooled", np.float32, (embed_dim,)),
            captions=tuple(table.column("caption").to_pylist()),
            stream_index_B=torch.from_numpy(np.array(stream_indices, dtype=np.int64)),
        )


def open_split(recipe: Recipe, split: Split, encoders: tuple[ImageEncoder, TextEncoder] | None) -> LatentDataset:
    """Open the training or the held-out set of a recipe; digit scenes are encoded first where they are missing.

    Args:
        encoders: for digit scenes; an encoded corpus needs none.

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
    return LatentDataset(Path(path or ""))


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


def _check_fits(index: CacheIndex, model: ModelConfig, who: str) -> None:
    latents_shape = (model.in_channels, model.latent_height, model.latent_width)
    text_shape = (model.max_text_tokens, model.text_embed_dim)
    if index.latents_shape != latents_shape:
        raise DataError(f"{who}: holds latents {index.latents_shape}, but the model's are {latents_shape}; set "
                        "model.in_channels, latent_height and latent_width to the former")  # fmt: skip
    if index.text_shape != text_shape:
        raise DataError(f"{who}: holds texts {index.text_shape}, but the model's are {text_shape} (tokens, width); "
                        "set model.max_text_tokens and text_embed_dim to the former")  # fmt: skip


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
            write_folder(
                folder,
                _encode_scenes(settings, split, image_encoder, text_encoder),
                null_text=_null_columns(text_encoder),
                settings=settings,
                count=int(settings["count"]),
                latents_shape=(model.in_channels, model.latent_height, model.latent_width),
                text_shape=(model.max_text_tokens, model.text_embed_dim),
            )
        except OSError as error:
            raise DataError(f"data.cache_dir {data.cache_dir}: cannot write {folder.name}: {error}; "
                            "free space there or set data.cache_dir elsewhere") from None  # fmt: skip
    return LatentDataset(folder)


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
    settings: dict[str, str | int], split: Split, image_encoder: ImageEncoder, text_encoder: TextEncoder
) -> Iterator[pa.Table]:
    """Yield tables of encoded scenes, in order."""
    seed, count = int(settings["seed"]), int(settings["count"])
    height, width = int(settings["canvas_height"]), int(settings["canvas_width"])
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
        yield pa.table({
            "caption": captions,
            "kind": [scene.kind for scene in scenes],
            "latents": _binary_column(latents_BCHW, torch.float32),
            "text_embeds": _binary_column(text.embeds_BTD, torch.float32),
            "text_mask": _binary_column(text.mask_BT, torch.bool),
            "text_pooled": _binary_column(text.pooled_BD, torch.float32),
        })  # fmt: skip


def _null_columns(text_encoder: TextEncoder) -> dict[str, npt.NDArray[Any]]:
    null = text_encoder.null()
    parts = {"text_embeds": null.embeds_BTD, "text_mask": null.mask_BT, "text_pooled": null.pooled_BD}
    return {name: part.to("cpu").numpy() for name, part in parts.items()}


def _binary_column(tensor: Tensor, dtype: torch.dtype) -> pa.Array:
    return pa.array([row.tobytes() for row in tensor.to("cpu", dtype).numpy()], type=pa.binary())


def _read_column(table: pa.Table, name: str, dtype: type[np.generic], row_shape: tuple[int, ...]) -> Tensor:
    """Return a (B, *row_shape) tensor of its own memory; rows have one size, so a column is one block of bytes."""
    column = table.column(name).combine_chunks()
    _, offset_buffer, byte_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    block = np.frombuffer(byte_buffer, dtype=np.uint8)[offsets[0] : offsets[-1]].copy()
    return torch.from_numpy(block.view(dtype).reshape(len(column), *row_shape))
