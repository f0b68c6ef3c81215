"""The same random samples on the disk three times, for `bench.py loader`: encoded, as one flat file, for `datasets`.

Suffixes: B batch, C channels, H, W latent height and width, T text tokens, D text_embed_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.encoders.base import TextEmbeddings
from ecdit_ds.data.latents.columns import DTYPES, to_table
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.latents.index import (
    SCHEMA_VERSION,
    TENSOR_COLUMNS,
    LatentIndex,
    ShardInfo,
)
from ecdit_ds.data.latents.shard_writer import write_arrow_shard, write_index, write_null_text

ROWS_A_WRITE = 32
"""As many as an encoder's batch, so that shards are cut into record batches as encoded ones are."""
SHARDS = 4

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The same samples on the disk three times."""

    recipe: Recipe
    dtype: str
    batch_size: int
    ours: LatentDataset
    flat: npt.NDArray[np.uint8]
    """(samples, bytes a sample), mapped."""
    flat_file: Path
    formatted: datasets.Dataset

    def order(self) -> list[Indices]:
        """Return the batches that every side reads: each sample at most once, the rest of a batch left out."""
        shuffled = np.random.default_rng(0).permutation(len(self.ours))
        return list(shuffled[: len(shuffled) // self.batch_size * self.batch_size].reshape(-1, self.batch_size))


def write_corpus(folder: Path, recipe: Recipe, batch_size: int, gigabytes: float) -> Corpus:
    """Write about so many bytes of random numbers in a recipe's shapes, in all three ways."""
    model, dtype = recipe.model, "bfloat16" if recipe.data.dataset == "encoded" else "float32"
    sizes = [model.in_channels * model.latent_height * model.latent_width, model.text_embed_dim]
    sample_bytes = (sum(sizes) + model.max_text_tokens * model.text_embed_dim) * DTYPES[dtype].itemsize
    writes = int(gigabytes * 1e9 / sample_bytes) // (SHARDS * ROWS_A_WRITE)
    writer = _Writer(
        folder,
        (model.in_channels, model.latent_height, model.latent_width),
        (model.max_text_tokens, model.text_embed_dim),
        dtype,
    )
    with writer.flat, writer.peer:
        shards = [writer.shard(number, max(1, writes)) for number in range(SHARDS)]
        writer.peer.finalize()
    _write_index(folder / "set", tuple(shards), dtype, writer.shape, writer.text_shape)
    ours = LatentDataset(folder / "set")
    flat = np.memmap(folder / "flat", dtype=np.uint8, mode="r").view(np.ndarray).reshape(len(ours), -1)
    peer = datasets.Dataset.from_file(str(folder / "peer.arrow")).with_format("torch")
    return Corpus(
        recipe=recipe,
        dtype=dtype,
        batch_size=batch_size,
        ours=ours,
        flat=flat,
        flat_file=folder / "flat",
        formatted=peer,
    )


class _Writer:
    """Draws samples and writes each of them three times."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], text_shape: tuple[int, int], dtype: str) -> None:
        self.shape, self.text_shape, self._dtype = shape, text_shape, DTYPES[dtype]
        self._half = "float16" if dtype == "bfloat16" else dtype
        self._folder = folder / "set"
        self._folder.mkdir()
        self._generator = torch.Generator().manual_seed(0)
        self.flat = (folder / "flat").open("wb")
        self.peer = ArrowWriter(
            path=str(folder / "peer.arrow"),
            features=datasets.Features(
                {
                    "latents": datasets.Array3D(shape, self._half),
                    "text_embeds": datasets.Array2D(text_shape, self._half),
                    "text_mask": datasets.Sequence(datasets.Value("bool"), length=text_shape[0]),
                    "text_pooled": datasets.Sequence(datasets.Value(self._half), length=text_shape[1]),
                    "caption": datasets.Value("string"),
                }
            ),
        )

    def shard(self, number: int, writes: int) -> ShardInfo:
        """Write a shard, and the same samples behind the others of the flat file and the peer's."""
        file = f"shard-{number:05d}.arrow"
        count, size, checksum = write_arrow_shard(self._folder / file, self._tables(number, writes))
        return ShardInfo(file=file, bucket=0, count=count, bytes=size, xxh3=checksum)

    def _tables(self, number: int, writes: int) -> Iterator[pa.Table]:
        for part in range(writes):
            latents_BCHW, text = self._draw()
            captions = [f"picture {row} of part {part} of shard {number}" for row in range(ROWS_A_WRITE)]
            table = to_table(
                keys=captions,
                captions=captions,
                kinds=[""] * ROWS_A_WRITE,
                latents_BCHW=latents_BCHW,
                text=text,
                dtype=self._dtype,
            )
            for row in table.select(list(TENSOR_COLUMNS)).to_pylist():
                self.flat.write(b"".join(row.values()))
            floats = {"latents": latents_BCHW, "text_embeds": text.embeds_BTD, "text_pooled": text.pooled_BD}
            columns: dict[str, Any] = {name: list(values.numpy().astype(self._half)) for name, values in floats.items()}
            self.peer.write_batch(columns | {"text_mask": list(text.mask_BT.numpy()), "caption": captions})
            yield table

    def _draw(self) -> tuple[Tensor, TextEmbeddings]:
        def normal(*shape: int) -> Tensor:
            # Rounded as ours are stored, so that the peer's float16 holds the same numbers.
            return torch.randn(ROWS_A_WRITE, *shape, generator=self._generator).to(self._dtype).float()

        mask_BT = torch.ones(ROWS_A_WRITE, self.text_shape[0], dtype=torch.bool)
        text = TextEmbeddings(
            embeds_BTD=normal(*self.text_shape), mask_BT=mask_BT, pooled_BD=normal(self.text_shape[1])
        )
        return normal(*self.shape), text


def _write_index(
    folder: Path, shards: tuple[ShardInfo, ...], dtype: str, shape: tuple[int, int, int], text_shape: tuple[int, int]
) -> None:
    null_text = {
        "text_embeds": torch.zeros(1, *text_shape),
        "text_mask": torch.ones(1, text_shape[0], dtype=torch.bool),
        "text_pooled": torch.zeros(1, text_shape[1]),
    }
    write_index(
        folder,
        LatentIndex(
            schema=SCHEMA_VERSION,
            has_text=True,
            count=sum(shard.count for shard in shards),
            image_encoder={"identity": "random"},
            text_encoder={"identity": "random"},
            latents_dtype=dtype,
            text_shape=text_shape,
            pooled_width=text_shape[1],
            buckets=(shape,),
            shards=shards,
            latents_mean=(0.0,) * shape[0],
            latents_std=(1.0,) * shape[0],
            settings={},
            **write_null_text(folder, null_text),
        ),
    )
