"""Randomness belongs to a sample or a name: nothing that ran before, and no rank, can change it."""

import numpy as np
import pytest
import torch

from ecdit_ds.seeding import parameter_generator, sample_rng, sample_rngs, stable_seed


def test_seeds_are_the_same_on_every_machine() -> None:
    """Numbers frozen: a change here makes every earlier run irreproducible."""
    assert stable_seed() == 1622210670741801569
    assert stable_seed(0, "parameter", "blocks.0.w1", 3) == 8994858793820035905
    assert int(sample_rng(0, 7, "noise").integers(2**62)) == 2803610046101609127


def test_seeds_fit_torch_and_numpy() -> None:
    assert all(0 <= stable_seed("any", i) < 2**63 for i in range(10_000))


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a", "b"), ("b", "a")), (("ab",), ("a", "b")), ((1, 12), (11, 2)), (("a",), ("a", "")), ((0,), (1,))],
)
def test_different_addresses_have_different_seeds(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    assert stable_seed(*one) != stable_seed(*other)


def test_ten_thousand_parameters_have_ten_thousand_seeds() -> None:
    assert len({stable_seed(0, "parameter", f"blocks.{i // 100}.w", i % 100) for i in range(10_000)}) == 10_000


def test_a_sample_draws_the_same_whatever_was_drawn_before() -> None:
    alone = sample_rng(3, 5, "noise").standard_normal(8)
    sample_rng(3, 4, "noise").standard_normal(1000)
    np.random.default_rng().standard_normal(8)
    assert np.array_equal(sample_rng(3, 5, "noise").standard_normal(8), alone)


@pytest.mark.parametrize(
    ("seed", "sample_index", "purpose"),
    [(1, 0, "noise"), (0, 1, "noise"), (0, 2**40, "noise"), (0, 0, "timestep")],
)
def test_another_seed_sample_or_purpose_shares_no_number(seed: int, sample_index: int, purpose: str) -> None:
    base = sample_rng(0, 0, "noise").integers(2**62, size=10_000)
    other = sample_rng(seed, sample_index, purpose).integers(2**62, size=10_000)
    assert not set(base.tolist()) & set(other.tolist())


def test_neighbouring_samples_are_uncorrelated() -> None:
    draws = np.stack([sample_rng(0, i, "noise").standard_normal(4000) for i in range(20)])
    correlation = np.corrcoef(draws) - np.eye(20)
    # 190 pairs, each of standard error 1 / sqrt(4000): five of them bound the largest.
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


def test_first_draws_of_consecutive_samples_are_uniform() -> None:
    first = np.sort([sample_rng(0, i, "timestep").random() for i in range(4000)])
    distance = np.abs(first - (np.arange(4000) + 0.5) / 4000).max()
    assert distance < 1.95 / np.sqrt(4000)  # Kolmogorov-Smirnov at 0.1 %


def test_a_parameter_draws_by_its_seed_name_and_index() -> None:
    def numbers(seed: int, name: str, *index: int) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=parameter_generator(seed, name, *index)).tolist())

    addresses: list[tuple[int, str, tuple[int, ...]]] = [
        (0, "w1", ()),
        (1, "w1", ()),
        (0, "w2", ()),
        (0, "w1", (0,)),
        (0, "w1", (1,)),
        (0, "w1", (1, 0)),
    ]
    drawn = [numbers(seed, name, *index) for seed, name, index in addresses]
    assert drawn == [numbers(seed, name, *index) for seed, name, index in addresses]
    assert len(set(drawn)) == len(addresses)


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    torch.rand(4, generator=parameter_generator(0, "w"))
    sample_rng(0, 0, "noise").random()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


def test_generators_of_many_samples_are_those_of_each() -> None:
    indices = [7, 0, 2**40, 7]
    for index, rng in zip(indices, sample_rngs(3, indices, "noise"), strict=True):
        own = sample_rng(3, index, "noise")
        for _ in range(5):  # of several kinds: some numbers leave half a word for the next
            assert (
                rng.standard_normal(3, dtype=np.float32).tolist() == own.standard_normal(3, dtype=np.float32).tolist()
            )
            assert rng.integers(0, 7, dtype=np.int32) == own.integers(0, 7, dtype=np.int32)
            assert rng.random() == own.random()
            assert rng.permutation(5).tolist() == own.permutation(5).tolist()
