"""The moving average of the weights against closed forms."""

import math

import pytest
import torch

from ecdit_ds.training.ema import ShardedEMA


def after(num_updates: int, *, decay: float, start: float, weight_of_step: list[float]) -> float:
    """Return the average of one weight that is `start` first and `weight_of_step[n]` after step n."""
    weight = torch.full((3,), start, dtype=torch.float64)
    ema = ShardedEMA([weight], decay)
    for step in range(num_updates):
        weight.fill_(weight_of_step[step])
        ema.update([weight])
    return float(ema.averages[0][0])


@pytest.mark.parametrize("num_updates", [1, 2, 7, 40])
def test_a_young_average_forgets_its_start_by_the_warm_up(num_updates: int) -> None:
    # The start's share is the product of (1 + n) / (10 + n), which telescopes to 9! n! / (n + 9)!.
    share = math.factorial(9) * math.factorial(num_updates) / math.factorial(num_updates + 9)
    found = after(num_updates, decay=1.0, start=1.0, weight_of_step=[0.0] * num_updates)
    assert found == pytest.approx(share, rel=1e-12)


def test_an_old_average_decays_at_the_given_rate() -> None:
    # (1 + n) / (10 + n) exceeds 0.5 from n = 8 on; n = 0..7 leave 9! 8! / 17! of the start.
    warm = math.factorial(9) * math.factorial(8) / math.factorial(17)
    for num_updates in (8, 9, 12):
        found = after(num_updates, decay=0.5, start=1.0, weight_of_step=[0.0] * num_updates)
        assert found == pytest.approx(warm * 0.5 ** (num_updates - 8), rel=1e-12)


def test_a_constant_weight_is_its_own_average() -> None:
    assert after(20, decay=0.9, start=0.7, weight_of_step=[0.7] * 20) == pytest.approx(0.7, rel=1e-15)


def test_the_average_of_a_weight_that_grows_evenly_trails_it_by_a_constant() -> None:
    # With decay d the lag of a ramp settles at d / (1 - d) steps.
    steps = [float(n) for n in range(1, 401)]
    assert after(400, decay=0.9, start=0.0, weight_of_step=steps) == pytest.approx(400 - 0.9 / 0.1, rel=1e-9)


def test_without_decay_the_average_is_the_newest_weight() -> None:
    assert after(3, decay=0.0, start=5.0, weight_of_step=[1.0, 2.0, 3.0]) == 3.0


def test_updates_are_counted_and_a_later_life_counts_on() -> None:
    young, resumed = (ShardedEMA([torch.ones(2)], 0.999) for _ in range(2))
    assert young.num_updates == 0
    resumed.num_updates = 90
    for ema in (young, resumed):
        ema.update([torch.zeros(2)])
    assert (young.num_updates, resumed.num_updates) == (1, 91)
    assert young.averages[0].tolist() == pytest.approx([0.1, 0.1])
    assert resumed.averages[0].tolist() == pytest.approx([0.91, 0.91])


def test_the_average_shares_no_memory_with_the_weights_and_takes_no_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)
    ema = ShardedEMA([weight], 0.9)
    with torch.no_grad():
        weight.fill_(3.0)
    assert ema.averages[0].tolist() == [1.0, 1.0]
    ema.update([weight])
    assert not ema.averages[0].requires_grad
    assert weight.tolist() == [3.0, 3.0]


def test_every_partition_has_its_own_average() -> None:
    weights = [torch.ones(2), torch.full((3,), 2.0)]
    ema = ShardedEMA(weights, 0.999)
    ema.update([torch.zeros(2), torch.full((3,), 12.0)])
    assert [average.tolist() for average in ema.averages] == [pytest.approx([0.1] * 2), pytest.approx([11.0] * 3)]
