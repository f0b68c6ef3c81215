"""The order of training: which sample stands at a position of the endless stream, as a pure function.

Position n lies in epoch n // num_samples. Each epoch is its own permutation of the whole set, evaluated where it is
asked for and never stored: a Feistel network (a keyed bijection of a power of four) walked until it lands in the set
(Black & Rogaway 2002, cycle walking). So a loader's whole state is one integer, under any layout.
"""

import numpy as np
import numpy.typing as npt

from ecdit_ds.seeding import stable_seed

_ROUNDS = 6
"""Four make a Feistel network look random from outside (Luby & Rackoff 1988); two more for tiny sets."""


def sample_order(positions: npt.NDArray[np.int64], num_samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the sample at each position of the endless training stream.

    Args:
        positions: int64 of any shape, 0 or more; they may span epochs.
        num_samples: size of the set, 1 or more.
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
        samples[is_here] = _permute(within_epoch[is_here], num_samples, seed, int(epoch))
    return samples


def _permute(values: npt.NDArray[np.int64], num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    keys = np.array([stable_seed(seed, "sample order", epoch, i) for i in range(_ROUNDS)], dtype=np.uint64)
    walked = _feistel(values.astype(np.uint64), half_bits, keys)
    # The network's domain is less than four times the set (four, for one sample), so few steps remain to walk.
    while (is_outside := walked >= num_samples).any():
        walked[is_outside] = _feistel(walked[is_outside], half_bits, keys)
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
