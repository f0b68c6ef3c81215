"""Checkpoints, interruptions, and what share of the time is training.

With a stall of d seconds a checkpoint, a mean time between interruptions of M, and a checkpoint every T seconds of
training, a share d / T of the time goes into stalls, and each interruption costs half an interval, the time in which
the last checkpoint was not yet on disk, and the recovery. Both are smallest together where
d/dT (d / T + T / 2M) = 0: T = sqrt(2 d M) (Young 1974). Daly (2006) adds what a long stall changes:
T = sqrt(2 d M) (1 + sqrt(x) / 3 + x / 9) - d with x = d / 2M < 1, else M.
"""

import math
from dataclasses import dataclass

SECONDS_A_DAY = 86400.0
FAILURE_RATES = {"low": 4.0, "high": 24.0}
"""Interruptions a 1000 node-days. Low: Llama 3 405B, 419 unexpected ones on 2048 nodes in 54 days, 3.8 (arXiv
2407.21783 sec. 3.3.4). High: Meta's research clusters, a mean time to failure of 7.9 h at 1024 GPUs (128 nodes), 24
(arXiv 2410.21680); OPT-175B lies between (14, arXiv 2205.01068)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointCost:
    """One checkpoint of the whole run."""

    bytes: int
    save_seconds: float
    """Until all of it is on disk, at the storage's rate for all ranks together."""
    stall_seconds: float
    """In which training waits: the copy of a rank's part to host memory, or the whole save without async_save."""


@dataclass(frozen=True, kw_only=True)
class GoodputEstimate:
    """What a failure rate means for a run."""

    failures_per_1000_node_days: float
    mean_seconds_between: float
    interruptions: float
    """Expected in the whole run, its lost time included."""
    best_interval_seconds: float
    effective_share: float
    """Share of wall-clock time spent on steps that stay (ETTR), at the best interval."""
    effective_share_as_set: float
    """The same at the recipe's train.checkpoint_every."""


def checkpoint_cost(
    total_bytes: int, *, ranks: int, storage_bytes_per_s: float, pcie_bytes_per_s: float, is_async: bool
) -> CheckpointCost:
    """Return what one checkpoint costs; each rank copies an equal part, its own, over its own PCIe lanes."""
    save = total_bytes / storage_bytes_per_s
    stall = total_bytes / ranks / pcie_bytes_per_s
    return CheckpointCost(bytes=total_bytes, save_seconds=save, stall_seconds=stall if is_async else save)


def mean_seconds_between(failures_per_1000_node_days: float, nodes: int) -> float:
    """Return the mean time between interruptions of a job on `nodes`, each failing by itself at this rate."""
    return SECONDS_A_DAY * 1000 / (failures_per_1000_node_days * nodes)


def best_interval(stall_seconds: float, mean_seconds: float, save_seconds: float) -> float:
    """Return Daly's interval, but no shorter than a save takes: one must be on disk before the next begins."""
    if stall_seconds >= 2 * mean_seconds:  # x >= 1; a mean may be 0, where a rate is beyond what floats hold
        return max(mean_seconds, save_seconds)
    x = stall_seconds / (2 * mean_seconds)
    root = math.sqrt(2 * stall_seconds * mean_seconds)
    return max(root * (1 + math.sqrt(x) / 3 + x / 9) - stall_seconds, save_seconds)


def effective_share(interval: float, cost: CheckpointCost, mean_seconds: float, recovery_seconds: float) -> float:
    """Return the effective training time ratio, 0 where more is lost than is gained.

    In wall-clock time W there are W / M interruptions, each of which loses T / 2 of training, the save that was on its
    way, and the recovery; what is left, T of every T + d is training:
    ETTR = (1 - (T / 2 + save + recovery) / M) / (1 + d / T).
    """
    lost = interval / 2 + cost.save_seconds + recovery_seconds
    if lost >= mean_seconds:
        return 0.0
    return (1 - lost / mean_seconds) / (1 + cost.stall_seconds / interval)


def estimate_goodput(
    rate: float,
    *,
    nodes: int,
    training_seconds: float,
    set_interval: float,
    cost: CheckpointCost,
    recovery_seconds: float,
) -> GoodputEstimate:
    """Return what a failure rate means for a run of `training_seconds` of steps.

    Args:
        rate: interruptions per 1000 node-days.
        set_interval: seconds between checkpoints as the recipe has it.
    """
    mean = mean_seconds_between(rate, nodes)
    best = best_interval(cost.stall_seconds, mean, cost.save_seconds)
    share = effective_share(best, cost, mean, recovery_seconds)
    interruptions = training_seconds / share / mean if share else math.inf
    return GoodputEstimate(
        failures_per_1000_node_days=rate,
        mean_seconds_between=mean,
        interruptions=interruptions,
        best_interval_seconds=best,
        effective_share=share,
        effective_share_as_set=effective_share(max(set_interval, cost.save_seconds), cost, mean, recovery_seconds),
    )
