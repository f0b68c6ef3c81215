"""Mixtures: exact shares, one size a step, every sample once an epoch, and the same for any layout and any life."""

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash

from ecdit_ds.data.latents.dataset import LatentDataset, Samples
from ecdit_ds.data.loader import evaluation_batches, training_batches
from ecdit_ds.data.mixture import Bucket, Mixture, SampleSet, counts_of
from ecdit_ds.data.order import MAX_SLOTS, sample_order
from ecdit_ds.data.sources.bad_sample import BadSample
from tests.helpers.made_sets import write_set

BATCH = 8
SQUARE, WIDE, TALL = (3, 8, 8), (3, 4, 12), (3, 12, 4)


@dataclass(frozen=True)
class Claimed:
    """A set that says what it holds, as large as you like, and has nothing to read."""

    buckets: Sequence[Bucket]
    runs: Sequence[tuple[int, int]]
    null_text: Any = None
    is_whole: bool = True
    name: str = "claimed"
    fingerprint: str = "claimed"

    def name_of(self, sample: int) -> str:
        """Return its number."""
        return str(sample)

    def __len__(self) -> int:
        return sum(count for _, count in self.runs)

    def gather(self, indices: npt.NDArray[np.int64], stream_indices: npt.NDArray[np.int64]) -> Samples:
        """Never: only the order is asked for."""
        raise AssertionError("nothing to read")


def squares(count: int) -> Claimed:
    """Return a set of one size."""
    return Claimed((SQUARE,), [(0, count)])


def ids_of(mixture: Mixture, step: int) -> list[tuple[int, int]]:
    """Return (set, sample) at each position of a step."""
    positions = np.arange(step * mixture.global_batch_size, (step + 1) * mixture.global_batch_size)
    places = mixture.ids_at(positions)
    return list(zip(places.sets_B.tolist(), places.samples_B.tolist(), strict=True))


def mix(sets: Sequence[SampleSet], weights: Sequence[float] = (), seed: int = 0) -> Mixture:
    """Return a mixture with this file's batch."""
    return Mixture(sets, weights=weights, seed=seed, global_batch_size=BATCH)


def test_of_one_set_of_one_size_the_order_is_that_of_the_set() -> None:
    mixture = mix([squares(21)], seed=5)
    for step in range(9):
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        assert ids_of(mixture, step) == [(0, int(i)) for i in sample_order(positions, 21, seed=5)]


def test_without_weights_every_sample_of_all_sets_comes_once_an_epoch() -> None:
    mixture = mix([squares(5), squares(12), squares(7)])
    assert len(mixture) == 24
    everything = sorted((number, i) for number, size in enumerate((5, 12, 7)) for i in range(size))
    orders = []
    for epoch in range(4):
        ids = [found for step in range(3) for found in ids_of(mixture, 3 * epoch + step)]
        assert sorted(ids) == everything
        orders.append(ids)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize(("weights", "block"), [((3.0, 1.0), (3, 1)), ((0.1, 0.7), (1, 7)), ((1e-2, 0.07), (1, 7))])
def test_weights_hold_exactly_in_every_block_whatever_the_sizes(
    weights: tuple[float, float], block: tuple[int, int]
) -> None:
    mixture = mix([squares(1000), squares(11)], weights)
    numbers = [number for step in range(20) for number, _ in ids_of(mixture, step)]
    for start in range(0, len(numbers), sum(block)):
        counts = Counter(numbers[start : start + sum(block)])
        assert (counts[0], counts[1]) == block


def test_of_each_set_no_sample_comes_twice_before_all_have_come_once() -> None:
    sizes = (1000, 11)
    mixture, seen = mix([squares(size) for size in sizes], (0.31, 0.69)), Counter[tuple[int, int]]()
    for step in range(150):
        seen.update(ids_of(mixture, step))
        for number, size in enumerate(sizes):
            times = [seen[number, i] for i in range(size)]
            assert max(times) - min(times) <= 1
    assert min(seen[1, i] for i in range(11)) > 60


def test_two_sets_of_one_size_are_not_read_in_the_same_order() -> None:
    mixture = mix([squares(400), squares(400)])
    of_set: list[list[int]] = [[], []]
    for step in range(50):
        for number, i in ids_of(mixture, step):
            of_set[number].append(i)
    assert sum(a == b for a, b in zip(*of_set, strict=False)) < 10  # 0.5 expected


# Of A 12 squares in two shards and 4 wide ones between; of B 6 wide and 2 tall ones. Sample ids count through shards.
A = Claimed((SQUARE, WIDE), [(0, 5), (1, 4), (0, 7)])
B = Claimed((TALL, WIDE), [(0, 2), (1, 6)])
IDS: dict[Bucket, set[tuple[int, int]]] = {
    SQUARE: {(0, i) for i in (*range(5), *range(9, 16))},
    WIDE: {(0, i) for i in range(5, 9)} | {(1, i) for i in range(2, 8)},
    TALL: {(1, 0), (1, 1)},
}


def test_a_step_has_one_size_and_sizes_have_their_shares_of_steps() -> None:
    mixture = mix([A, B])
    assert set(mixture.buckets) == {SQUARE, WIDE, TALL}
    for block in range(5):
        sizes = Counter(mixture.bucket_at(12 * block + step) for step in range(12))
        assert sizes == {SQUARE: 6, WIDE: 5, TALL: 1}  # of 24 samples 12, 10 and 2
    for step in range(40):
        assert set(ids_of(mixture, step)) <= IDS[mixture.bucket_at(step)]


def test_of_each_size_no_sample_comes_twice_before_all_have_come_once() -> None:
    mixture, seen = mix([A, B]), Counter[tuple[int, int]]()
    for step in range(60):
        seen.update(ids_of(mixture, step))
        for ids in IDS.values():
            times = [seen[one] for one in ids]
            assert max(times) - min(times) <= 1
    assert min(seen[one] for ids in IDS.values() for one in ids) > 12


def test_weights_of_sets_hold_over_all_sizes_together() -> None:
    mixture = mix([A, B], (1.0, 3.0))
    # Of A three quarters are square and one is wide; of B one quarter is tall and three are wide.
    for block in range(3):
        sizes = Counter(mixture.bucket_at(16 * block + step) for step in range(16))
        assert sizes == {SQUARE: 3, WIDE: 1 + 9, TALL: 3}
    numbers = Counter(number for step in range(160) for number, _ in ids_of(mixture, step))
    assert numbers == {0: 320, 1: 960}


def test_positions_of_several_steps_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="several steps"):
        mix([A, B]).ids_at(np.array([7, 8]))


def test_a_replacement_is_of_the_same_set_and_size_and_differs_by_attempt() -> None:
    mixture = mix([A, B])
    for step in range(12):
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        first = mixture.ids_at(positions)
        attempts = [mixture.ids_at(positions, attempt) for attempt in range(1, 12)]
        for places in attempts:
            assert np.array_equal(places.sets_B, first.sets_B)
            found = set(zip(places.sets_B.tolist(), places.samples_B.tolist(), strict=True))
            assert found <= IDS[mixture.bucket_at(step)]
        if mixture.bucket_at(step) == SQUARE:
            assert len({tuple(places.samples_B.tolist()) for places in attempts}) == len(attempts)
        assert np.array_equal(mixture.ids_at(positions[3:5], 2).samples_B, attempts[1].samples_B[3:5])


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ([Fraction(1)], (1,)),
        ([Fraction(1, 3), Fraction(2, 3)], (1, 2)),
        ([Fraction(3, 4), Fraction(1, 6), Fraction(1, 12)], (9, 2, 1)),
    ],
)
def test_shares_become_the_smallest_counts(shares: list[Fraction], counts: tuple[int, ...]) -> None:
    assert counts_of(shares) == counts


def test_shares_too_fine_for_a_block_are_rounded_and_none_is_lost() -> None:
    rare = Fraction(1, 10**20)
    counts = counts_of([rare, Fraction(1, 3), Fraction(2, 3) - rare])
    assert sum(counts) == MAX_SLOTS and counts[0] == 1
    assert counts[1] == MAX_SLOTS // 3
    assert counts_of([rare, rare, rare, 1 - 3 * rare]) == (1, 1, 1, MAX_SLOTS - 3)  # the largest gives theirs up
    # Three thirds that no block of a power of two holds: the slot that is left goes to one of the largest remainders.
    fine = Fraction(1, 3 * 10**15)
    thirds = counts_of([Fraction(1, 3) + fine, Fraction(1, 3), Fraction(1, 3) - fine])
    assert sum(thirds) == MAX_SLOTS and set(thirds) == {MAX_SLOTS // 3, MAX_SLOTS // 3 + 1}
    assert thirds[0] == MAX_SLOTS // 3 + 1


def test_asking_for_a_step_costs_no_more_memory_of_a_corpus_of_a_trillion() -> None:
    peaks = []
    for scale in (1, 2**39 // 24):
        sets = [Claimed(of_set.buckets, [(b, n * scale) for b, n in of_set.runs]) for of_set in (A, B)]
        mixture = Mixture(sets, seed=0, global_batch_size=512)
        mixture.ids_at(np.arange(512))
        tracemalloc.start()
        ids_of(mixture, 10**7)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 20_000 and peaks[1] < 1_000_000


@pytest.fixture
def stored(tmp_path: Path) -> list[LatentDataset]:
    """Return A and B on a disk, the latter in half the bytes."""
    return [
        LatentDataset(write_set(tmp_path / name, [(claimed.buckets[b], n) for b, n in claimed.runs], dtype=dtype))
        for name, claimed, dtype in (("a", A, "float32"), ("b", B, "bfloat16"))
    ]


def test_what_is_read_is_what_the_order_says_in_its_order(stored: list[LatentDataset]) -> None:
    mixture, both = mix(stored), 0
    for step in range(24):
        positions = np.arange(step * BATCH, (step + 1) * BATCH)[::-1].copy()
        ids = ids_of(mixture, step)[::-1]
        samples = mixture.read(positions)
        assert samples.captions == tuple(f"{'ab'[number]} {i}" for number, i in ids)
        assert samples.stream_index_B.tolist() == positions.tolist()
        assert samples.latents_BCHW.shape == (BATCH, *mixture.bucket_at(step))
        assert samples.latents_BCHW[:, 0, 0, 0].tolist() == [i for _, i in ids]
        assert samples.text_embeds_BTD[:, 3, 5].tolist() == samples.text_pooled_BD[:, 5].tolist() == [i for _, i in ids]
        assert samples.text_mask_BT.dtype == torch.bool
        numbers = {number for number, _ in ids}
        both += len(numbers) == 2
        dtype = torch.bfloat16 if numbers == {1} else torch.float32  # cast where two differ, and nowhere else
        assert {samples.latents_BCHW.dtype, samples.text_embeds_BTD.dtype, samples.text_pooled_BD.dtype} == {dtype}
    assert both > 3


def test_bad_samples_keep_their_places_in_a_batch_of_several_sets(
    stored: list[LatentDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = LatentDataset.gather

    def with_bad(self: LatentDataset, indices: npt.NDArray[np.int64], stream: npt.NDArray[np.int64]) -> Samples:
        samples = gather(self, indices, stream)
        causes = {i: BadSample(cause="no image", name=name) for i, name in enumerate(samples.captions) if "3" in name}
        return replace(samples, bad=causes)

    monkeypatch.setattr(LatentDataset, "gather", with_bad)
    mixture, seen = mix(stored), 0
    for step in range(24):
        samples = mixture.read(np.arange(step * BATCH, (step + 1) * BATCH))
        assert {i: bad.name for i, bad in samples.bad.items()} == {
            i: name for i, name in enumerate(samples.captions) if "3" in name
        }
        seen += len(samples.bad)
    assert seen > 5


Steps = list[list[Samples]]


@pytest.fixture
def read(stored: list[LatentDataset]) -> Callable[..., Steps]:
    """Return `read(**changes)`: the first twelve steps of a rank."""

    def read_changed(*, dp_rank: int = 0, dp_size: int = 1, start: int = 0, num_workers: int = 0) -> Steps:
        return list(
            training_batches(
                mix(stored, (2.0, 1.0)),
                micro_batch_size=2,
                dp_rank=dp_rank,
                dp_size=dp_size,
                start_sample=start * BATCH,
                end_sample=12 * BATCH,
                num_workers=num_workers,
                transform=lambda samples: samples,
            )
        )

    return read_changed


def told(of_ranks: Sequence[Steps]) -> list[list[tuple[int, str]]]:
    """Return (position, sample) of each step over all ranks, in the order of positions."""
    return [
        sorted(
            (int(position), caption)
            for steps in of_ranks
            for samples in steps[step]
            for position, caption in zip(samples.stream_index_B, samples.captions, strict=True)
        )
        for step in range(len(of_ranks[0]))
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_samples_of_a_step_are_the_same_for_any_ranks_and_workers(
    read: Callable[..., Steps], dp_size: int, num_workers: int
) -> None:
    of_ranks = [read(dp_rank=rank, dp_size=dp_size, num_workers=num_workers) for rank in range(dp_size)]
    assert told(of_ranks) == told([read()])
    shapes = [{samples.latents_BCHW.shape for steps in of_ranks for samples in steps[step]} for step in range(12)]
    assert all(len(of_step) == 1 for of_step in shapes)
    assert len(set.union(*shapes)) == 3


@pytest.mark.parametrize(("dp_size", "num_workers"), [(1, 0), (4, 2)])
def test_from_any_step_on_they_are_those_of_a_run_that_never_stopped(
    read: Callable[..., Steps], dp_size: int, num_workers: int
) -> None:
    whole = told([read()])
    for start in range(12) if num_workers == 0 else (7,):
        of_ranks = [read(dp_rank=r, dp_size=dp_size, start=start, num_workers=num_workers) for r in range(dp_size)]
        assert told(of_ranks) == whole[start:]


@pytest.mark.parametrize(("batch_size", "dp_size"), [(1, 1), (4, 1), (3, 2), (2, 4), (16, 2)])
def test_evaluation_goes_size_by_size_and_weighs_every_sample_once(
    stored: list[LatentDataset], batch_size: int, dp_size: int
) -> None:
    of_rank = [
        list(evaluation_batches(stored[0], batch_size=batch_size, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    shapes = [[tuple(samples.latents_BCHW.shape) for samples, _ in batches] for batches in of_rank]
    assert all(of_one == shapes[0] for of_one in shapes)
    assert {shape[1:] for shape in shapes[0]} == {SQUARE, WIDE} and {shape[0] for shape in shapes[0]} == {batch_size}
    weighed: list[int] = []
    for samples, weights_B in (pair for batches in of_rank for pair in batches):
        assert samples.captions == tuple(f"a {i}" for i in samples.stream_index_B.tolist())
        weighed += samples.stream_index_B[weights_B > 0].tolist()
    assert sorted(weighed) == list(range(16))


def test_evaluation_of_several_sizes_reads_each_in_its_own_order(stored: list[LatentDataset]) -> None:
    batches = list(evaluation_batches(stored[0], batch_size=16, dp_rank=0, dp_size=1))
    weighed = [samples.stream_index_B[weights_B > 0].tolist() for samples, weights_B in batches]
    assert weighed == [[*range(5), *range(9, 16)], [*range(5, 9)]]


def test_the_order_of_a_mixture_is_the_one_that_runs_of_before_go_on_with(tmp_path: Path) -> None:
    sizes = [(3, 4, 4), (3, 2, 8)]
    sets = [
        LatentDataset(write_set(tmp_path / name, [(sizes[0], count), (sizes[1], count)]))
        for name, count in (("a", 40), ("b", 40))
    ]
    mixture = Mixture(sets, weights=(2.0, 1.0), seed=3, global_batch_size=8)
    digest = xxhash.xxh3_64()
    for step, attempt in itertools.product(range(48), range(3)):
        places = mixture.ids_at(np.arange(8) + 8 * step, attempt)
        digest.update(places.sets_B.tobytes() + places.samples_B.tobytes())
    assert digest.hexdigest() == "5b4ac4623d806235"
