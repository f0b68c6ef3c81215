"""The data file of machines, and the names it goes by."""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from ecdit_ds.planner.hardware import (
    Assumptions,
    Cluster,
    bf16_peak_of,
    default_assumptions,
    find_gpu,
    gpu_names,
    reasons,
)


def test_every_gpu_of_the_issue_is_there_with_a_source_and_plausible_numbers() -> None:
    assert gpu_names() == ["a100-40gb", "a100-80gb", "b200-192gb", "h100-80gb", "h200-141gb", "mi300x-192gb"]
    for gpu in map(find_gpu, gpu_names()):
        assert "data sheet" in gpu.source
        assert 0.9 < gpu.memory_bytes / (gpu.memory_gb * 1e9) < 1.1  # as sold and as seen are near one another
        assert gpu.network_bytes_per_s < gpu.link_bytes_per_s < gpu.hbm_bytes_per_s
        assert gpu.fp32_flops_per_s < gpu.bf16_flops_per_s


@pytest.mark.parametrize(
    ("device_name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_a_device_has_the_dense_peak_of_its_data_sheet(device_name: str, peak: float | None) -> None:
    assert bf16_peak_of(device_name) == peak


def test_an_unknown_gpu_is_refused_with_its_nearest_names(refusal_of: Callable[[Callable[[], object]], str]) -> None:
    message = refusal_of(lambda: find_gpu("H100"))
    assert message.startswith("--gpu H100: is not known; did you mean h100-80gb")
    assert "mi300x-192gb" in refusal_of(lambda: find_gpu("tpu-v5p"))


def test_each_assumption_has_a_reason_and_a_value_within_reach() -> None:
    assert set(reasons()) == {item.name for item in fields(Assumptions)}
    assert all(len(reason) > 40 for reason in reasons().values())


@pytest.mark.parametrize("value", [0.0, -0.5, 1.1, float("nan"), float("inf")])
def test_a_share_of_a_peak_that_cannot_be_is_refused(
    value: float, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    message = refusal_of(lambda: replace(default_assumptions(), matmul_efficiency=value))
    assert message == f"--matmul-efficiency: {value} is outside (0, 1]"


def test_usable_memory_is_a_share_of_what_the_driver_shows() -> None:
    half = replace(default_assumptions(), usable_memory=0.5)
    machine = Cluster(gpu=find_gpu("h100-80gb"), nodes=2, gpus_per_node=8, assumptions=half)
    assert machine.usable_bytes == pytest.approx(79.1 * 2**30 / 2)
    assert machine.world_size == 16
    assert machine.with_nodes(3).world_size == 24
