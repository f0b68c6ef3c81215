"""The order of training: which sample stands at a position of the endless stream, as a pure function.

Position n lies in epoch n // num_samples. Each epoch is its own permutation of the whole set, evaluated where it is
asked for and never stored: a Feistel network (a keyed bijection of a power of four) walked until it lands in the set
(Black & Rogaway 2002, cycle walking). So a loader's whole state is one integer, under any layout.

Several streams become one in the same way: what is permuted then are the slots of a block, so many for each stream.
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
    positions: npt.NDArray[np.int64], counts: Sequence[int], seed: int, purpose: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which of several endless streams each position of their mixture belongs to, and its place there.

    Of each `sum(counts)` successive positions, a block, stream j gets exactly `counts[j]`, and every block has an order
    of its own. So positions and (stream, place) are in bijection, and each stream is read place after place, none left
    out, give or take a block.

    Args:
        positions: int64 of any shape, 0 or more.
        counts: of each stream, 1 or more; 2**40 together at most. One stream alone is its own mixture.
        seed: the run's seed.
        purpose: what is mixed; other purposes have other orders.

    Returns:
        Streams and places, int64 of the shape of `positions`.
    """
    total = sum(counts)
    assert min(counts) >= 1 and total <= MAX_SLOTS, counts
    assert positions.min(initial=0) >= 0, positions
    if len(counts) == 1:
        return np.zeros_like(positions), positions
    blocks, slots = np.divmod(positions.ravel(), total)
    # Blocks may be as short as two slots, so their keys are made all at once.
    keys = _mix(_keys(seed, purpose) ^ _mix(blocks.astype(np.uint64)))
    permuted = _permute(slots, total, keys)
    ends, sizes = np.cumsum(counts), np.array(counts, dtype=np.int64)
    streams = np.searchsorted(ends, permuted, side="right")
    places = blocks * sizes[streams] + permuted - (ends - sizes)[streams]
    return streams.reshape(positions.shape), places.reshape(positions.shape)


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
