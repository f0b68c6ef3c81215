"""Wherever samples are left out, replaced, packed or reordered, all that belongs to one stays together."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ecdit_ds.data.encoders.online import OnlineEncoders
from ecdit_ds.data.latents.dataset import LatentDataset, Samples
from ecdit_ds.data.loader import evaluation_batches, training_batches
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.data.precompute.job import PrecomputeJob, encode_corpus
from ecdit_ds.data.precompute.unit import EncodeSettings
from ecdit_ds.data.prefetch import prefetch
from ecdit_ds.data.raw_dataset import RawImageDataset
from ecdit_ds.data.replacement import replace_nonfinite
from ecdit_ds.data.sources.open import open_source
from tests.helpers.numbered import NumberedImages, NumberedTexts, numbers_in, write_pictures

COUNT, BATCH = 22, 8
SQUARE, WIDE = (8, 8), (4, 12)
"""(height, width)."""
OVERFLOWS, BROKEN_EMBEDS, BROKEN_POOLED = (1, 7, 8), (12, 15), (18,)
LEFT_OUT = {*OVERFLOWS, *BROKEN_EMBEDS, *BROKEN_POOLED}
ENCODERS = NumberedImages(OVERFLOWS), NumberedTexts(BROKEN_EMBEDS, BROKEN_POOLED)


def encode(
    source: Path,
    destination: Path,
    *,
    dtype: str = "float32",
    batch_size: int = 3,
    has_text: bool = True,
    encoders: tuple[NumberedImages, NumberedTexts] = ENCODERS,
) -> tuple[LatentDataset, dict[str, list[str]]]:
    """Encode pictures in units of five; return the set, and the names of what was left out by cause."""
    image, text = encoders
    encoding = EncodeSettings(
        image_encoder=image,
        text_encoder=text,
        sizes=(SQUARE, WIDE),
        dtype=dtype,
        batch_size=batch_size,
        threads=2,
        has_text=has_text,
    )
    facts = {"identity": image.identity}, {"identity": text.identity}
    report = encode_corpus(
        PrecomputeJob(
            source=open_source(str(source), unit_samples=5),
            destination=destination,
            encoding=encoding,
            image_facts=facts[0],
            text_facts=facts[1],
            settings={},
            max_bad=0.9,
        )
    )
    assert report is not None
    return LatentDataset(destination), {cause: found["names"] for cause, found in report["causes"].items()}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of numbered pictures, every third of them wide."""
    return write_pictures(tmp_path / "pictures", COUNT, wide=(12, 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_what_is_left_out_of_a_corpus_takes_its_own_caption_key_and_text_with_it(
    pictures: Path, tmp_path: Path, batch_size: int, dtype: str
) -> None:
    dataset, left_out = encode(pictures, tmp_path / "set", batch_size=batch_size, dtype=dtype)
    assert {int(name) for name in left_out["not finite"]} == LEFT_OUT
    found = []
    for i in range(len(dataset)):
        here = np.array([i])
        (number,) = numbers_in(dataset.gather(here, here))
        assert dataset.name_of(i) == f"{number:02}"
        assert dataset.gather(here, here).latents_BCHW.shape[2:] == (WIDE if number % 3 == 0 else SQUARE)
        found.append(number)
    assert sorted(found) == sorted({*range(COUNT)} - LEFT_OUT)
    for channel in range(3):
        assert dataset.index.latents_mean[channel] == pytest.approx(
            np.average(found, weights=[48 if number % 3 == 0 else 64 for number in found])
        )


def test_captions_alone_stay_beside_their_latents(pictures: Path, tmp_path: Path) -> None:
    dataset, _ = encode(pictures, tmp_path / "set", has_text=False)
    found = [numbers_in(dataset.gather(np.array([i]), np.array([i])))[0] for i in range(len(dataset))]
    assert sorted(found) == sorted({*range(COUNT)} - {*OVERFLOWS})


@dataclass(frozen=True)
class Spoilt:
    """A set some of whose samples turn bad when they are read, as if the disk had changed them."""

    inner: LatentDataset
    numbers: tuple[int, ...]

    def __getattr__(self, name: str) -> object:
        return getattr(object.__getattribute__(self, "inner"), name)

    def __len__(self) -> int:
        return len(self.inner)

    def gather(self, indices: npt.NDArray[np.int64], stream_indices: npt.NDArray[np.int64]) -> Samples:
        """Spoil one tensor or another of a bad sample, or its mask."""
        samples = self.inner.gather(indices, stream_indices)
        for place, number in enumerate(numbers_in(samples)):
            if number in self.numbers:
                tensors = (samples.latents_BCHW, samples.text_embeds_BTD, samples.text_pooled_BD)
                samples.text_mask_BT[place] = number % 4 != 3
                if number % 4 != 3:
                    tensors[number % 4][place].view(-1)[-1] = torch.nan
        return samples


def mixture_of(pictures: Path, tmp_path: Path) -> Mixture:
    """Return two sets of two sizes and two kinds of floats, a third of their samples bad."""
    whole = NumberedImages(), NumberedTexts()
    sets = [
        Spoilt(encode(pictures, tmp_path / dtype, dtype=dtype, encoders=whole)[0], (1, 2, 6, 7, 15, 16))
        for dtype in ("float32", "bfloat16")
    ]
    return Mixture(sets, weights=(2.0, 1.0), seed=3, global_batch_size=BATCH)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_what_is_mixed_replaced_and_packed_stays_together(
    pictures: Path, tmp_path: Path, workers: int, micro_batch_size: int
) -> None:
    mixture, positions, stood_in = mixture_of(pictures, tmp_path), [], 0
    for batch in itertools.chain.from_iterable(
        training_batches(
            mixture,
            micro_batch_size=micro_batch_size,
            dp_rank=0,
            dp_size=1,
            start_sample=0,
            end_sample=12 * BATCH,
            num_workers=workers,
            transform=as_read,
        )
    ):
        numbers = numbers_in(batch)
        assert not {1, 2, 6, 7, 15, 16} & {*numbers}
        for place, (number, position) in enumerate(zip(numbers, batch.stream_index_B.tolist(), strict=True)):
            tried = batch.replaced.get(place, ())
            places = mixture.ids_at(np.array([position]), len(tried))
            of_set = mixture.sets[int(places.sets_B[0])]
            assert of_set.name_of(int(places.samples_B[0])) == f"{number:02}"
            stood_in += bool(tried)
        positions += batch.stream_index_B.tolist()
    assert positions == list(range(12 * BATCH)) and stood_in > BATCH


def as_read(samples: Samples) -> Samples:
    """Leave a micro-batch as it is."""
    return samples


def test_held_out_samples_stay_together_bucket_by_bucket(pictures: Path, tmp_path: Path) -> None:
    dataset, _ = encode(pictures, tmp_path / "set")
    seen: list[int] = []
    for rank in range(2):
        for samples, weights_B in evaluation_batches(dataset, batch_size=3, dp_rank=rank, dp_size=2):
            numbers = numbers_in(samples)
            assert [dataset.name_of(i) for i in samples.stream_index_B.tolist()] == [f"{n:02}" for n in numbers]
            seen += [number for number, weight in zip(numbers, weights_B.tolist(), strict=True) if weight]
    assert sorted(seen) == sorted({*range(COUNT)} - LEFT_OUT)


@pytest.mark.parametrize("are_ahead", [False, True])
def test_pictures_encoded_beside_training_stay_with_their_captions(tmp_path: Path, are_ahead: bool) -> None:
    folder = write_pictures(tmp_path / "pictures", COUNT)
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "10.txt").unlink()
    image, text = ENCODERS
    raw = RawImageDataset(
        open_source(str(folder), unit_samples=5), name="raw", latents=(3, 8, 8), downsampling=1, text_encoder=text
    )
    mixture = Mixture([raw], seed=1, global_batch_size=BATCH)
    steps = training_batches(
        mixture,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        start_sample=0,
        end_sample=6 * BATCH,
        num_workers=0,
        transform=as_read,
    )
    beside, doubled, seen = OnlineEncoders(image_encoder=image, text_encoder=text), 0, set[int]()

    def finish(step: list[Samples]) -> list[tuple[list[int], Samples]]:
        read = [numbers_in(batch) for batch in step]  # pixels beside captions
        finished = beside.finish(step)
        return list(zip(read, [replace_nonfinite(mixture, batch) for batch in finished], strict=True))

    for read, batch in itertools.chain.from_iterable(
        prefetch(steps, finish) if are_ahead else (finish(step) for step in steps)
    ):
        numbers = numbers_in(batch)
        assert not batch.lacks_latents and not batch.lacks_text and not {3, 10, *LEFT_OUT} & {*numbers}
        for place, (before, number) in enumerate(zip(read, numbers, strict=True)):
            if before in LEFT_OUT:
                good = [read[(place + k) % 4] for k in range(1, 4) if read[(place + k) % 4] not in LEFT_OUT]
                assert number == good[0] and batch.replaced[place][-1].key == f"{before:02}"
                doubled += 1
            else:
                assert number == before
        seen |= {*numbers}
    assert doubled > 3 and len(seen) > 10


def test_batches_with_and_without_latents_or_texts_are_finished_each_in_its_place() -> None:
    def samples_of(numbers: list[int], *, has_latents: bool, has_text: bool) -> Samples:
        captions = [f"picture {number}" for number in numbers]
        pixels_BHW3 = torch.tensor(numbers).mul(5).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 4, 4, 3)
        text, count = NumberedTexts().encode(captions), len(numbers)
        raw = Samples(
            latents_BCHW=torch.empty(count, 0, 0, 0),
            text_embeds_BTD=torch.empty(count, 0, 0),
            text_mask_BT=torch.empty(count, 0, dtype=torch.bool),
            text_pooled_BD=torch.empty(count, 0),
            captions=tuple(captions),
            stream_index_B=torch.tensor(numbers),
            pixels_BHW3=pixels_BHW3,
        )
        if has_latents:
            latents_BCHW = torch.tensor(numbers).float().view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
            raw = replace(raw, latents_BCHW=latents_BCHW, pixels_BHW3=torch.empty(count, 0, 0, 3, dtype=torch.uint8))
        if has_text:
            raw = replace(
                raw, text_embeds_BTD=text.embeds_BTD, text_mask_BT=text.mask_BT, text_pooled_BD=text.pooled_BD
            )
        return raw

    numbers = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 12]]
    kinds = [(False, False), (True, False), (False, True), (False, False), (True, True)]
    batches = [samples_of(n, has_latents=a, has_text=b) for n, (a, b) in zip(numbers, kinds, strict=True)]
    finished = OnlineEncoders(image_encoder=NumberedImages(), text_encoder=NumberedTexts()).finish(batches)
    assert [numbers_in(batch) for batch in finished] == numbers
    assert not any(batch.lacks_latents or batch.lacks_text for batch in finished)
