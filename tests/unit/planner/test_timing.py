"""Step times against closed forms, and which way they move."""

from dataclasses import replace
from typing import Any

import pytest

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.flops import training_flops
from ecdit_ds.planner.hardware import Cluster, default_assumptions, find_gpu
from ecdit_ds.planner.timing import (
    StepTime,
    compute_seconds,
    elementwise_bytes,
    model_flops_utilization,
    partition_numbers,
    rank_flops,
    step_time,
)
from ecdit_ds.planner.zero import ZeroSettings, zero_settings


def _zero(stage: int, *, overlap: bool = False, offload: bool = False) -> ZeroSettings:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap}
    return zero_settings({"zero_optimization": zero | ({"offload_optimizer": {"device": "cpu"}} if offload else {})})


def _machine(**assumptions: float) -> Cluster:
    assumed = replace(default_assumptions(), **assumptions)
    return Cluster(gpu=find_gpu("h100-80gb"), nodes=2, gpus_per_node=8, assumptions=assumed)


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
    assert seconds == pytest.approx(mine * 48 / (3.35e12 * 0.7))
    away = compute_seconds(recipe, topology, _zero(2, offload=True), _machine(), 0.0)["optimizer"]
    assert away == pytest.approx(mine * (48 / 50e9 + 4 / 64e9))
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


CHUNKED = (
    "train.global_batch_size=256",
    "train.micro_batch_size=16",
    "parallel.ep=8",
    "parallel.dispatch_chunks=2",
)


def _exchanges(time: StepTime) -> float:
    return next(line.seconds for line in time.communication if line.traffic.purpose == "token_exchanges")


@pytest.mark.parametrize("efficiency", [0.02, 0.2, 0.5])
def test_exchanges_hide_behind_the_experts_of_their_pass_when_there_are_chunks(efficiency: float) -> None:
    time = _time(load_recipe("ecdit_xl_8e", CHUNKED), _zero(2), link_efficiency=efficiency)
    half, experts = _exchanges(time) / 2, time.compute["experts"]
    expected = min(half, experts / 3) / 2 + min(half, 2 * experts / 3) / 2
    assert time.hidden == {"token_exchanges": pytest.approx(expected)}


def test_recomputed_experts_hide_the_exchanges_that_are_repeated_and_no_others() -> None:
    none, selective, block = (
        _time(load_recipe("ecdit_xl_8e", [*CHUNKED, f"train.recompute={mode}"]), _zero(2), link_efficiency=0.005)
        for mode in ("none", "selective", "block")
    )
    experts = none.compute["experts"]
    assert selective.compute["experts"] == pytest.approx(experts * 4 / 3)
    assert none.hidden["token_exchanges"] == selective.hidden["token_exchanges"] == pytest.approx(experts / 2)
    assert block.hidden["token_exchanges"] == pytest.approx(experts * 4 / 3 / 2)


def test_gradients_do_not_hide_behind_experts_that_hide_exchanges() -> None:
    slow = {"link_efficiency": 0.005, "network_efficiency": 0.001}
    time = _time(load_recipe("ecdit_xl_8e", CHUNKED), _zero(2, overlap=True), **slow)
    passing = sum(time.compute.values()) - time.compute["optimizer"]
    in_backward = time.compute["experts"] / 3  # two thirds are computed there, half of which hide exchanges
    gradients = time.hidden["dense_gradients"] + time.hidden["expert_gradients"]
    assert gradients == pytest.approx(passing * 2 / 3 - in_backward)
    whole = _time(load_recipe("ecdit_xl_8e", CHUNKED), _zero(3, overlap=True), **slow)
    assert sum(whole.hidden.values()) == pytest.approx(passing)


def test_recomputed_seconds_are_backwards(recipe: Recipe) -> None:
    block = replace(recipe, train=replace(recipe.train, recompute="block"))
    first, again = (_time(one, _zero(2, overlap=True), network_efficiency=0.001) for one in (recipe, block))
    more = sum(again.compute.values()) - sum(first.compute.values())
    assert sum(again.hidden.values()) == pytest.approx(sum(first.hidden.values()) + more)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("network", [0.001, 0.02, 0.1, 0.7])
@pytest.mark.parametrize("link", [0.005, 0.1, 0.7])
def test_recomputing_is_never_faster(stage: int, network: float, link: float) -> None:
    def seconds(mode: str, every: int) -> StepTime:
        settings = [*CHUNKED, f"train.recompute={mode}", f"train.recompute_every={every}"]
        rates = {"network_efficiency": network, "link_efficiency": link}
        return _time(load_recipe("ecdit_xl_8e", settings), _zero(stage, overlap=True), **rates)

    none = seconds("none", 1)
    for mode, every in (("selective", 2), ("selective", 1), ("block", 2), ("block", 1)):
        again = seconds(mode, every)
        assert again.with_overlap >= none.with_overlap * (1 - 1e-12)
        if mode == "selective" and stage < 3:
            assert again.communication == none.communication


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_recomputing_is_no_faster_on_64_nodes(mask_ratio: float) -> None:
    machine, topology = _machine().with_nodes(64), Topology(world_size=512, tp=2, ep=64)
    settings = ["parallel.tp=2", "parallel.ep=64", "parallel.dispatch_chunks=2"]
    none, selective = (
        step_time(
            load_recipe("ecdit_m_64e", [*settings, "train.micro_batch_size=16", *more]),
            topology,
            _zero(2, overlap=True),
            machine,
            mask_ratio,
        ).with_overlap
        for more in ([], ["train.recompute=selective", "train.recompute_every=2"])
    )
    assert selective > none


def test_recomputing_every_block_is_nearly_one_more_forward(recipe: Recipe) -> None:
    block = replace(recipe, train=replace(recipe.train, recompute="block"))
    none, again = (_time(one, _zero(2)) for one in (recipe, block))
    first, second = (sum(one.compute.values()) - one.compute["optimizer"] for one in (none, again))
    assert 1.32 < second / first < 1.34
    assert again.without_overlap > none.without_overlap


def test_what_other_kernels_move_by_hand(recipe: Recipe) -> None:
    topology, tokens = Topology(world_size=16, ep=8), 8 * 256
    always = 27 * 1152 + 8 * (18 + 6) * 128 + 2 * 18 * 64
    dense = tokens * (always + 2 * 4608)
    experts = tokens * always + 2 * tokens * (2 * 4608 + 4 * 1152)
    assert 16 * dense + 14 * experts == 4_657_250_304
    assert elementwise_bytes(recipe, topology, 8, 256) == 3 * 2 * 4_657_250_304
    block = replace(recipe, train=replace(recipe.train, recompute="block"))
    assert elementwise_bytes(block, topology, 8, 256) == 4 * 2 * 4_657_250_304


def test_utilization_counts_model_flops_only(recipe: Recipe) -> None:
    flops = training_flops(recipe.model, 256, 8).total * 256
    assert model_flops_utilization(recipe, _machine(), 0.0, 8, 2.0) == pytest.approx(flops / (16 * 989e12 * 2))


def test_fp32_computes_at_the_fp32_peak(recipe: Recipe) -> None:
    fp32 = replace(recipe, train=replace(recipe.train, precision="fp32"))
    ratio = _time(fp32, _zero(2)).compute["attention"] / _time(recipe, _zero(2)).compute["attention"]
    assert ratio == pytest.approx(989 / 67)
