"""Randomness that belongs to a sample or to a parameter name, never to a rank.

Every draw is addressed by `(seed, *what it is for)`. Two ranks that hold the same sample, or the same
parameter, draw the same numbers, whatever the layout. Nothing here reads or moves a global generator.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import xxhash


def stable_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends only on the text of `parts`, equal on every machine and run."""
    text = "\x1f".join(str(part) for part in parts)
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def sample_rng(seed: int, sample_index: int, purpose: str) -> np.random.Generator:
    """Return the counter-based generator of one sample and one purpose.

    Args:
        seed: the run's seed.
        sample_index: position in the endless training stream (so each epoch draws anew), or in a fixed set.
        purpose: such as "noise"; different purposes never share numbers.
    """
    key = stable_seed(seed, purpose)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, sample_index]))


def sample_rngs(seed: int, sample_indices: Iterable[int], purpose: str) -> Iterator[np.random.Generator]:
    """Yield the generator of each sample, as `sample_rng` gives it, to be used before the next one is asked for.

    It is one generator whose state is set: making one takes several times as long, for entropy that nobody wants.
    """
    bits = np.random.Philox(key=stable_seed(seed, purpose), counter=[0, 0, 0, 0])
    generator, fresh = np.random.Generator(bits), bits.state
    for index in sample_indices:
        fresh["state"]["counter"][3] = index
        bits.state = fresh
        yield generator


def parameter_generator(seed: int, name: str, *index: int) -> torch.Generator:
    """Return the CPU generator of one parameter (and one expert of it), for initial weights."""
    return torch.Generator().manual_seed(stable_seed(seed, "parameter", name, *index))
