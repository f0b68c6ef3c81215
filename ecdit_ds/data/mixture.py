"""What training reads: one set or several, mixed by weights, of one size or several, in an order that is a function.

A step has one bucket, so that its shapes are static, and all ranks agree on it:

    step -> bucket, k        by `interleave` over the buckets: the bucket's k-th step
    position -> set, place   by `interleave` over the sets that have the bucket, from k * global_batch_size on
    place -> sample          by `sample_order` over the set's samples of that bucket: epochs of their own

Nothing is held but a few numbers a set and a shard. Of one set of one size, the order is `sample_order` and no more.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecdit_ds.data.encoders.base import TextEmbeddings
from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.data.order import MAX_SLOTS, interleave, replacement_order, sample_order
from ecdit_ds.seeding import stable_seed

Bucket = tuple[int, int, int]
"""(C, H, W) of latents."""

_SHUFFLED_STEPS = 32
"""Within so many steps, the order of buckets is left to chance; over more, each comes as often as it should."""


class SampleSet(Protocol):
    """What can be mixed: samples by number, each of one of a few sizes. Cheap to pickle and to fork."""

    @property
    def name(self) -> str:
        """Where it was opened."""

    @property
    def fingerprint(self) -> str:
        """A name of its samples, in their order, wherever it was opened."""

    @property
    def null_text(self) -> TextEmbeddings:
        """The text of no text, B = 1."""

    @property
    def buckets(self) -> Sequence[Bucket]:
        """The sizes of latents."""

    @property
    def runs(self) -> Sequence[tuple[int, int]]:
        """(bucket, count) of successive samples of one bucket, from sample 0 to the last."""

    @property
    def is_whole(self) -> bool:
        """Whether samples come with latents and text vectors, so that no encoder need run beside training."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def name_of(self, sample: int) -> str:
        """Return the name of a sample in its source."""

    def gather(self, indices: npt.NDArray[np.int64], stream_indices: npt.NDArray[np.int64]) -> Samples:
        """Return the samples at `indices` (B,), all of one bucket, in that order, repeats allowed."""


@dataclass(frozen=True, kw_only=True)
class SampleIds:
    """Where samples are."""

    sets_B: npt.NDArray[np.int64]
    """Which of the mixture's sets."""
    samples_B: npt.NDArray[np.int64]
    """Which sample of it."""


class BucketView:
    """The samples of a set that have one bucket, counted among themselves."""

    def __init__(self, runs: Sequence[tuple[int, int]], bucket: int) -> None:
        """Find them in a set's `runs`."""
        is_here = np.array([number == bucket for number, _ in runs], dtype=bool)
        counts = np.array([count for _, count in runs], dtype=np.int64)
        self._ends = np.cumsum(counts[is_here])
        self._shifts = (np.cumsum(counts) - counts)[is_here] - (self._ends - counts[is_here])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def samples(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number in the set of the samples at some places among these."""
        return places + self._shifts[np.searchsorted(self._ends, places, side="right")]


@dataclass(frozen=True, kw_only=True)
class _Component:
    """What a set holds of a bucket."""

    number: int
    """Index of the set."""
    part: BucketView
    seed: int
    """Seed of its order."""


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """The endless stream of one bucket."""

    components: tuple[_Component, ...]
    counts: tuple[int, ...]
    """Positions of each of them in a block."""


class Mixture:
    """The endless stream of training; a function of the seed and the position, and cheap to pickle and to fork."""

    def __init__(
        self, sets: Sequence[SampleSet], *, weights: Sequence[float] = (), seed: int, global_batch_size: int
    ) -> None:
        """Mix sets that hold texts and channels alike.

        Args:
            sets: one or more.
            weights: the share of the samples that each set gives, up to a common factor; by default as many as it has,
                so that each sample of the whole comes once an epoch. Within a set, buckets have their natural shares.
            seed: of the order.
            global_batch_size: positions of a step.
        """
        self.sets, self.seed, self.global_batch_size = tuple(sets), seed, global_batch_size
        shares = shares_of([held_by(of_set.buckets, of_set.runs) for of_set in sets], weights)
        self.buckets = tuple(shares)
        """Sizes of latents, each of them of some set's samples."""
        self._counts = counts_of([sum(of_sets.values(), Fraction()) for of_sets in shares.values()])
        self._window: tuple[int, list[tuple[int, int]]] = (-1, [])
        """Bucket and turn of the steps that were last asked for: they are found together."""
        is_one = sum(map(len, shares.values())) == 1
        self._streams = [
            _Stream(
                components=tuple(
                    _Component(
                        number=number,
                        part=BucketView(sets[number].runs, list(sets[number].buckets).index(bucket)),
                        seed=seed if is_one else stable_seed(seed, "component", number, bucket),
                    )
                    for number in of_sets
                ),
                counts=counts_of(list(of_sets.values())),
            )
            for bucket, of_sets in shares.items()
        ]

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    @property
    def null_text(self) -> TextEmbeddings:
        """The text of no text, B = 1: the first set's, and every other's but for what it is stored as."""
        return self.sets[0].null_text

    @property
    def is_whole(self) -> bool:
        """Whether all sets are."""
        return all(of_set.is_whole for of_set in self.sets)

    def bucket_at(self, step: int) -> Bucket:
        """Return the size of all latents of a step (from 0)."""
        return self.buckets[self._bucket_at(step)[0]]

    def ids_at(self, positions: npt.NDArray[np.int64], attempt: int = 0) -> SampleIds:
        """Return which samples stand at some positions of one step.

        Args:
            positions: int64 (B,).
            attempt: how many samples proved bad at each of these positions; what replaces them is of the same set and
                bucket.
        """
        step = int(positions[0]) // self.global_batch_size
        assert (positions // self.global_batch_size == step).all(), f"positions of several steps: {positions}"
        bucket, turn = self._bucket_at(step)
        stream = self._streams[bucket]
        own_positions = positions + (turn - step) * self.global_batch_size
        which, places = interleave(
            own_positions, stream.counts, self.seed, f"sets of {self.buckets[bucket]}", self.global_batch_size
        )
        sets_B, samples_B = np.empty_like(which), np.empty_like(which)
        for i in np.unique(which):
            is_here, component = which == i, stream.components[i]
            count = len(component.part)
            order = (
                replacement_order(positions[is_here], attempt, count, component.seed)
                if attempt
                else sample_order(places[is_here], count, component.seed)
            )
            sets_B[is_here], samples_B[is_here] = component.number, component.part.samples(order)
        return SampleIds(sets_B=sets_B, samples_B=samples_B)

    def read(self, positions: npt.NDArray[np.int64], attempt: int = 0) -> Samples:
        """Return the samples at some positions of one step, as `ids_at`; `bad` says which cannot be trained on."""
        places = self.ids_at(positions, attempt)
        parts = []
        for number in np.unique(places.sets_B):
            here = np.flatnonzero(places.sets_B == number)
            parts.append((here, self.sets[number].gather(places.samples_B[here], positions[here])))
        return parts[0][1] if len(parts) == 1 else _joined(parts, len(positions))

    def _bucket_at(self, step: int) -> tuple[int, int]:
        """Return the number of a step's bucket, and how many steps had it before."""
        window, here = divmod(step, _SHUFFLED_STEPS)
        known = self._window  # one look, since another thread may be at another window
        if known[0] != window:
            self._window = known = window, self._buckets_of(window)
        return known[1][here]

    def _buckets_of(self, window: int) -> list[tuple[int, int]]:
        steps = np.arange(window * _SHUFFLED_STEPS, (window + 1) * _SHUFFLED_STEPS)
        buckets, turns = interleave(steps, self._counts, self.seed, "buckets", _SHUFFLED_STEPS)
        for bucket in np.unique(buckets):
            # The turns at a bucket, put in order: then its samples come epoch after epoch.
            turns[buckets == bucket] = np.sort(turns[buckets == bucket])
        return list(zip(buckets.tolist(), turns.tolist(), strict=True))


def held_by(buckets: Sequence[Bucket], runs: Sequence[tuple[int, int]]) -> Counter[Bucket]:
    """Return how many samples of each bucket a set has; buckets without any are left out."""
    held: Counter[Bucket] = Counter()
    for bucket, count in runs:
        held[buckets[bucket]] += count
    return +held


def shares_of(held: Sequence[Mapping[Bucket, int]], weights: Sequence[float]) -> dict[Bucket, dict[int, Fraction]]:
    """Return the share of training of what each set holds of each bucket, together 1.

    Args:
        held: of each set, its samples by bucket, 1 or more.
        weights: of each set; none for its size. What is written in decimal counts: 0.1 is a tenth.
    """
    sizes = [sum(of_set.values()) for of_set in held]
    wanted = [Fraction(str(weight)) for weight in weights or sizes]
    return {
        bucket: {
            number: wanted[number] / sum(wanted) * Fraction(of_set[bucket], sizes[number])
            for number, of_set in enumerate(held)
            if bucket in of_set
        }
        for bucket in sorted(set().union(*held))
    }


def counts_of(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Return the smallest whole numbers in proportion to some shares, or the nearest that sum to `MAX_SLOTS`."""
    common = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * common) for share in shares]
    counts = [number // math.gcd(*whole) for number in whole]
    if sum(counts) <= MAX_SLOTS:
        return tuple(counts)
    exact = [share * MAX_SLOTS / sum(shares) for share in shares]
    counts = [max(1, math.floor(slots)) for slots in exact]
    # The largest remainder gets a slot that is left; what a share too small for one slot got is the largest one's loss.
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: max(0, MAX_SLOTS - sum(counts))]:
        counts[i] += 1
    counts[counts.index(max(counts))] -= max(0, sum(counts) - MAX_SLOTS)
    return tuple(counts)


def _joined(parts: list[tuple[npt.NDArray[np.int64], Samples]], size: int) -> Samples:
    """Return one batch of `size` from some, each with its places in it."""
    columns = {
        field.name: _join([(places, getattr(samples, field.name)) for places, samples in parts], size)
        for field in dataclasses.fields(Samples)
    }
    return Samples(**columns)


def _join(parts: list[tuple[npt.NDArray[np.int64], Any]], size: int) -> Any:
    first = parts[0][1]
    if isinstance(first, Mapping):
        return {int(places[i]): what for places, of_part in parts for i, what in of_part.items()}
    if not isinstance(first, Tensor):
        found = dict(pair for places, of_part in parts for pair in zip(places.tolist(), of_part, strict=True))
        return tuple(found[i] for i in range(size))
    dtypes = {of_part.dtype for _, of_part in parts}
    # Sets may be stored as different floats; what is not is cast where the batch is made.
    joined = torch.empty((size, *first.shape[1:]), dtype=first.dtype if len(dtypes) == 1 else torch.float32)
    for places, of_part in parts:
        joined[torch.from_numpy(places)] = of_part.to(joined.dtype)
    return joined
