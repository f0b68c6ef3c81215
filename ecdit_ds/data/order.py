"""The order of training: which sample stands at a position of the endless stream, as a pure function.

Position n lies in epoch n // num_samples. Each epoch is its own permutation of the whole set, evaluated where it is
asked for and never stored: a Feistel network (a keyed bijection of a power of four) walked until it lands in the set
(Black & Rogaway 2002, cycle walking). So a loader's whole state is one integer, under any layout.

Several streams become one by dealing out the slots of a block, so many to each stream and evenly (Bresenham 1965), and
by permuting them within a window. Evenly, since then the place in a stream follows from the slot, and streams are read
from front to back; were a whole block permuted, a small set might be read twice before it is read once.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ecdit_ds.seeding import stable_seed

_ROUNDS = 6
"""Four make a Feistel network look random from outside (Luby & Rackoff 1988); two more for tiny sets."""
MAX_SLOTS = 1 << 40
"""Samples of a set, and slots of a block of a mixture, for which the order is proven."""


def sample_order(positions: npt.NDArray[np.int64], num_samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the sample at each position of the endless training stream.

    Args:
        positions: int64 of any shape, 0 or more; they may span epochs.
        num_samples: size of the set, 1 to 2**40.
        seed: the run's seed.

    Returns:
        int64 of the same shape in [0, num_samples); over a whole epoch each sample comes exactly once.
    """
    assert num_samples >= 1, num_samples
    assert positions.min(initial=0) >= 0, positions
    epochs, within_epoch = np.divmod(positions.astype(np.int64), num_samples)
    samples = np.empty_like(within_epoch)
    for epoch in np.unique(epochs):
        is_here = epochs == epoch
        samples[is_here] = _permute(within_epoch[is_here], num_samples, _keys(seed, "sample order", int(epoch)))
    return samples


def interleave(
    positions: npt.NDArray[np.int64], counts: Sequence[int], seed: int, purpose: str, window: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which of several endless streams each position of their mixture belongs to, and its place there.

    Of each `sum(counts)` successive positions, a block, stream j gets exactly `counts[j]`, evenly spread. Positions and
    (stream, place) are in bijection. All places of a stream in one window come before all in the next; within a window,
    every position is as likely to belong to a stream as any other.

    Args:
        positions: int64 of any shape, 0 or more.
        counts: of each stream, 1 or more; 2**40 together at most. One stream alone is its own mixture.
        seed: the run's seed.
        purpose: what is mixed; other purposes have other orders.
        window: within how many successive positions, from a multiple of it on, the order is left to chance.

    Returns:
        Streams and places, int64 of the shape of `positions`.
    """
    total = sum(counts)
    assert min(counts) >= 1 and total <= MAX_SLOTS, counts
    assert positions.min(initial=0) >= 0, positions
    if len(counts) == 1:
        return np.zeros_like(positions), positions
    blocks, slots = np.divmod(_shuffled(positions.ravel(), total, window, _keys(seed, purpose)), total)
    # Each block is dealt from a start of its own, lest a rare stream always come at the end of one.
    start_key = np.uint64(stable_seed(seed, purpose, "start"))
    starts = (_mix(start_key ^ _mix(blocks.astype(np.uint64))) % np.uint64(total)).astype(np.int64)
    streams, places = _deal((slots + starts) % total, starts, counts)
    places += blocks * np.array(counts, dtype=np.int64)[streams]
    return streams.reshape(positions.shape), places.reshape(positions.shape)


def _shuffled(
    positions: npt.NDArray[np.int64], block: int, window: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Permute positions within what lies in one window and in one block; each such piece has an order of its own."""
    firsts = np.maximum(positions // window * window, positions // block * block)
    ends = np.minimum(positions // window * window + window, positions // block * block + block)
    keys = _mix(keys ^ _mix(firsts.astype(np.uint64)))
    shuffled = np.empty_like(positions)
    for size in np.unique(ends - firsts):  # three in a window: its first and last piece, and whole blocks
        is_here = ends - firsts == size
        within = (positions - firsts)[is_here]
        shuffled[is_here] = firsts[is_here] + _permute(within, int(size), keys[:, is_here])
    return shuffled


def _deal(
    slots: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], counts: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the stream of each slot of a block, and how many of that stream's lie between the block's start and it.

    Blocks are circles of sum(counts) slots, each counted from a start of its own. The first stream takes its slots as
    evenly as it can, the second takes its own of those that are left, and so on.
    """
    streams, places = np.empty_like(slots), np.empty_like(slots)
    left, rest = np.arange(len(slots)), sum(counts)
    for stream, count in enumerate(counts):
        before, before_start = _share(slots, count, rest), _share(starts, count, rest)
        is_own = _share(slots + 1, count, rest) > before
        streams[left[is_own]] = stream
        places[left[is_own]] = (before - before_start)[is_own] % count
        slots, starts, left = (kept[~is_own] for kept in (slots - before, starts - before_start, left))
        rest -= count
    return streams, places


def _share(values: npt.NDArray[np.int64], count: int, of: int) -> npt.NDArray[np.int64]:
    """Return floor(values * count / of), exactly, for values up to `of`."""
    wide = values if of * count < 1 << 63 else values.astype(object)
    return (wide * count // of).astype(np.int64)


def replacement_order(
    positions: npt.NDArray[np.int64], attempt: int, num_samples: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return the sample that stands in at each position where `attempt - 1` others proved bad: any, by chance alone.

    Args:
        positions: int64 of any shape, 0 or more.
        attempt: 1 or more.
        num_samples: size of the set, 1 to 2**40.
        seed: the run's seed.

    Returns:
        int64 of the same shape in [0, num_samples).
    """
    assert attempt >= 1 and 1 <= num_samples <= MAX_SLOTS, (attempt, num_samples)
    first, second = _keys(seed, "replacement", attempt)[:2, 0]
    words = _mix(_mix(positions.astype(np.uint64) ^ first) ^ second)
    return (words % np.uint64(num_samples)).astype(np.int64)


def _keys(seed: int, *purpose: object) -> npt.NDArray[np.uint64]:
    """Return the key of each round, (_ROUNDS, 1)."""
    return np.array([[stable_seed(seed, *purpose, i)] for i in range(_ROUNDS)], dtype=np.uint64)


def _permute(values: npt.NDArray[np.int64], size: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return each value's image under a permutation of [0, size); keys are (_ROUNDS, 1), or a column for each value."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.broadcast_to(keys, (_ROUNDS, len(values)))
    walked = _feistel(values.astype(np.uint64), half_bits, keys)
    # The network's domain is less than four times the set (four, for one sample), so few steps remain to walk.
    while (is_outside := walked >= size).any():
        walked[is_outside] = _feistel(walked[is_outside], half_bits, keys[:, is_outside])
    return walked.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit words: the finalizer of SplitMix64 (Steele, Lea & Flood 2014), wrapping multiplications."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
