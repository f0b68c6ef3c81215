"""Checkpoint costs, intervals and effective time against closed forms and a simulation."""

import math
import random

import pytest

from ecdit_ds.planner.reliability import (
    CheckpointCost,
    best_interval,
    checkpoint_cost,
    effective_share,
    estimate_goodput,
    mean_seconds_between,
)


def _cost(stall: float, save: float = 0.0) -> CheckpointCost:
    return CheckpointCost(bytes=0, save_seconds=save, stall_seconds=stall)


def test_nodes_fail_by_themselves_so_more_of_them_fail_sooner() -> None:
    assert mean_seconds_between(4.0, 64) == pytest.approx(3.90625 * 86400)  # 0.256 a day
    assert mean_seconds_between(24.0, 128) == pytest.approx(7.8125 * 3600)  # Meta's 7.9 h at 1024 GPUs


def test_the_reference_interval_of_a_10_s_stall_and_16_h_is_18_minutes() -> None:
    assert best_interval(10.0, 16 * 3600, 0.0) / 60 == pytest.approx(18, rel=0.02)


def test_no_other_interval_leaves_more_time() -> None:
    random.seed(1)
    for _ in range(50):
        stall, mean = random.uniform(0.1, 60), random.uniform(3600, 1e6)
        cost = _cost(stall)
        best = effective_share(best_interval(stall, mean, 0.0), cost, mean, 600)
        for factor in (0.5, 0.8, 1.25, 2.0):
            assert best >= effective_share(factor * best_interval(stall, mean, 0.0), cost, mean, 600) - 1e-4


def test_an_interval_is_no_shorter_than_a_save() -> None:
    assert best_interval(0.1, 3600, 500.0) == 500.0


def test_what_a_checkpoint_costs_by_hand() -> None:
    background, waiting = (
        checkpoint_cost(80 * 10**9, ranks=4, storage_bytes_per_s=1e9, pcie_bytes_per_s=10e9, is_async=is_async)
        for is_async in (True, False)
    )
    assert (background.save_seconds, background.stall_seconds) == (80.0, 2.0)
    assert waiting.stall_seconds == 80.0


def test_effective_time_agrees_with_a_run_that_is_interrupted_by_chance() -> None:
    random.seed(7)
    interval, stall, save, recovery, mean = 900.0, 20.0, 60.0, 600.0, 20_000.0
    wall = kept = 0.0
    until = random.expovariate(1 / mean)
    while wall < 4e7:
        cycle = interval + stall
        if until > cycle:
            wall, kept, until = wall + cycle, kept + interval, until - cycle
            continue
        # What was done since the last checkpoint is lost, and that one too if it was not yet on disk.
        kept -= interval if until < save else 0.0
        wall += until + recovery
        until = random.expovariate(1 / mean)
    predicted = effective_share(interval, _cost(stall, save), mean, recovery)
    assert kept / wall == pytest.approx(predicted, rel=0.01)


def test_a_run_that_loses_more_than_it_gains_has_no_effective_time_and_no_end() -> None:
    assert effective_share(100.0, _cost(1.0), 500.0, 600.0) == 0.0
    seen = estimate_goodput(
        1e6, nodes=10, training_seconds=1e5, set_interval=100, cost=_cost(1.0), recovery_seconds=600
    )
    assert seen.effective_share == 0.0 and math.isinf(seen.interruptions)


def test_more_failures_and_slower_recovery_leave_less() -> None:
    def share(rate: float, recovery: float) -> float:
        return estimate_goodput(
            rate, nodes=64, training_seconds=1e6, set_interval=1000, cost=_cost(5.0), recovery_seconds=recovery
        ).effective_share

    assert share(4, 600) > share(24, 600) > share(24, 3600)
    seen = estimate_goodput(
        24, nodes=64, training_seconds=1e6, set_interval=9000, cost=_cost(5.0), recovery_seconds=600
    )
    assert seen.effective_share_as_set < seen.effective_share
    assert seen.interruptions == pytest.approx(1e6 / seen.effective_share / 56250)


def test_checkpoints_come_no_faster_than_they_are_saved_whatever_the_recipe_says() -> None:
    cost = _cost(10.0, 500.0)
    seen = estimate_goodput(8.64, nodes=1000, training_seconds=1e6, set_interval=100, cost=cost, recovery_seconds=250)
    assert seen.mean_seconds_between == pytest.approx(10_000)
    assert seen.effective_share_as_set == pytest.approx(0.9 / 1.02)  # every 500 s: loses 250 + 500 + 250 of 10000


@pytest.mark.parametrize("rate", [1e300, 1e308, math.inf])
@pytest.mark.parametrize("cost", [_cost(5.0, 60.0), _cost(5.0), _cost(0.0)])
def test_a_rate_beyond_all_bounds_leaves_nothing_and_divides_by_nothing(rate: float, cost: CheckpointCost) -> None:
    seen = estimate_goodput(rate, nodes=64, training_seconds=1e6, set_interval=1000, cost=cost, recovery_seconds=600)
    assert seen.effective_share == seen.effective_share_as_set == 0.0 and math.isinf(seen.interruptions)
