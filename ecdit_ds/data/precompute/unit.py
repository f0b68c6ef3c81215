"""One unit of a corpus through both encoders: its shards, and a record of what they hold and what was left out.

What comes out is a pure function of the unit and the settings: batches are formed within the unit, in its order.
"""

import json
import operator
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ecdit_ds.data.encoders.base import ImageEncoder, TextEmbeddings, TextEncoder
from ecdit_ds.data.latents.columns import DTYPES, LatentStats, sum_stats, to_table
from ecdit_ds.data.latents.index import ShardInfo
from ecdit_ds.data.latents.shard_writer import ShardWriter
from ecdit_ds.data.sources.bad_sample import BadSample, SystemFile
from ecdit_ds.data.sources.base import RawSample
from ecdit_ds.data.sources.images import Size, decode_image, fit_image, nearest_bucket, to_tensor
from ecdit_ds.files.durable import put_on_disk, write_durably

MAX_NAMES = 20
"""How many samples of a cause the report names."""
KIND = "corpus"
_AHEAD_PER_THREAD = 8
_BATCHES_BEHIND = 2
"""That may wait to be written."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What turns raw samples into rows."""

    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    sizes: tuple[Size, ...]
    """Sizes of the images in pixels, one per bucket."""
    dtype: str
    batch_size: int
    threads: int
    """That decode images."""
    has_text: bool = True
    """Whether text vectors are stored; otherwise captions are counted and no more."""
    min_size: int = 0
    """Pixels of the shorter side; pictures with fewer are left out."""


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What was made of a unit."""

    unit: int
    shards: tuple[ShardInfo, ...]
    """Their bucket counts through `EncodeSettings.sizes`."""
    latents_shapes: dict[int, tuple[int, ...]]
    """(C, H, W) of each bucket that has samples."""
    sums: LatentStats
    bad_counts: dict[str, int]
    bad_names: dict[str, list[str]]
    converted: dict[str, int]
    """Samples that are not as their files have them, by what was changed or chosen."""
    ignored: dict[str, int]
    """Files among the samples that are no part of any, by kind."""
    smallest: Size | None = None
    """The picture with the shortest side among those that were enlarged to fill their bucket."""

    @property
    def count(self) -> int:
        """Samples in all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def num_bad(self) -> int:
        """Samples left out."""
        return sum(self.bad_counts.values())

    def to_json(self) -> bytes:
        """Return what `read_record` reads."""
        fields: dict[str, Any] = {
            "unit": self.unit,
            "shards": [vars(shard) for shard in self.shards],
            "latents_shapes": {str(bucket): shape for bucket, shape in self.latents_shapes.items()},
            "sums": self.sums.to_dict(),
            "bad_counts": self.bad_counts,
            "bad_names": self.bad_names,
            "converted": self.converted,
            "ignored": self.ignored,
            "smallest": self.smallest,
        }
        return json.dumps(fields, indent=1).encode("ascii")


def read_record(path: Path) -> UnitRecord | None:
    """Return a unit's record, or None where there is none that is whole."""
    try:
        fields = json.loads(path.read_bytes())
        sums = fields["sums"]
        return UnitRecord(
            unit=fields["unit"],
            shards=tuple(ShardInfo(**shard) for shard in fields["shards"]),
            latents_shapes={int(bucket): tuple(shape) for bucket, shape in fields["latents_shapes"].items()},
            sums=LatentStats(numbers=sums["numbers"], sums_C=tuple(sums["sums_C"]), squares_C=tuple(sums["squares_C"])),
            bad_counts=fields["bad_counts"],
            bad_names=fields["bad_names"],
            converted=fields["converted"],
            ignored=fields["ignored"],
            smallest=smallest_of([fields.get("smallest")]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def smallest_of(sizes: Iterable[Sequence[int] | None]) -> Size | None:
    """Return the size with the shortest side, of those that are any; None without one."""
    return min(((size[0], size[1]) for size in sizes if size), key=lambda size: (min(size), max(size)), default=None)


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A sample that can be encoded."""

    key: str
    caption: str
    bucket: int
    image: Image.Image
    enlarged_from: Size | None
    converted: list[str]


@dataclass
class _Output:
    """What a unit has given so far."""

    writers: dict[int, ShardWriter] = field(default_factory=dict)
    paths: dict[int, Path] = field(default_factory=dict)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    sums: list[LatentStats] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    converted: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    smallest: Size | None = None

    def leave_out(self, bad: BadSample) -> None:
        self.counts[bad.cause] += bad.samples
        names = self.names.setdefault(bad.cause, [])
        if len(names) < MAX_NAMES:
            names.append(bad.name.encode("utf-8", "backslashreplace").decode())


def encode_unit(
    unit: int,
    samples: Iterable[RawSample | BadSample | SystemFile],
    encoding: EncodeSettings,
    *,
    shards: Path,
    drafts: Path,
    records: Path,
    moment: Callable[[str], None],
    tell: Callable[[int], object],
) -> None:
    """Encode a unit, and put its shards and then its record into their folders.

    Args:
        unit: its number.
        samples: of it.
        shards, drafts, records: folders that exist; files are written in `drafts` and renamed.
        moment: told what comes next, for tests of what a kill leaves behind.
        tell: told how many samples more are done.

    Raises:
        OSError: no space, no permission, or a folder is gone since the set was published.
    """
    output = _Output()
    waiting: dict[int, list[_Ready]] = {}
    try:
        with _Behind() as behind:
            for sample in _prepared(samples, encoding):
                if isinstance(sample, BadSample):
                    output.leave_out(sample)
                    tell(sample.samples)
                    continue
                if isinstance(sample, SystemFile):
                    output.ignored[sample.kind] += 1
                    continue
                batch = waiting.setdefault(sample.bucket, [])
                batch.append(sample)
                if len(batch) == encoding.batch_size:
                    moment("batch")
                    behind.do(_encode_batch(waiting.pop(sample.bucket), encoding, output, drafts))
                    tell(len(batch))
            for bucket in sorted(waiting):
                moment("batch")
                behind.do(_encode_batch(waiting[bucket], encoding, output, drafts))
                tell(len(waiting[bucket]))
            behind.finish()
        _keep(unit, encoding, output, shards=shards, drafts=drafts, records=records, moment=moment)
    finally:
        for writer in output.writers.values():
            writer.abandon()
        for path in output.paths.values():
            path.unlink(missing_ok=True)


_Prepared = _Ready | BadSample | SystemFile


def _prepared(samples: Iterable[RawSample | BadSample | SystemFile], encoding: EncodeSettings) -> Iterator[_Prepared]:
    """Decode images in threads, some samples ahead of the encoders, and yield results in order."""

    def prepare(sample: RawSample | BadSample | SystemFile) -> _Prepared:
        if not isinstance(sample, RawSample):
            return sample
        image = decode_image(sample.content, sample.key)
        if isinstance(image, BadSample):
            return image
        size = image.height, image.width
        if min(size) < encoding.min_size:
            return BadSample(cause="too small", name=sample.key)
        bucket = nearest_bucket(size, encoding.sizes)
        is_enlarged = any(map(operator.lt, size, encoding.sizes[bucket]))
        return _Ready(
            key=sample.key,
            caption=sample.caption,
            bucket=bucket,
            image=fit_image(image, encoding.sizes[bucket]),
            enlarged_from=size if is_enlarged else None,
            converted=[*sample.converted, *image.info["converted"], *(["enlarged"] if is_enlarged else [])],
        )

    def checked(result: _Prepared) -> _Prepared:
        # Here and not in the threads: tokenizers are not made for several at once.
        if isinstance(result, _Ready):
            (count,) = encoding.text_encoder.count_tokens([result.caption])
            if count > encoding.text_encoder.max_tokens:
                return BadSample(cause="caption too long", name=result.key)
        return result

    ahead: deque[Future[_Prepared]] = deque()
    with ThreadPoolExecutor(encoding.threads) as pool:
        for sample in samples:
            ahead.append(pool.submit(prepare, sample))
            if len(ahead) >= _AHEAD_PER_THREAD * encoding.threads:
                yield checked(ahead.popleft().result())
        while ahead:
            yield checked(ahead.popleft().result())


class _Behind:
    """Writes batches in one thread, in order, while the encoders are at the next ones."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def do(self, work: Callable[[], None]) -> None:
        """Take on some work; what earlier work failed with is raised."""
        self._waiting.append(self._pool.submit(work))
        while len(self._waiting) > _BATCHES_BEHIND:
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait until all is done."""
        while self._waiting:
            self._waiting.popleft().result()


def _encode_batch(batch: list[_Ready], encoding: EncodeSettings, output: _Output, drafts: Path) -> Callable[[], None]:
    """Run the encoders; return what is left to do, which needs them no more."""
    with torch.no_grad():
        latents_BCHW = encoding.image_encoder.encode(to_tensor([sample.image for sample in batch]))
        text = encoding.text_encoder.encode([sample.caption for sample in batch]) if encoding.has_text else None
    return partial(_write_batch, batch, latents_BCHW, text, encoding, output, drafts)


def _write_batch(
    batch: list[_Ready],
    latents_BCHW: Tensor,
    text: TextEmbeddings | None,
    encoding: EncodeSettings,
    output: _Output,
    drafts: Path,
) -> None:
    bucket = batch[0].bucket
    latents_BCHW, text, batch = _finite(latents_BCHW, text, batch, output)
    if not batch:
        return
    if bucket not in output.writers:
        output.paths[bucket] = drafts / f"{uuid.uuid4().hex}.arrow"
        output.writers[bucket] = ShardWriter(output.paths[bucket], has_text=encoding.has_text)
        output.shapes[bucket] = tuple(latents_BCHW.shape[1:])
    dtype = DTYPES[encoding.dtype]
    output.converted.update(name for sample in batch for name in sample.converted)
    output.smallest = smallest_of([output.smallest, *(sample.enlarged_from for sample in batch)])
    output.sums.append(LatentStats.of(latents_BCHW.to(dtype)))
    keys = [sample.key.encode("utf-8", "backslashreplace").decode() for sample in batch]
    table = to_table(
        keys=keys,
        captions=[sample.caption for sample in batch],
        kinds=[KIND] * len(batch),
        latents_BCHW=latents_BCHW,
        text=text,
        dtype=dtype,
    )
    output.writers[bucket].write(table)


def _finite(
    latents_BCHW: Tensor, text: TextEmbeddings | None, batch: list[_Ready], output: _Output
) -> tuple[Tensor, TextEmbeddings | None, list[_Ready]]:
    """Leave out what an encoder gave no numbers for: autoencoders overflow in half precision."""
    parts = (latents_BCHW,) if text is None else (latents_BCHW, text.embeds_BTD, text.pooled_BD)
    is_finite_B = torch.stack([part.flatten(1).isfinite().all(dim=1).cpu() for part in parts]).all(dim=0)
    if is_finite_B.all():
        return latents_BCHW, text, batch
    places = is_finite_B.nonzero().flatten()
    for i in (~is_finite_B).nonzero().flatten().tolist():
        output.leave_out(BadSample(cause="not finite", name=batch[i].key))
    kept = text and TextEmbeddings(
        embeds_BTD=text.embeds_BTD[places], mask_BT=text.mask_BT[places], pooled_BD=text.pooled_BD[places]
    )
    return latents_BCHW[places], kept, [batch[i] for i in places.tolist()]


def _keep(
    unit: int,
    encoding: EncodeSettings,
    output: _Output,
    *,
    shards: Path,
    drafts: Path,
    records: Path,
    moment: Callable[[str], None],
) -> None:
    """Finish the shards, rename them to where they belong, and after them the record."""
    infos = []
    for bucket in sorted(output.writers):
        moment("shard")
        count, size, checksum = output.writers[bucket].finish()
        file = f"shard-{unit:05d}.arrow" if len(encoding.sizes) == 1 else f"shard-{unit:05d}-{bucket:02d}.arrow"
        infos.append(ShardInfo(file=file, bucket=bucket, count=count, bytes=size, xxh3=checksum))
        output.paths[bucket].rename(shards / file)
    put_on_disk(shards)
    record = UnitRecord(
        unit=unit,
        shards=tuple(infos),
        latents_shapes=dict(sorted(output.shapes.items())),
        sums=sum_stats(output.sums),
        bad_counts=dict(sorted(output.counts.items())),
        bad_names=dict(sorted(output.names.items())),
        converted=dict(sorted(output.converted.items())),
        ignored=dict(sorted(output.ignored.items())),
        smallest=output.smallest,
    )
    moment("record")
    draft = drafts / f"{uuid.uuid4().hex}.json"
    write_durably(draft, record.to_json())
    draft.rename(records / f"{unit:05d}.json")
    put_on_disk(records)
