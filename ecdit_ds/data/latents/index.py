"""Folders of encoded samples: a set of Arrow shards is there whole or not at all, and verified when opened.

`shard_writer.py` writes what is read here.

    index.json             what the set holds: shapes, encoders, statistics, and size and checksum of every shard
    null_text.safetensors  the text of no text, in the same encoding
    shard-00000.arrow ...  written by `datasets`; a row is a sample, a tensor is the bytes of its numbers
    report.json            of tools/encode_data.py: what was left out, and why; nothing that training reads

Sample ids count through the shards in the index's order. All samples of a shard have latents of one shape, its
bucket; shards of one bucket need not be neighbours. A set is written beside its place and renamed, so processes may
race for it, and one that is killed leaves nothing that is ever read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ecdit_ds.data.encoders.base import RAW_PIXELS
from ecdit_ds.data.normalization import Moments
from ecdit_ds.errors import DataError, escape_unprintable
from ecdit_ds.files.durable import plain_file

SCHEMA_VERSION = 5
"""Raise it when scenes or columns change, so that no older folder is taken for a new one."""
NULL_TEXT_FILE = "null_text.safetensors"
INDEX_FILE = "index.json"
REPORT_FILE = "report.json"
TEXT_COLUMNS = ("key", "caption", "kind")
TENSOR_COLUMNS = ("latents", "text_embeds", "text_mask", "text_pooled")
"""A set whose captions are encoded beside training has only the first."""
FLOAT_DTYPES = ("float32", "bfloat16")
"""What latents and text vectors may be stored as; the mask is one byte a token."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One Arrow file of a set."""

    file: str
    """Its name in the folder."""
    bucket: int
    """Which of the index's buckets all of its latents have the shape of."""
    count: int
    """Samples."""
    bytes: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class LatentIndex:
    """What `index.json` holds."""

    schema: int
    count: int
    """Samples in all shards."""
    image_encoder: Mapping[str, Any]
    """`identity`, and what it is loaded again by."""
    text_encoder: Mapping[str, Any]
    latents_dtype: str
    """`float32` or `bfloat16`: of latents, text vectors and pooled text alike."""
    text_shape: tuple[int, int]
    """(T, D)."""
    pooled_width: int
    """Components of the pooled text."""
    has_text: bool
    """Whether text vectors are stored; otherwise captions alone, which the text encoder reads beside training."""
    buckets: tuple[tuple[int, int, int], ...]
    """(C, H, W) of latents."""
    shards: tuple[ShardInfo, ...]
    """In the order that sample ids count them."""
    latents_mean: tuple[float, ...]
    """A number a channel, over all samples and places."""
    latents_std: tuple[float, ...]
    null_text_bytes: int
    null_text_xxh3: str
    settings: Mapping[str, Any]
    """All that the samples depend on."""

    @property
    def holds_pixels(self) -> bool:
        """Whether its latents are pixels in [-1, 1], which readers normalise; see `normalization.py`."""
        return self.image_encoder.get("identity") == RAW_PIXELS.identity

    @property
    def moments(self) -> Moments:
        """Mean and spread of the latents as they are stored."""
        return Moments(mean_C=self.latents_mean, std_C=self.latents_std)

    def __post_init__(self) -> None:
        if self.latents_dtype not in FLOAT_DTYPES:
            raise ValueError(f"latents_dtype {self.latents_dtype!r} is none of {', '.join(FLOAT_DTYPES)}")
        for name in ("image_encoder", "text_encoder", "settings"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} is no section")
        if type(self.has_text) is not bool:
            raise ValueError(f"has_text {self.has_text!r} is neither true nor false")
        sizes = [size for bucket in self.buckets for size in bucket]
        counts = [count for shard in self.shards for count in (shard.count, shard.bytes)]
        for number in (*sizes, *self.text_shape, self.pooled_width, self.count, *counts):
            if type(number) is not int or number < 1:
                raise ValueError(f"{number!r} is no size or count")
        for shard in self.shards:
            if Path(shard.file).name != shard.file or shard.file in ("", ".", ".."):
                raise ValueError(f"shard {shard.file!r} is no plain file name")
            if not 0 <= shard.bucket < len(self.buckets) or shard.count < 1:
                raise ValueError(f"shard {shard.file}: bucket {shard.bucket} with {shard.count} samples")
        for value in (*self.latents_mean, *self.latents_std):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{value!r} is no mean or spread")
        if self.count != sum(shard.count for shard in self.shards):
            raise ValueError(f"count {self.count} is not what its shards hold")


def read_null_text(folder: Path, index: LatentIndex) -> dict[str, Tensor]:
    """Return the text of no text by column, B = 1, in the dtypes it is stored in; verify it before.

    Raises:
        DataError: it has other columns or shapes than the index says.
    """
    path, (tokens, width) = folder / NULL_TEXT_FILE, index.text_shape
    wanted = {"text_embeds": (1, tokens, width), "text_mask": (1, tokens), "text_pooled": (1, index.pooled_width)}
    try:
        found = dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); encode the set anew") from None
    shapes = {escape_unprintable(name): tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted:
        raise DataError(f"{path}: holds {shapes}, but its index says {wanted}; encode the set anew")
    return found


def read_index(folder: Path) -> LatentIndex:
    """Read what a folder says of itself; whether its files are whole, `verify_set` finds out.

    Raises:
        DataError: there is no index, or a damaged one, or another version's.
    """
    path = folder / INDEX_FILE
    try:
        fields: dict[str, Any] = json.loads(plain_file(path).read_text(encoding="ascii"))
        schema = fields["schema"]
        index = _index_of(fields) if schema == SCHEMA_VERSION else None
    except FileNotFoundError:
        if not folder.exists():
            raise DataError(f"{folder}: is not there; encode the corpus there, or name another folder") from None
        raise DataError(f"{path}: is missing; delete the folder {folder} to have it written anew") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: is no index of an encoded set ({error}); delete the folder {folder} to have it written anew"
        ) from None
    if index is None:
        raise DataError(f"{path}: has schema {schema}, this version reads {SCHEMA_VERSION}; delete the folder {folder}")
    return index


def _index_of(fields: dict[str, Any]) -> LatentIndex:
    sizes = {name: tuple(fields[name]) for name in ("text_shape", "latents_mean", "latents_std")}
    buckets = tuple((c, h, w) for c, h, w in fields["buckets"])
    shards = tuple(ShardInfo(**shard) for shard in fields["shards"])
    return LatentIndex(**(fields | sizes | {"buckets": buckets, "shards": shards}))


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """How a set's shards are compared with its index; processes can share the work."""

    shards: slice = field(default_factory=lambda: slice(None))
    """Which ones are looked at."""
    checksums: bool = True
    """Whether they are read whole, besides their sizes."""


def verify_set(folder: Path, index: LatentIndex, check: VerifyOptions) -> None:
    """Check the files of a set against its index.

    Raises:
        DataError: a file is missing or damaged; names it.
    """
    _verify(folder / NULL_TEXT_FILE, index.null_text_bytes, index.null_text_xxh3)
    shards = index.shards[check.shards]
    # disable=None shows the bar on terminals only.
    with tqdm(
        total=sum(shard.bytes for shard in shards),
        desc=f"checking {folder.name}",
        unit="B",
        unit_scale=True,
        disable=None,
        leave=False,
    ) as progress:
        for shard in shards:
            _verify(folder / shard.file, shard.bytes, shard.xxh3 if check.checksums else None)
            progress.update(shard.bytes)


def _verify(path: Path, wanted_bytes: int, wanted_checksum: str | None) -> None:
    way_out = f"delete the folder {path.parent} to have it written anew"
    if not path.is_file():
        raise DataError(f"{path}: is missing; {way_out}")
    size = path.stat().st_size
    if size != wanted_bytes:
        raise DataError(f"{path}: has {size} bytes, but its index says {wanted_bytes}; {way_out}")
    checksum = wanted_checksum and checksum_of(path)
    if checksum != wanted_checksum:
        raise DataError(f"{path}: has checksum {checksum}, but its index says {wanted_checksum}; {way_out}")


def checksum_of(path: Path) -> str:
    """Return the xxh3 of a file's bytes, in hexadecimal."""
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()
