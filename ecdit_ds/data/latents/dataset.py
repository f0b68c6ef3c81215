"""Encoded sets as training reads them: memory-mapped, by sample.

Suffixes: B batch, C channels, H, W latent height and width (of an image, for pixels), T text tokens, D text_embed_dim.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from ecdit_ds.data.encoders.base import PixelVAE, TextEmbeddings
from ecdit_ds.data.latents.columns import DTYPES
from ecdit_ds.data.latents.index import (
    TEXT_COLUMNS,
    LatentIndex,
    ShardInfo,
    VerifyOptions,
    read_index,
    read_null_text,
    verify_set,
)
from ecdit_ds.data.latents.mmap_shard import LruIndex, RecordBatchView, Shard
from ecdit_ds.data.sources.bad_sample import BadSample, ReplacedSample
from ecdit_ds.errors import DataError

MAX_MAPPED = 4096
"""Shards that a process keeps mapped of a set: Linux allows it 65,530 maps of all kinds (vm.max_map_count), and mapping
a shard again costs less than a millisecond."""


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
    """A batch of images and their captions; floats are as the set stores them until `float` is asked for.

    What frozen encoders have yet to make has no numbers: latents are (B, 0, 0, 0) while there are pixels, and text
    vectors (B, 0, 0) while there are captions alone (the mask (B, 0), pooled text (B, 0)).
    """

    latents_BCHW: Tensor
    text_embeds_BTD: Tensor
    text_mask_BT: Tensor
    """bool, True at tokens."""
    text_pooled_BD: Tensor
    captions: tuple[str, ...]
    stream_index_B: Tensor
    """int64 address of each sample's randomness: its position in the training stream, or in a fixed set."""
    bad: Mapping[int, BadSample] = field(default_factory=dict)
    """Index in the batch -> why its tensors hold nothing to train on."""
    replaced: Mapping[int, tuple[ReplacedSample, ...]] = field(default_factory=dict)
    """At which places other samples stand in, and for which ones, in the order they were tried."""
    pixels_BHW3: Tensor = field(default_factory=lambda: no_pixels(0))
    """uint8 images that have no latents yet; (B, 0, 0, 3) where there are latents."""

    @property
    def lacks_latents(self) -> bool:
        """Whether the image encoder has yet to be run."""
        return self.latents_BCHW.numel() == 0

    @property
    def lacks_text(self) -> bool:
        """Whether the text encoder has yet to be run."""
        return self.text_embeds_BTD.numel() == 0

    def float(self) -> "Samples":
        """Return the same samples as fp32; casting takes longer than reading, so it is left to who needs it."""
        return replace(
            self,
            latents_BCHW=self.latents_BCHW.to(torch.float32),
            text_embeds_BTD=self.text_embeds_BTD.to(torch.float32),
            text_pooled_BD=self.text_pooled_BD.to(torch.float32),
        )


def no_pixels(count: int) -> Tensor:
    """Return what `Samples.pixels_BHW3` is where latents are there already."""
    return torch.empty((count, 0, 0, 3), dtype=torch.uint8)


class LatentDataset:
    """A memory-mapped encoded set; cheap to pickle and to fork, since only its paths travel."""

    def __init__(self, folder: Path, *, check: VerifyOptions | None = None, codec: PixelVAE | None = None) -> None:
        """Open a folder of encoded samples and verify it.

        Args:
            check: which shards are compared with the index, and how; by default all, with their checksums.
            codec: normalises latents that are pixels (`LatentIndex.holds_pixels`), others are not touched; by default
                they stay pixels.

        Raises:
            DataError: a file is missing or damaged; names it.
        """
        self.name = str(folder)
        """Where it was opened."""
        self.index = read_index(folder)
        self._codec = codec if self.index.holds_pixels else None
        verify_set(folder, self.index, check or VerifyOptions())
        self._shards = [_open_shard(folder, self.index, shard) for shard in self.index.shards]
        self._mapped = LruIndex(MAX_MAPPED)
        self._buckets = np.array([shard.bucket for shard in self.index.shards], dtype=np.int64)
        self._starts = np.cumsum([0, *(shard.count for shard in self.index.shards)])
        parts = read_null_text(folder, self.index)
        self.null_text = TextEmbeddings(
            embeds_BTD=parts["text_embeds"].float(), mask_BT=parts["text_mask"], pooled_BD=parts["text_pooled"].float()
        )
        """The text of no text, B = 1."""

    def __len__(self) -> int:
        return self.index.count

    @property
    def fingerprint(self) -> str:
        """A name of its samples and of the encoders that made them."""
        index = self.index
        facts = {
            "encoders": [index.image_encoder.get("identity"), index.text_encoder.get("identity")],
            "shards": [[shard.bucket, shard.count, shard.xxh3] for shard in index.shards],
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode("ascii"))

    @property
    def is_whole(self) -> bool:
        """Whether text vectors are stored; latents always are."""
        return self.index.has_text

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

    @property
    def buckets(self) -> tuple[tuple[int, int, int], ...]:
        """The sizes of latents, (C, H, W)."""
        return self.index.buckets

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(bucket, count) of successive samples of one bucket, from sample 0 to the last."""
        return [(shard.bucket, shard.count) for shard in self.index.shards]

    def buckets_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return which of `index.buckets` the latents of each sample have the shape of."""
        return self._buckets[np.searchsorted(self._starts, indices, side="right") - 1]

    def gather(self, indices: npt.NDArray[np.int64], stream_indices: npt.NDArray[np.int64]) -> Samples:
        """Return the samples at `indices`, in that order, repeats allowed; floats are as stored, normalised ones fp32.

        Args:
            indices: int64 (B,) in [0, len(self)), all of one bucket.
            stream_indices: int64 (B,), carried along as `stream_index_B`.
        """
        buckets = np.unique(self.buckets_of(indices))
        assert len(buckets) == 1, f"samples of buckets {buckets.tolist()} in one batch"
        num_tokens, embed_dim = self.index.text_shape if self.index.has_text else (0, 0)
        stored = DTYPES[self.index.latents_dtype]
        found = self._find(indices)

        def read(column: int, dtype: torch.dtype, *row_shape: int) -> Tensor:
            return _copied(found, column, dtype, row_shape)

        return Samples(
            latents_BCHW=self._normalized(read(0, stored, *self.index.buckets[buckets[0]])),
            text_embeds_BTD=read(1, stored, num_tokens, embed_dim),
            text_mask_BT=read(2, torch.bool, num_tokens),
            text_pooled_BD=read(3, stored, self.index.pooled_width if self.index.has_text else 0),
            captions=tuple(rows.text("caption", row) for rows, row in found),
            stream_index_B=torch.from_numpy(np.array(stream_indices, dtype=np.int64)),
            pixels_BHW3=no_pixels(len(indices)),
        )

    def _normalized(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW if self._codec is None else self._codec.encode(latents_BCHW)

    def name_of(self, sample: int) -> str:
        """Return the name of a sample in the source that it was encoded from."""
        return self.texts("key", np.array([sample]))[0]

    def texts(self, column: str, indices: npt.NDArray[np.int64]) -> list[str]:
        """Return a column of strings (`key`, `caption` or `kind`) of some samples.

        Raises:
            DataError: there is no such column.
        """
        if column not in TEXT_COLUMNS:
            raise DataError(f"a set has no strings {column!r}; ask for {', '.join(TEXT_COLUMNS)}")
        return [rows.text(column, row) for rows, row in self._find(indices)]

    def _find(self, indices: npt.NDArray[np.int64]) -> list[tuple[RecordBatchView, int]]:
        """Return of each sample the rows among which it is in its shard, and which of them it is."""
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        within = indices - self._starts[numbers]
        found = [self._shards[number].find(row) for number, row in zip(numbers.tolist(), within.tolist(), strict=True)]
        for number in self._mapped.use(np.unique(numbers).tolist()):
            self._shards[number].close()  # the map itself goes with the last row that is held of it
        return found


def _copied(
    found: list[tuple[RecordBatchView, int]], column: int, dtype: torch.dtype, row_shape: tuple[int, ...]
) -> Tensor:
    """Return a tensor column of some rows, (B, *row_shape), of its own memory; each row is copied once.

    By slices of bytes, not arrays of one row: beside copying some kB, making those would take most of the time.
    """
    size = math.prod(row_shape) * dtype.itemsize
    if not size:  # a column that is not stored
        return torch.empty((len(found), *row_shape), dtype=dtype)
    # Of NumPy, which asks for huge pages: touching new memory page by page takes as long as the copy.
    copied = np.empty(len(found) * size, dtype=np.uint8)
    into, end = copied.data, 0
    for rows, row in found:
        start, end = end, end + size
        into[start:end] = rows.tensors[column][row * size : (row + 1) * size]
    return torch.from_numpy(copied).view(dtype).view(len(found), *row_shape)


def _open_shard(folder: Path, index: LatentIndex, shard: ShardInfo) -> Shard:
    float_bytes = DTYPES[index.latents_dtype].itemsize
    row_bytes = {"latents": math.prod(index.buckets[shard.bucket]) * float_bytes}
    if index.has_text:
        tokens, width = index.text_shape
        row_bytes |= {
            "text_embeds": tokens * width * float_bytes,
            "text_mask": tokens,
            "text_pooled": index.pooled_width * float_bytes,
        }
    return Shard(path=folder / shard.file, count=shard.count, row_bytes=row_bytes)
