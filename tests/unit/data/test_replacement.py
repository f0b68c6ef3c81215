"""Bad samples: which ones, what stands in for them under any layout, and that nothing bad is ever trained on."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ecdit_ds.data.latents.dataset import LatentDataset, Samples
from ecdit_ds.data.loader import training_batches
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.data.replacement import MAX_REPLACEMENTS, read_valid, replace_nonfinite
from ecdit_ds.data.sources.bad_sample import BadSample, BadSampleReason, ReplacedSample
from ecdit_ds.errors import DataError
from tests.helpers.made_sets import write_set

BATCH, STEPS, COUNT = 8, 12, 20
SQUARE, WIDE = (3, 4, 4), (3, 2, 8)
BROKEN = {
    1: "latents nan",
    4: "latents inf",
    5: "text_embeds -inf",
    6: "text_pooled nan",
    9: "mask",
    13: "text_embeds nan",
    17: "text_pooled inf",
}
Row = tuple[int, str, bytes, tuple[ReplacedSample, ...]]


def as_read(samples: Samples) -> Samples:
    """Leave a micro-batch as it is."""
    return samples


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """Return a set of which a third is bad."""
    folder = tmp_path_factory.mktemp("sets") / request.param
    return LatentDataset(write_set(folder, [(SQUARE, COUNT)], dtype=request.param, broken=BROKEN))


@pytest.fixture(scope="module")
def whole(broken: LatentDataset) -> LatentDataset:
    """Return the same samples before they broke."""
    folder = Path(broken.name).with_name(f"whole {broken.index.latents_dtype}")
    return LatentDataset(write_set(folder, [(SQUARE, COUNT)], dtype=broken.index.latents_dtype))


def mix(*sets: LatentDataset, weights: tuple[float, ...] = ()) -> Mixture:
    """Return a mixture with this file's batch."""
    return Mixture(sets, weights=weights, seed=3, global_batch_size=BATCH)


def rows_of(mixture: Mixture, *, ranks: int = 1, workers: int = 0, start: int = 0, stop: int = STEPS) -> list[Row]:
    """Return position, caption, pixels and what was replaced of all samples that some ranks read, by position."""
    rows: list[Row] = []
    for rank in range(ranks):
        steps = training_batches(
            mixture,
            micro_batch_size=2,
            dp_rank=rank,
            dp_size=ranks,
            start_sample=start * BATCH,
            end_sample=stop * BATCH,
            num_workers=workers,
            transform=as_read,
        )
        for batch in itertools.chain.from_iterable(steps):
            assert not batch.bad
            for place, position in enumerate(batch.stream_index_B.tolist()):
                pixels = batch.latents_BCHW[place].float().numpy().tobytes()
                rows.append((position, batch.captions[place], pixels, batch.replaced.get(place, ())))
    return sorted(rows)


def test_what_is_bad_is_replaced_by_the_first_good_attempt_and_nothing_else_changes(
    broken: LatentDataset, whole: LatentDataset
) -> None:
    mixture, before = mix(broken), rows_of(mix(whole))
    seen = set()
    for (position, caption, pixels, replaced), (_, own_caption, own_pixels, _) in zip(
        rows_of(mixture), before, strict=True
    ):
        here = np.array([position])
        tried = [int(mixture.ids_at(here, k).samples_B[0]) for k in range(len(replaced) + 1)]
        assert [int(bad.key) for bad in replaced] == tried[:-1] and set(tried[:-1]) <= BROKEN.keys()
        assert tried[-1] not in BROKEN and caption.endswith(f" {tried[-1]}")
        assert pixels == torch.full(SQUARE, float(tried[-1])).numpy().tobytes()
        assert all((bad.position, bad.set) == (position, broken.name) for bad in replaced)
        seen |= {int(bad.key) for bad in replaced}
        if not replaced:
            assert pixels == own_pixels and caption.split()[-1] == own_caption.split()[-1]
    assert seen == BROKEN.keys()


def test_every_cause_is_told(broken: LatentDataset) -> None:
    told = {int(bad.key): bad.cause for row in rows_of(mix(broken)) for bad in row[3]}
    assert told == {i: "text without a token" if what == "mask" else "not finite" for i, what in BROKEN.items()}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 2)])
def test_the_same_stands_in_on_any_ranks_and_workers(broken: LatentDataset, ranks: int, workers: int) -> None:
    assert rows_of(mix(broken), ranks=ranks, workers=workers) == rows_of(mix(broken))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_stands_in_after_a_resume(broken: LatentDataset, workers: int) -> None:
    parts = rows_of(mix(broken), stop=5), rows_of(mix(broken), start=5, ranks=2, workers=workers)
    assert parts[0] + parts[1] == rows_of(mix(broken))


def test_the_largest_numbers_are_good(tmp_path: Path) -> None:
    largest = {
        dtype: {
            i: f"{name} {sign}{top}"
            for i, (name, sign) in enumerate(itertools.product(("latents", "text_embeds", "text_pooled"), ("", "-")))
        }
        for dtype, top in (("float32", "3.4028234e38"), ("bfloat16", "3.38e38"))
    }
    for dtype, samples in largest.items():
        folder = write_set(tmp_path / dtype, [(SQUARE, COUNT)], dtype=dtype, broken=samples)
        assert not any(row[3] for row in rows_of(mix(LatentDataset(folder))))


def test_what_stands_in_is_of_the_same_set_and_size(tmp_path: Path) -> None:
    one = write_set(tmp_path / "one", [(SQUARE, 9), (WIDE, 9)], broken={2: "latents nan", 12: "latents nan"})
    two = write_set(tmp_path / "two", [(SQUARE, 9), (WIDE, 9)], dtype="bfloat16", broken={7: "mask", 10: "latents nan"})
    mixture = mix(LatentDataset(one), LatentDataset(two), weights=(1.0, 3.0))
    seen = set()
    for position, caption, _, replaced in rows_of(mixture, stop=60):
        for bad in replaced:
            assert caption.split()[0] == Path(bad.set).name
            seen.add((Path(bad.set).name, bad.key))
        places = mixture.ids_at(np.array([position]), len(replaced))
        assert caption == f"{('one', 'two')[int(places.sets_B[0])]} {int(places.samples_B[0])}"
    # A key counts within its shard: samples 12 and 10 are number 3 and 1 of the second.
    assert seen == {("one", "2"), ("one", "3"), ("two", "7"), ("two", "1")}


@dataclass(frozen=True)
class Telling:
    """A set that says itself which samples are bad, and has texts still to be encoded."""

    inner: LatentDataset

    def __getattr__(self, name: str) -> object:
        return getattr(object.__getattribute__(self, "inner"), name)

    def __len__(self) -> int:
        return len(self.inner)

    def gather(self, indices: npt.NDArray[np.int64], stream_indices: npt.NDArray[np.int64]) -> Samples:
        """Every third sample is bad."""
        samples = self.inner.gather(indices, stream_indices)
        count = len(indices)
        bad = {
            place: BadSample(cause="not an image", name=f"picture {sample} \udcff")
            for place, sample in enumerate(indices.tolist())
            if sample % 3 == 0
        }
        return replace(
            samples,
            bad=bad,
            text_embeds_BTD=torch.empty(count, 0, 0),
            text_pooled_BD=torch.empty(count, 0),
            text_mask_BT=torch.empty(count, 0, dtype=torch.bool),
        )


def test_what_a_set_says_is_bad_is_replaced_and_texts_to_come_are_not_judged(whole: LatentDataset) -> None:
    mixture = Mixture([Telling(whole)], seed=3, global_batch_size=BATCH)  # type: ignore[list-item]
    told = []
    for step in range(STEPS):
        samples = read_valid(mixture, np.arange(step * BATCH, (step + 1) * BATCH))
        assert all(int(caption.split()[-1]) % 3 for caption in samples.captions)
        told += [bad for replaced in samples.replaced.values() for bad in replaced]
    assert len(told) > STEPS
    assert {bad.cause for bad in told} == {"not an image"}
    assert all(bad.key.startswith("picture ") and bad.key.endswith(" \\udcff") for bad in told)


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_is_good_one_line_names_the_last(tmp_path: Path, workers: int) -> None:
    folder = write_set(tmp_path / "hopeless", [(SQUARE, COUNT)], broken=dict.fromkeys(range(COUNT), "latents nan"))
    with pytest.raises(DataError) as caught:
        rows_of(mix(LatentDataset(folder)), workers=workers)
    said = str(caught.value)
    assert "\n" not in said and str(folder) in said
    assert f"{MAX_REPLACEMENTS} replacements in a row are bad at position 0" in said and "(not finite)" in said
    assert said.endswith("encode it anew")


def test_one_good_sample_in_four_is_enough(tmp_path: Path) -> None:
    bad = {i: "latents nan" for i in range(COUNT) if i % 4}
    folder = write_set(tmp_path / "poor", [(SQUARE, COUNT)], broken=bad)
    rows = rows_of(mix(LatentDataset(folder)), stop=3)
    assert {int(caption.split()[-1]) % 4 for _, caption, _, _ in rows} == {0}
    assert max(len(replaced) for *_, replaced in rows) > 2


def test_the_last_replacement_that_is_allowed_counts_too(tmp_path: Path) -> None:
    position, whole = np.zeros(1, dtype=np.int64), LatentDataset(write_set(tmp_path / "whole", [(SQUARE, 200)]))
    tried = [int(mix(whole).ids_at(position, attempt).samples_B[0]) for attempt in range(1 + MAX_REPLACEMENTS)]
    assert tried[-1] not in tried[:-1], "take another position"
    folder = write_set(tmp_path / "late", [(SQUARE, 200)], broken=dict.fromkeys(tried[:-1], "latents nan"))
    samples = read_valid(mix(LatentDataset(folder)), position)
    assert len(samples.replaced[0]) == MAX_REPLACEMENTS
    assert samples.captions == (f"late {tried[-1]}",)


SPOILED = {
    "latents_BCHW": torch.nan,
    "text_embeds_BTD": torch.inf,
    "text_pooled_BD": -torch.inf,
    "text_mask_BT": False,
}


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize("places", [(0,), (1, 2), (6, 7), (0, 7), (0, 1, 3, 4, 5, 6, 7), tuple(range(BATCH))])
def test_what_encoders_spoil_is_replaced_by_the_next_good_one_of_the_micro_batch(
    broken: LatentDataset, what: str, places: tuple[int, ...]
) -> None:
    mixture = mix(broken)
    before = next(
        found for step in range(STEPS) if (found := read_valid(mixture, np.arange(BATCH) + step * BATCH)).replaced
    )
    number = [int(caption.split()[-1]) for caption in before.captions]
    getattr(before, what)[list(places)] = SPOILED[what]
    if len(places) == BATCH:
        with pytest.raises(DataError, match=rf"any of {BATCH} samples .* the first is {number[0]} \("):
            replace_nonfinite(mixture, before)
        return
    after = replace_nonfinite(mixture, before)
    for place in range(BATCH):
        chosen = next(i % BATCH for i in range(place, place + BATCH) if i % BATCH not in places)
        assert after.captions[place] == before.captions[chosen]
        for name in SPOILED:
            assert torch.equal(getattr(after, name)[place], getattr(before, name)[chosen]), (place, name)
        told, earlier = after.replaced.get(place, ()), before.replaced.get(place, ())
        assert told[: len(earlier)] == earlier
        cause: BadSampleReason = "text without a token" if what == "text_mask_BT" else "not finite"
        new = ReplacedSample(
            position=int(before.stream_index_B[place]), set=broken.name, key=str(number[place]), cause=cause
        )
        assert told[len(earlier) :] == ((new,) if place in places else ())
    assert torch.equal(after.stream_index_B, before.stream_index_B)
