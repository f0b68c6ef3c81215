"""The order of training: every epoch is a permutation, computed where it is asked for."""

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from ecdit_ds.data import order
from ecdit_ds.data.order import MAX_SLOTS, interleave, replacement_order, sample_order
from ecdit_ds.seeding import stable_seed

SIZES = [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 16384, 20000]


@pytest.mark.parametrize("num_samples", SIZES)
def test_each_epoch_holds_each_sample_exactly_once(num_samples: int) -> None:
    order = sample_order(np.arange(3 * num_samples), num_samples, seed=7).reshape(3, num_samples)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(num_samples), (3, 1)))


def test_a_late_epoch_is_a_permutation_too() -> None:
    num_samples, epoch = 1000, 10**12
    order = sample_order(epoch * num_samples + np.arange(num_samples), num_samples, seed=0)
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [1000, 1024])
def test_epochs_and_seeds_agree_in_no_more_places_than_chance(num_samples: int) -> None:
    places = np.arange(num_samples)
    first = sample_order(places, num_samples, seed=0)
    second_epoch = sample_order(num_samples + places, num_samples, seed=0)
    for other in (second_epoch, sample_order(places, num_samples, seed=1), places):
        assert (first == other).sum() < 10  # 1 expected


def test_neighbours_in_an_epoch_are_unrelated() -> None:
    order = sample_order(np.arange(16384), 16384, seed=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04  # five standard deviations


def test_small_sets_come_in_every_order_about_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        order = tuple(sample_order(np.arange(4), 4, seed).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert min(counts.values()) > 20  # 50 expected
    assert max(counts.values()) < 85


def test_a_position_holds_the_same_sample_whichever_others_are_asked_for_with_it() -> None:
    whole = sample_order(np.arange(50), 13, seed=3)
    assert np.array_equal(sample_order(np.arange(49, -1, -1), 13, seed=3), whole[::-1])
    assert np.array_equal(sample_order(np.array([[14, 2], [2, 47]]), 13, seed=3), whole[[[14, 2], [2, 47]]])
    assert [int(sample_order(np.array([n]), 13, seed=3)[0]) for n in range(50)] == whole.tolist()


def test_no_positions_hold_no_samples() -> None:
    assert sample_order(np.array([], dtype=np.int64), 5, seed=0).shape == (0,)


WORD = (1 << 64) - 1
HUGE = [2**40, 2**40 - 1, 2**38 + 1, 10**12 + 39, 10**9 + 7, 2**31, 123_456_789]
"""Among them the whole domain of a network, and the least part of one."""


def mixed(word: int) -> int:
    """Return the finalizer of SplitMix64, in whole numbers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


def place_of(image: int, size: int, keys: list[int]) -> int:
    """Return what a permutation of [0, size) sends to `image`: the network backwards, as often as it leaves the set."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = image >> half_bits, image & mask
        for key in reversed(keys):
            left, right = right ^ (mixed(left ^ key) & mask), left
        image = left << half_bits | right
        if image < size:
            return image


def some_below(size: int, name: str, count: int = 200) -> npt.NDArray[np.int64]:
    """Return the first and last numbers below `size`, and others by chance."""
    drawn = np.random.default_rng(stable_seed(size, name)).integers(0, size, count)
    return np.concatenate([drawn, [0, 1, size - 2, size - 1]])


def test_the_order_of_a_set_is_that_of_every_run_so_far() -> None:
    assert sample_order(np.arange(8), 8, seed=0).tolist() == [3, 2, 7, 5, 4, 6, 1, 0]
    across = sample_order(np.arange(995, 1005), 1000, seed=3)
    assert across.tolist() == [75, 212, 639, 28, 284, 33, 691, 584, 85, 300]
    far = sample_order(np.array([0, 1, 2**40 - 1, 2**40, 10**15]), 2**40, seed=7)
    assert far.tolist() == [355786610883, 604710499270, 93262965985, 425564164905, 994782426257]


@pytest.mark.parametrize("num_samples", HUGE)
def test_of_every_sample_of_a_huge_set_the_one_position_in_an_epoch_can_be_told(num_samples: int) -> None:
    epoch, seed = 5, 11
    places = some_below(num_samples, "places")
    samples = sample_order(epoch * num_samples + places, num_samples, seed)
    assert samples.min() >= 0 and samples.max() < num_samples
    keys = [stable_seed(seed, "sample order", epoch, i) for i in range(6)]
    assert [place_of(sample, num_samples, keys) for sample in samples.tolist()] == places.tolist()
    # The other way round: for any sample there is a place, within the epoch, that holds it.
    wanted = some_below(num_samples, "samples")
    found = np.array([place_of(sample, num_samples, keys) for sample in wanted.tolist()])
    assert np.array_equal(sample_order(epoch * num_samples + found, num_samples, seed), wanted)


COUNTS = [(1, 1), (3, 1), (1, 2, 3), (7,), (5, 5, 1, 40), (1, 999), (16384, 3616)]


@pytest.mark.parametrize("window", [1, 8, 13, 4096])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_mixture_holds_its_counts_in_every_block_and_each_place_of_each_stream_once(
    counts: tuple[int, ...], window: int
) -> None:
    total, blocks = sum(counts), 4
    streams, places = interleave(np.arange(blocks * total), counts, 3, "sets", window)
    for block in streams.reshape(blocks, total):
        assert np.array_equal(np.bincount(block, minlength=len(counts)), counts)
    for stream, count in enumerate(counts):
        assert np.array_equal(np.sort(places[streams == stream]), np.arange(blocks * count))


@pytest.mark.parametrize("window", [1, 8, 13])
@pytest.mark.parametrize("counts", COUNTS)
def test_streams_are_read_from_front_to_back_window_after_window(counts: tuple[int, ...], window: int) -> None:
    num_windows = min(3 * sum(counts) // window + 2, 3000)
    streams, places = interleave(np.arange(num_windows * window), counts, 3, "sets", window)
    for stream in range(len(counts)):
        read = 0
        for here in range(num_windows):
            part = slice(here * window, (here + 1) * window)
            found = np.sort(places[part][streams[part] == stream])
            assert np.array_equal(found, read + np.arange(len(found)))
            read += len(found)


@pytest.mark.parametrize("counts", [(1, 3), (300, 700, 1), (2**39 + 1, 2**38, 5)])
def test_every_stretch_has_of_each_stream_what_it_should_give_or_take_one_a_stream(counts: tuple[int, ...]) -> None:
    total, window = sum(counts), 64
    streams, _ = interleave(np.arange(100 * window), counts, 3, "sets", window)
    taken = np.stack([np.cumsum(streams == stream)[window - 1 :: window] for stream in range(len(counts))])
    due = np.outer(np.array(counts) / total, np.arange(window, 100 * window + 1, window))
    # What lies before a window's end ends within one block, which is dealt from anywhere: once for each end of it.
    assert np.abs(taken - due).max() < 2 * len(counts)


@pytest.mark.parametrize("counts", [(1, 7), (1, 8), (1, 11), (2, 13), (1, 30)])
def test_a_rare_stream_has_no_place_of_its_own_in_a_window(counts: tuple[int, int]) -> None:
    window, num_windows = 8, 20_000
    streams, _ = interleave(np.arange(num_windows * window), counts, 3, "sets", window)
    at_place = (streams.reshape(num_windows, window) == 0).sum(axis=0)
    expected = num_windows * counts[0] / sum(counts)
    assert np.abs(at_place - expected).max() < 5 * np.sqrt(expected)


def test_one_stream_alone_is_its_own_mixture() -> None:
    positions = np.array([7, 0, 2**50, 3])
    streams, places = interleave(positions, (12,), 0, "sets", 8)
    assert streams.tolist() == [0] * 4 and places.tolist() == positions.tolist()


def position_of(stream: int, place: int, counts: tuple[int, ...], seed: int, purpose: str, window: int) -> int:
    """Return where a place of a stream is in the mixture, by walking back through every part of `interleave`."""
    total = sum(counts)
    block, within = divmod(place, counts[stream])
    start = mixed(stable_seed(seed, purpose, "start") ^ mixed(block)) % total
    # How many of this stream lie before the start, and then the slot that has so many before it.
    passed, rest = start, total
    for count in counts[:stream]:
        passed, rest = passed - passed * count // rest, rest - count
    own = (within + passed * counts[stream] // rest) % counts[stream]
    slot = -(-((own + 1) * rest) // counts[stream]) - 1
    for earlier in reversed(range(stream)):
        rest += counts[earlier]
        # The slot that is left over as number `slot` when the earlier stream has taken its own.
        slot = next(
            s
            for s in range(slot * rest // (rest - counts[earlier]), total + 1)
            if s - s * counts[earlier] // rest == slot
            and (s + 1) * counts[earlier] // rest == s * counts[earlier] // rest
        )
    shuffled = block * total + (slot - start) % total
    first = max(shuffled // window * window, block * total)
    end = min(shuffled // window * window + window, (block + 1) * total)
    keys = [mixed(stable_seed(seed, purpose, i) ^ mixed(first)) for i in range(6)]
    return first + place_of(shuffled - first, end - first, keys)


@pytest.mark.parametrize(
    "counts", [(2**40 - 1, 1), (2**39, 2**39), (10**9, 7 * 10**8, 3), (1, 2**38), (5, 2**37, 3**20, 2**39)]
)
def test_of_every_place_of_a_stream_the_one_position_in_a_huge_mixture_can_be_told(counts: tuple[int, ...]) -> None:
    total, seed, window = sum(counts), 9, 4096
    positions = 4 * total + some_below(total, "positions")
    streams, places = interleave(positions, counts, seed, "sets", window)
    found = [
        position_of(stream, place, counts, seed, "sets", window)
        for stream, place in zip(streams.tolist(), places.tolist(), strict=True)
    ]
    assert found == positions.tolist()


def test_blocks_seeds_and_purposes_have_orders_of_their_own() -> None:
    counts, positions = (500, 500), np.arange(1000)
    first, _ = interleave(positions, counts, 0, "sets", 1000)
    for other, _ in (
        interleave(1000 + positions, counts, 0, "sets", 1000),
        interleave(positions, counts, 1, "sets", 1000),
        interleave(positions, counts, 0, "buckets", 1000),
    ):
        assert 420 < (first == other).sum() < 580  # 500 expected, five standard deviations


def test_a_block_of_two_starts_with_either_about_equally_often() -> None:
    streams, _ = interleave(np.arange(0, 8000, 2), (1, 1), 0, "sets", 8)
    assert 1840 < streams.sum() < 2160  # 2000 expected, five standard deviations


def test_a_position_belongs_to_the_same_stream_whichever_others_are_asked_for_with_it() -> None:
    streams, places = interleave(np.arange(60), (3, 4), 5, "sets", 8)
    some = np.array([[59, 0], [13, 14]])
    again = interleave(some, (3, 4), 5, "sets", 8)
    assert np.array_equal(again[0], streams[some]) and np.array_equal(again[1], places[some])


def test_replacements_are_spread_over_the_set_and_no_two_attempts_are_alike() -> None:
    positions = np.arange(5000)
    first = replacement_order(positions, 1, 10, seed=0)
    assert np.bincount(first, minlength=10).min() > 390  # 500 expected, five standard deviations
    assert np.bincount(first, minlength=10).max() < 610
    for other in (replacement_order(positions, 2, 10, seed=0), replacement_order(positions, 1, 10, seed=1)):
        assert 390 < (first == other).sum() < 610
    assert np.array_equal(replacement_order(positions[::-1], 1, 10, seed=0), first[::-1])
    assert replacement_order(positions, 1, MAX_SLOTS, seed=0).max() < MAX_SLOTS
    assert set(replacement_order(positions, 1, 1, seed=0).tolist()) == {0}


@pytest.mark.parametrize("size", [1000, *HUGE])
def test_a_position_costs_a_few_evaluations_and_no_memory_however_large_the_set_is(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, evaluated = order._feistel, [0]

    def counted(values: npt.NDArray[np.uint64], *rest: object) -> npt.NDArray[np.uint64]:
        evaluated[0] += len(values)
        return network(values, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(order, "_feistel", counted)
    positions = np.random.default_rng(0).integers(0, size, 2000)
    for ask in (
        lambda: sample_order(positions % size, size, 0),
        lambda: interleave(positions // 512 * 512, (1, size - 1), 0, "sets", 512),
        lambda: replacement_order(positions, 1, size, 0),
    ):
        evaluated[0] = 0
        tracemalloc.start()
        ask()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The domain is at most four times the set, so four are expected at most.
        assert evaluated[0] <= 4.4 * len(positions)
        assert peak < 60 * positions.nbytes
