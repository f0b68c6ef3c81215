"""Bytes on the wire and on which link; what real steps call is in tests/parity/test_planned_communication.py."""

import random
from dataclasses import replace
from typing import Any

import pytest

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.parallel.topology import Axis, Topology
from ecdit_ds.planner.communication import (
    Collective,
    Placement,
    Traffic,
    by_link,
    exchange_bytes,
    group_placement,
    held_by_rank,
    tensor_parallel_bytes,
    traffic_of_step,
)
from ecdit_ds.planner.parameters import count_parameters
from ecdit_ds.planner.zero import ZeroSettings, zero_settings


def _zero(stage: int, **keys: Any) -> ZeroSettings:
    return zero_settings({"zero_optimization": {"stage": stage, **keys}})


def _recipe(recipe: Recipe, **train: Any) -> Recipe:
    parallel = {name: train.pop(name) for name in ("tp", "ep") if name in train}
    placed = replace(recipe, parallel=replace(recipe.parallel, **parallel))
    return replace(placed, train=replace(recipe.train, **train))


def _traffic(collective: Collective, payload: float = 1000.0, axis: Axis = "dp") -> Traffic:
    return Traffic(purpose="x", collective=collective, axis=axis, payload_bytes=payload)


def test_an_all_reduce_sends_twice_what_its_halves_send_and_one_rank_nothing() -> None:
    assert _traffic("all_reduce").sent_bytes(4) == 1500.0
    assert _traffic("reduce_scatter").sent_bytes(4) == _traffic("all_gather").sent_bytes(4) == 750.0
    assert _traffic("all_to_all").sent_bytes(1) == 0.0


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("tp", Placement(ranks=2, here=2)),
        ("ep", Placement(ranks=8, here=4)),  # two apart, so four of a node's eight
        ("dp", Placement(ranks=32, here=4)),
        ("edp", Placement(ranks=4, here=1)),  # sixteen apart: one on a node
    ],
)
def test_ranks_fill_one_node_after_another_tensor_parallel_ones_first(axis: Axis, expected: Placement) -> None:
    assert group_placement(Topology(world_size=64, tp=2, ep=8), axis, 8) == expected


def test_placement_by_arithmetic_is_that_of_counting_the_ranks_of_each_group() -> None:
    random.seed(3)
    for _ in range(200):
        tp, ep, edp, per_node = (random.choice((1, 2, 3, 4, 8)) for _ in range(4))
        topology = Topology(world_size=tp * ep * edp, tp=tp, ep=ep)
        axis: Axis = random.choice(("tp", "dp", "ep", "edp"))
        fewest = min(
            sum(other // per_node == rank // per_node for other in group)
            for group in topology.rank_lists(axis)
            for rank in group
        )
        assert group_placement(topology, axis, per_node).here == fewest


def test_an_all_to_all_crosses_the_network_for_peers_on_other_nodes() -> None:
    sent = by_link(_traffic("all_to_all"), Placement(ranks=8, here=2))
    assert (sent.link, sent.network) == (pytest.approx(125.0), pytest.approx(750.0))  # 1 peer here, 6 away


def test_a_ring_leaves_a_node_once_for_all_ranks_on_it() -> None:
    sent = by_link(_traffic("all_gather"), Placement(ranks=16, here=4))
    assert (sent.link, sent.network) == (pytest.approx(937.5 * 3 / 4), pytest.approx(937.5 / 4))
    inside = by_link(_traffic("all_reduce"), Placement(ranks=4, here=4))
    assert (inside.link, inside.network) == (1500.0, 0.0)


def test_tensor_parallel_sums_by_hand(tiny_recipe: Recipe) -> None:
    # 4 layers, 16 tokens, D 32, fp32, 2 images: 6 sums a layer; heads' norms 2 (8 + 16); experts in layers 1 and 3:
    # 4 x 8 gates of 2 images.
    sums, norms, gates = 4 * 6 * 2 * 16 * 32 * 4, 4 * 2 * 24 * 4, 2 * 2 * 32 * 4
    assert tensor_parallel_bytes(tiny_recipe, 2, 16) == sums + norms + gates
    again = _recipe(tiny_recipe, recompute="block")
    assert tensor_parallel_bytes(again, 2, 16) == sums * 3 // 2 + norms + gates


def test_exchanges_by_hand_and_that_selective_recomputation_repeats_none(tiny_recipe: Recipe) -> None:
    topology = Topology(world_size=4, ep=2)
    once = 2 * 4 * 8 * 32 * 4  # images, experts, places, D, bytes
    assert exchange_bytes(tiny_recipe, topology, 2, 16) == 2 * 4 * once
    block = _recipe(tiny_recipe, ep=2, recompute="block")
    selective = _recipe(tiny_recipe, ep=2, recompute="selective")
    assert exchange_bytes(block, topology, 2, 16) == 2 * 6 * once
    assert exchange_bytes(selective, topology, 2, 16) == 2 * 4 * once
    assert exchange_bytes(tiny_recipe, Topology(world_size=4), 2, 16) == 0


def test_a_mask_halves_what_travels_of_tokens_and_nothing_of_weights(tiny_recipe: Recipe) -> None:
    model = replace(tiny_recipe.model, decoder_layers=1)
    recipe = _recipe(replace(tiny_recipe, model=model), ep=2, mask_ratio=0.5)
    topology, zero = Topology(world_size=4, ep=2), _zero(2)
    half, whole = (
        {line.purpose: line.payload_bytes for line in traffic_of_step(recipe, topology, zero, ratio)}
        for ratio in (0.5, 0.0)
    )
    assert half.pop("token_exchanges") * 2 == whole.pop("token_exchanges")
    assert half == whole


@pytest.mark.parametrize(("stage", "times"), [(1, 1), (2, 2), (3, 2)])
def test_gradients_are_reduced_every_micro_batch_but_for_stage_1(tiny_recipe: Recipe, stage: int, times: int) -> None:
    recipe = _recipe(tiny_recipe, micro_batch_size=1)  # 8 images, 4 ranks: 2 micro-batches
    lines = traffic_of_step(recipe, Topology(world_size=4), _zero(stage), 0.0)
    gradients = [line for line in lines if line.purpose.endswith("gradients")]
    assert {line.collective for line in gradients} == {"reduce_scatter" if stage == 3 else "all_reduce"}
    total = count_parameters(recipe.model).dit * 4 * times
    assert sum(line.payload_bytes for line in gradients) == pytest.approx(total, rel=1e-3)


def test_zero_3_gathers_weights_twice_a_micro_batch_and_less_the_farther_reuse_reaches(tiny_recipe: Recipe) -> None:
    weights = []
    for reach in (1, 20_000, 40_000, 10**9):
        zero = _zero(3, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=reach)
        lines = traffic_of_step(tiny_recipe, Topology(world_size=4), zero, 0.0)
        weights.append(sum(line.payload_bytes for line in lines if line.purpose.endswith("weights")))
    assert weights == sorted(weights, reverse=True) and len(set(weights)) == 4
    total = count_parameters(tiny_recipe.model).dit * 4
    assert weights[0] == pytest.approx(2 * total, rel=1e-3)
    assert weights[-1] == pytest.approx(total, rel=1e-3)


def test_all_ranks_together_hold_each_expert_once(tiny_recipe: Recipe) -> None:
    whole = count_parameters(tiny_recipe.model).in_experts
    for tp, ep in ((1, 1), (2, 1), (1, 4), (2, 2)):
        held = held_by_rank(tiny_recipe.model, tp, ep)
        assert sum(one.size for one in held if one.is_expert) * tp * ep == whole
