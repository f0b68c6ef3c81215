"""What the DeepSpeed JSON says about memory and traffic, with DeepSpeed's defaults where it is silent."""

from dataclasses import dataclass
from typing import Any

_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "allgather_bucket_size": 5e8,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}
"""Defaults of DeepSpeed 0.19.8 (deepspeed/runtime/zero/config.py); a test compares them."""


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """Sizes in numbers, not bytes."""

    stage: int
    reduce_bucket_size: int
    """Gradients that are collected before they are reduced."""
    allgather_bucket_size: int
    """Weights that are collected at once after a step."""
    overlap_comm: bool
    """Whether gradients travel while backward goes on: two buckets take turns."""
    is_offloaded: bool
    """Whether fp32 weights and the optimizer's state are in host memory."""
    sub_group_size: int
    """ZeRO-3: weights that are updated at once."""
    prefetch_bucket_size: int
    """ZeRO-3: weights gathered ahead of their use."""
    param_persistence_threshold: int
    """ZeRO-3: parameters of at most so many are never cut."""
    max_live_parameters: int
    """ZeRO-3: weights that may be whole at one time."""
    max_reuse_distance: int
    """ZeRO-3: weights that are needed again within so many stay whole."""

    def is_persistent(self, size: int) -> bool:
        """Return whether ZeRO-3 keeps a parameter of that many numbers whole."""
        return size <= self.param_persistence_threshold


def zero_settings(deepspeed_config: dict[str, Any]) -> ZeroSettings:
    """Return the settings of a configuration as `load_deepspeed_config` returns it."""
    zero = deepspeed_config["zero_optimization"]
    sizes = {key: int(zero.get(key, default)) for key, default in _DEFAULTS.items()}
    return ZeroSettings(
        stage=zero["stage"],
        reduce_bucket_size=sizes["reduce_bucket_size"],
        allgather_bucket_size=sizes["allgather_bucket_size"],
        overlap_comm=zero.get("overlap_comm", zero["stage"] == 3),
        is_offloaded="offload_optimizer" in zero,
        sub_group_size=sizes["sub_group_size"],
        prefetch_bucket_size=sizes["stage3_prefetch_bucket_size"],
        param_persistence_threshold=sizes["stage3_param_persistence_threshold"],
        max_live_parameters=sizes["stage3_max_live_parameters"],
        max_reuse_distance=sizes["stage3_max_reuse_distance"],
    )
