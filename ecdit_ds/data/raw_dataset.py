"""Raw pictures with captions as training reads them, for small trials: decoded in the loader, encoded beside training.

Suffixes: B batch, H, W pixels of the image, C channels.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.data.encoders.base import TextEmbeddings, TextEncoder
from ecdit_ds.data.latents.columns import LatentStats, sum_stats
from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.data.normalization import Moments
from ecdit_ds.data.sources.bad_sample import BadSample
from ecdit_ds.data.sources.base import Columns, ImageSource, RawSample, Unit, samples_of
from ecdit_ds.data.sources.images import Size, decode_image, fit_image, from_pixels
from ecdit_ds.data.sources.open import open_source
from ecdit_ds.errors import DataError

_ROWS_OF_A_UNIT = 128
"""Rows per unit of a Parquet file, which is read in parts."""
_CACHED_BYTES = 2**30
"""Bytes of image files that a loader process keeps; a small corpus in tars or Parquet is read once."""
MAX_MEASURED = 1024
"""Pictures that are looked at for the mean and deviation of a set's pixels."""
_MEASURED_AT_ONCE = 64

Raw = RawSample | BadSample


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A sample that can be encoded."""

    pixels_HW3: npt.NDArray[np.uint8]
    caption: str


class RawImageDataset:
    """What a source holds, sample by sample in its own order; a `SampleSet` without latents and text vectors.

    What is no sample has its place too, and is told as `Samples.bad`: nothing is looked at before it is asked for.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        name: str,
        latents: tuple[int, int, int],
        downsampling: int,
        text_encoder: TextEncoder,
    ) -> None:
        """Count the samples; archives that do not say how many they hold are read for it.

        Args:
            name: of the source, for what is told of bad samples.
            latents: (C, H, W) that images will have.
            downsampling: image pixels per latent pixel.
            text_encoder: counts tokens, which needs no accelerator, and gives the text of no text.
        """
        self.name = name
        self._source, self._latents, self._text_encoder = source, latents, text_encoder
        self._size: Size = latents[1] * downsampling, latents[2] * downsampling
        self._starts = np.cumsum([0, *(_length_of(source, unit) for unit in source.units)])
        self._cache = _Cache(_CACHED_BYTES)
        null = text_encoder.null()
        self._null = replace(
            null, embeds_BTD=null.embeds_BTD.cpu(), mask_BT=null.mask_BT.cpu(), pooled_BD=null.pooled_BD.cpu()
        )

    @property
    def null_text(self) -> TextEmbeddings:
        """The text of no text, B = 1."""
        return self._null

    @property
    def is_whole(self) -> bool:
        """Never: both encoders run beside training."""
        return False

    @property
    def buckets(self) -> tuple[tuple[int, int, int], ...]:
        """The only size of latents, (C, H, W)."""
        return (self._latents,)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(bucket, count): all samples have the only bucket."""
        return [(0, len(self))]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """A name of the source's files."""
        return self._source.fingerprint

    def name_of(self, sample: int) -> str:
        """Return the name of a sample in its source."""
        raw = self._raw(sample)
        return raw.name if isinstance(raw, BadSample) else raw.key

    def gather(self, indices: npt.NDArray[np.int64], stream_indices: npt.NDArray[np.int64]) -> Samples:
        """Return the samples at `indices`, in that order, repeats allowed; bad ones are black and say nothing.

        Args:
            indices: int64 (B,) in [0, len(self)).
            stream_indices: int64 (B,), carried along as `stream_index_B`.
        """
        count = len(indices)
        pixels_BHW3 = np.zeros((count, *self._size, 3), dtype=np.uint8)
        captions, bad = [""] * count, dict[int, BadSample]()
        for place, index in enumerate(indices.tolist()):
            result = self._prepared(self._raw(index))
            if isinstance(result, BadSample):
                bad[place] = result
            else:
                pixels_BHW3[place], captions[place] = result.pixels_HW3, result.caption
        return Samples(
            latents_BCHW=torch.empty(count, 0, 0, 0),
            text_embeds_BTD=torch.empty(count, 0, 0),
            text_mask_BT=torch.empty(count, 0, dtype=torch.bool),
            text_pooled_BD=torch.empty(count, 0),
            captions=tuple(captions),
            stream_index_B=torch.from_numpy(np.array(stream_indices, dtype=np.int64)),
            bad=bad,
            pixels_BHW3=torch.from_numpy(pixels_BHW3),
        )

    def _prepared(self, raw: Raw) -> _Ready | BadSample:
        """Decode a sample and check it, cause by cause as tools/encode_data.py does."""
        if isinstance(raw, BadSample):
            return replace(raw, samples=1)  # the others that were lost with it have places of their own
        image = decode_image(raw.content, raw.key)
        if isinstance(image, BadSample):
            return image
        (tokens,) = self._text_encoder.count_tokens([raw.caption])
        if tokens > self._text_encoder.max_tokens:
            return BadSample(cause="caption too long", name=raw.key)
        return _Ready(pixels_HW3=np.asarray(fit_image(image, self._size)), caption=raw.caption)

    def _raw(self, index: int) -> Raw:
        """Return what the source gives at a place."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = index - int(self._starts[number])
        unit = self._source.units[number]
        if self._source.reads_singly:
            begin = unit.start + place
            items = list(samples_of(self._source, replace(unit, start=begin, stop=begin + 1)))
            place = 0
        else:
            items = self._cache.get(number) or self._cache.put(number, list(samples_of(self._source, unit)))
        if place < len(items):
            return items[place]
        # Damage that was told once, at the end, took this one too; or the source has shrunk since it was counted.
        is_told = bool(items) and isinstance(items[-1], BadSample)
        return items[-1] if is_told else BadSample(cause="damaged archive", name=unit.name)


def open_raw_set(
    name: str, data: DataConfig, *, latents: tuple[int, int, int], downsampling: int, text_encoder: TextEncoder
) -> RawImageDataset:
    """Open what `data.path` or `data.heldout_path` names, to be encoded beside training; see `RawImageDataset`.

    Raises:
        DataError: it is not there, or cannot be read as a whole.
    """
    source = open_raw_source(name, data)
    return RawImageDataset(source, name=name, latents=latents, downsampling=downsampling, text_encoder=text_encoder)


def measure_pixels(raw_set: RawImageDataset) -> Moments:
    """Return mean and deviation of the pixels, in [-1, 1], of a set's pictures; of many, evenly spaced ones are taken.

    Raises:
        DataError: none of these can be used.
    """
    count = min(len(raw_set), MAX_MEASURED)
    indices = np.unique(np.linspace(0, max(0, len(raw_set) - 1), count).round().astype(np.int64))
    parts = []
    for start in range(0, len(indices), _MEASURED_AT_ONCE):
        samples = raw_set.gather(part := indices[start : start + _MEASURED_AT_ONCE], part)
        good = [place for place in range(len(part)) if place not in samples.bad]
        parts.append(LatentStats.of(from_pixels(samples.pixels_BHW3[good])))
    sums = sum_stats(parts)
    if not sums.numbers:
        raise DataError(f"{raw_set.name}: none of {count} samples looked at can be used; name a source with some")
    mean_C, std_C = sums.statistics()
    return Moments(mean_C=mean_C, std_C=std_C)


def count_samples(source: ImageSource, name: str) -> int:
    """Return how many samples a source has, bad ones included.

    Raises:
        DataError: it has none.
    """
    count = sum(_length_of(source, unit) for unit in source.units)
    if not count:
        raise DataError(f"{name}: holds no sample; name a source that does")
    return count


def open_raw_source(name: str, data: DataConfig) -> ImageSource:
    """Open a source of this machine, as the recipe says.

    Raises:
        DataError: it is not there, or cannot be read as a whole.
    """
    if not os.path.exists(name):
        raise DataError(f"{name}: is no file or folder; data.encode: online reads what is on this machine")
    columns = Columns(image=data.image_column, caption=data.caption_column)
    return open_source(str(Path(name)), unit_samples=_ROWS_OF_A_UNIT, columns=columns)


def _length_of(source: ImageSource, unit: Unit) -> int:
    if unit.stop >= 0:
        return unit.stop - unit.start
    return sum(1 for _ in samples_of(source, unit))


class _Cache:
    """The units that were used last, up to so many bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._units: OrderedDict[int, list[Raw]] = OrderedDict()

    def get(self, number: int) -> list[Raw] | None:
        if number in self._units:
            self._units.move_to_end(number)
        return self._units.get(number)

    def put(self, number: int, items: list[Raw]) -> list[Raw]:
        """Keep a unit, and let go of those that were not used for longest; return it."""
        self._units[number] = items
        self._bytes += _bytes_of(items)
        while self._bytes > self._max_bytes and len(self._units) > 1:
            _, gone = self._units.popitem(last=False)
            self._bytes -= _bytes_of(gone)
        return items


def _bytes_of(items: list[Raw]) -> int:
    return sum(len(item.content) for item in items if isinstance(item, RawSample))
