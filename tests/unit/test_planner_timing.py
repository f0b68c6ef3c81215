"""Step times against closed forms, and which way they move."""

from dataclasses import replace
from typing import Any

import pytest

from ecdit_ds.config import Recipe
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.flops import training_flops
from ecdit_ds.planner.hardware import Machine, default_assumptions, find_gpu
from ecdit_ds.planner.timing import (
    OPTIMIZER_BYTES,
    StepTime,
    compute_seconds,
    model_flops_utilization,
    partition_numbers,
    rank_flops,
    recomputed_share,
    step_time,
)
from ecdit_ds.planner.zero import ZeroSettings, zero_settings
from ecdit_ds.recipe_file import load_recipe


def _zero(stage: int, *, overlap: bool = False, offload: bool = False) -> ZeroSettings:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap}
    return zero_settings({"zero_optimization": zero | ({"offload_optimizer": {"device": "cpu"}} if offload else {})})


def _machine(**assumptions: float) -> Machine:
    assumed = replace(default_assumptions(), **assumptions)
    return Machine(gpu=find_gpu("h100-80gb"), nodes=2, gpus_per_node=8, assumptions=assumed)


@pytest.fixture
def recipe() -> Recipe:
    """Return a model large enough that products bound its products; 256 images a step."""
    return load_recipe("ecdit_xl_8e", ["train.global_batch_size=256", "train.micro_batch_size=8", "parallel.ep=8"])


def _time(recipe: Recipe, zero: ZeroSettings, **assumptions: float) -> StepTime:
    topology = Topology(world_size=16, tp=recipe.parallel.tp, ep=recipe.parallel.ep)
    return step_time(recipe, topology, zero, _machine(**assumptions), 0.0)


def test_products_take_their_flops_over_the_share_of_the_peak(recipe: Recipe) -> None:
    topology = Topology(world_size=16, ep=8)
    seconds = compute_seconds(recipe, topology, _zero(2), _machine(), 0.0)
    flops = training_flops(recipe.model, 256, recipe.model.pool_images(8))
    assert seconds["experts"] == pytest.approx(flops.experts * 16 / (989e12 * 0.6))
    assert seconds["attention"] == pytest.approx(flops.attention * 16 / (989e12 * 0.4))
    halved = compute_seconds(recipe, topology, _zero(2), _machine(matmul_efficiency=0.3), 0.0)
    assert halved["experts"] == pytest.approx(2 * seconds["experts"])
    assert halved["attention"] == seconds["attention"]


def test_few_rows_an_expert_wait_for_its_weights(recipe: Recipe) -> None:
    few = replace(recipe, train=replace(recipe.train, micro_batch_size=8), parallel=replace(recipe.parallel, ep=1))
    topology = Topology(world_size=16)
    fast = compute_seconds(few, topology, _zero(2), _machine(), 0.0)["experts"]
    slow = compute_seconds(few, topology, _zero(2), _machine(bandwidth_efficiency=0.01), 0.0)["experts"]
    weights = 3 * 2 * 14 * 8 * 2 * 1152 * 4608  # passes, bytes, layers, experts, matrices
    assert slow == pytest.approx(2 * weights / (3.35e12 * 0.01)) and slow > fast


def test_tensor_parallelism_halves_what_it_cuts_and_not_the_router(recipe: Recipe) -> None:
    one = rank_flops(recipe, Topology(world_size=16, ep=8), 0.0)
    two = rank_flops(recipe, Topology(world_size=16, tp=2, ep=8), 0.0)
    assert two.experts == pytest.approx(one.experts)  # twice the images, half of each
    assert two.router == pytest.approx(2 * one.router)


def test_the_update_moves_48_bytes_a_number_of_this_ranks_part(recipe: Recipe) -> None:
    topology = Topology(world_size=16, ep=8)
    mine = partition_numbers(recipe, topology)
    seconds = compute_seconds(recipe, topology, _zero(1), _machine(), 0.0)["optimizer"]
    assert seconds == pytest.approx(mine * OPTIMIZER_BYTES / (3.35e12 * 0.7))
    away = compute_seconds(recipe, topology, _zero(2, offload=True), _machine(), 0.0)["optimizer"]
    assert away == pytest.approx(mine * (OPTIMIZER_BYTES / 50e9 + 4 / 64e9))
    slower = compute_seconds(recipe, topology, _zero(2, offload=True), _machine(host_bytes_per_s=25e9), 0.0)[
        "optimizer"
    ]
    assert slower > away


@pytest.mark.parametrize("name", ["link_efficiency", "network_efficiency"])
def test_slower_links_make_longer_steps(recipe: Recipe, name: str) -> None:
    assert _time(recipe, _zero(2), **{name: 0.05}).without_overlap > _time(recipe, _zero(2)).without_overlap


def test_nothing_hides_unless_a_setting_lets_it(recipe: Recipe) -> None:
    time = _time(recipe, _zero(2))
    assert time.hidden == {} and time.with_overlap == time.without_overlap
    total = sum(time.compute.values()) + sum(line.seconds for line in time.communication)
    assert time.without_overlap == pytest.approx(total)


def test_gradients_hide_behind_backward_in_stage_1_behind_its_last_micro_batch_only(recipe: Recipe) -> None:
    first, second = (_time(recipe, _zero(stage, overlap=True), network_efficiency=0.001) for stage in (1, 2))
    passing = sum(seconds for part, seconds in second.compute.items() if part != "optimizer")
    assert sum(second.hidden.values()) == pytest.approx(passing * 2 / 3)
    assert sum(first.hidden.values()) == pytest.approx(passing * 2 / 3 / 2)  # 2 micro-batches
    assert set(second.hidden) == {"dense_gradients", "expert_gradients"}


def test_zero_3_hides_weights_as_well_and_never_more_than_there_is_to_compute(recipe: Recipe) -> None:
    time = _time(recipe, _zero(3, overlap=True), network_efficiency=0.001)
    passing = sum(seconds for part, seconds in time.compute.items() if part != "optimizer")
    assert {"dense_gradients", "dense_weights"} <= set(time.hidden)
    assert sum(time.hidden.values()) == pytest.approx(passing)
    assert all(seconds >= 0 for seconds in time.hidden.values())


def test_exchanges_hide_behind_experts_when_there_are_chunks(recipe: Recipe) -> None:
    chunked = load_recipe(
        "ecdit_xl_8e",
        ["train.global_batch_size=256", "train.micro_batch_size=16", "parallel.ep=8", "parallel.dispatch_chunks=2"],
    )
    time = _time(chunked, _zero(2))
    exchange = next(line.seconds for line in time.communication if line.traffic.purpose == "token_exchanges")
    assert time.hidden == {"token_exchanges": pytest.approx(min(exchange, time.compute["experts"]) / 2)}


def test_recomputing_every_block_is_nearly_one_more_forward(recipe: Recipe) -> None:
    block = replace(recipe, train=replace(recipe.train, recompute="block"))
    assert recomputed_share(recipe) == 0.0
    assert 0.98 < recomputed_share(block) < 1.0
    assert _time(block, _zero(2)).without_overlap > _time(recipe, _zero(2)).without_overlap


def test_utilization_counts_model_flops_only(recipe: Recipe) -> None:
    flops = training_flops(recipe.model, 256, 8).total * 256
    assert model_flops_utilization(recipe, _machine(), 0.0, 8, 2.0) == pytest.approx(flops / (16 * 989e12 * 2))


def test_fp32_computes_at_the_fp32_peak(recipe: Recipe) -> None:
    fp32 = replace(recipe, train=replace(recipe.train, precision="fp32"))
    ratio = _time(fp32, _zero(2)).compute["attention"] / _time(recipe, _zero(2)).compute["attention"]
    assert ratio == pytest.approx(989 / 67)
