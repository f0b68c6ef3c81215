"""The order of training: every epoch is a permutation, computed where it is asked for."""

import numpy as np
import pytest

from ecdit_ds.data.order import sample_order

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
