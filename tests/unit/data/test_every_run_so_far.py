"""Orders that no release may change: a run that goes on would train on other samples than it would have, in silence."""

from typing import cast

import numpy as np

from ecdit_ds.data.mixture import Mixture, SampleSet
from ecdit_ds.data.order import replacement_order

BATCH = 4


class Claimed:
    """A set that says what it holds, and has nothing to read."""

    def __init__(self, *runs: tuple[int, int]) -> None:
        self.buckets = ((3, 8, 8), (3, 4, 12))
        self.runs = runs


def ids_of(mixture: Mixture, step: int, attempt: int = 0) -> tuple[list[int], list[int]]:
    """Return set and sample at each position of a step."""
    places = mixture.ids_at(np.arange(step * BATCH, (step + 1) * BATCH), attempt)
    return places.sets_B.tolist(), places.samples_B.tolist()


def mixture_of_two(seed: int) -> Mixture:
    """Return 50 and 30 samples of two sizes, of which the second set gives a quarter."""
    sets = [Claimed((0, 20), (1, 20), (0, 10)), Claimed((1, 15), (0, 15))]
    return Mixture(cast(list[SampleSet], sets), weights=(3, 1), seed=seed, global_batch_size=BATCH)


def test_the_order_of_a_mixture_is_that_of_every_run_so_far() -> None:
    mixture = mixture_of_two(5)
    assert [mixture.bucket_at(step)[1] for step in range(30, 42)] == [8, 8, 8, 8, 4, 8, 8, 8, 4, 4, 4, 8]
    assert ids_of(mixture, 0) == ([0, 0, 0, 1], [31, 36, 24, 11])
    assert ids_of(mixture, 31) == ([0, 0, 1, 0], [3, 13, 24, 16])
    assert ids_of(mixture, 1000) == ([1, 0, 0, 0], [8, 37, 23, 38])


def test_what_stands_in_for_bad_samples_is_that_of_every_run_so_far() -> None:
    assert replacement_order(np.array([0, 1, 10**12]), 1, 1000, seed=3).tolist() == [911, 236, 634]
    assert replacement_order(np.array([0, 1, 10**12]), 2, 1000, seed=3).tolist() == [971, 473, 519]
    assert ids_of(mixture_of_two(5), 1, attempt=1) == ([0, 0, 1, 0], [10, 19, 29, 40])
    assert ids_of(mixture_of_two(5), 32, attempt=2) == ([0, 0, 0, 1], [11, 16, 40, 15])
