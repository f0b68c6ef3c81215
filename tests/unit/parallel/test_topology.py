"""Rank arithmetic agrees with its closed forms, with DeepSpeed and with megatron-core."""

from collections.abc import Callable
from typing import get_args

import pytest
from deepspeed.utils import groups as deepspeed_groups
from megatron.core.parallel_state import RankGenerator

from ecdit_ds.parallel.topology import Axis, Coordinates, Topology

RefusalOf = Callable[[Callable[[], object]], str]

WORLDS = range(1, 33)
MEGATRON_ORDER = "tp-cp-ep-dp-pp"


def layouts(world_size: int) -> list[Topology]:
    """Return every valid layout of a world."""
    return [
        Topology(world_size=world_size, tp=tp, ep=ep)
        for tp in range(1, world_size + 1)
        if world_size % tp == 0
        for ep in range(1, world_size // tp + 1)
        if (world_size // tp) % ep == 0
    ]


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_rank_is_its_coordinates_in_both_views(world_size: int) -> None:
    for topology in layouts(world_size):
        for rank in range(world_size):
            at = topology.coordinates(rank)
            assert rank == at.tp + topology.tp * at.dp
            assert at.dp == at.ep + topology.ep * at.edp
            assert all(0 <= getattr(at, axis) < getattr(topology, axis) for axis in get_args(Axis))


@pytest.mark.parametrize("axis", get_args(Axis))
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_groups_of_an_axis_hold_each_rank_once_in_order(world_size: int, axis: Axis) -> None:
    for topology in layouts(world_size):
        groups = topology.rank_lists(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))
        for group in groups:
            assert [getattr(topology.coordinates(rank), axis) for rank in group] == list(range(getattr(topology, axis)))


@pytest.mark.parametrize(("one", "other"), [("tp", "dp"), ("ep", "edp"), ("tp", "ep"), ("tp", "edp")])
@pytest.mark.parametrize("world_size", WORLDS)
def test_groups_of_two_different_axes_share_one_rank_at_most(world_size: int, one: Axis, other: Axis) -> None:
    for topology in layouts(world_size):
        for group in topology.rank_lists(one):
            assert all(len(set(group) & set(peers)) <= 1 for peers in topology.rank_lists(other))


def test_eight_ranks_with_tp_2_and_ep_2_stand_where_written_out_by_hand() -> None:
    topology = Topology(world_size=8, tp=2, ep=2)
    assert (topology.dp, topology.edp) == (4, 2)
    assert topology.coordinates(5) == Coordinates(tp=1, dp=2, ep=0, edp=1)
    assert topology.rank_lists("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.rank_lists("dp") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert sorted(topology.rank_lists("ep")) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert sorted(topology.rank_lists("edp")) == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("world_size", WORLDS)
def test_expert_groups_are_those_of_deepspeed(world_size: int) -> None:
    for topology in layouts(world_size):
        expert, expert_data = deepspeed_groups._get_expert_parallel_ranks(world_size, topology.tp, topology.ep)
        assert sorted(topology.rank_lists("ep")) == sorted(expert)
        assert sorted(topology.rank_lists("edp")) == sorted(expert_data)


@pytest.mark.parametrize("world_size", WORLDS)
def test_dense_and_expert_groups_are_those_of_megatron_core(world_size: int) -> None:
    for topology in layouts(world_size):
        dense = RankGenerator(tp=topology.tp, ep=1, dp=topology.dp, pp=1, cp=1, order=MEGATRON_ORDER)
        expert = RankGenerator(tp=topology.tp, ep=topology.ep, dp=topology.edp, pp=1, cp=1, order=MEGATRON_ORDER)
        assert sorted(topology.rank_lists("tp")) == sorted(dense.get_ranks("tp"))
        assert sorted(topology.rank_lists("dp")) == sorted(dense.get_ranks("dp"))
        assert sorted(topology.rank_lists("ep")) == sorted(expert.get_ranks("ep"))
        assert sorted(topology.rank_lists("edp")) == sorted(expert.get_ranks("dp"))


@pytest.mark.parametrize(
    ("world_size", "tp", "ep", "said"),
    [
        (6, 4, 1, ["parallel.tp(4)", "6 ranks", "1, 2, 3, 6"]),
        (3, 6, 1, ["parallel.tp(6)", "3 ranks", "1, 3"]),
        (8, 1, 3, ["parallel.ep(3)", "8 data-parallel ranks", "1, 2, 4, 8"]),
        (8, 2, 8, ["parallel.ep(8)", "4 data-parallel ranks", "world 8 / tp 2", "1, 2, 4"]),
        (8, 0, 1, ["parallel.tp(0)", "1, 2, 4, 8"]),
        (8, -2, 1, ["parallel.tp(-2)", "1, 2, 4, 8"]),
        (8, 1, 0, ["parallel.ep(0)", "1, 2, 4, 8"]),
        (8, 1, -2, ["parallel.ep(-2)", "1, 2, 4, 8"]),
        (0, 1, 1, ["0 ranks"]),
    ],
)
def test_degrees_that_do_not_factor_are_refused_with_those_that_do(
    world_size: int, tp: int, ep: int, said: list[str], refusal_of: RefusalOf
) -> None:
    message = refusal_of(lambda: Topology(world_size=world_size, tp=tp, ep=ep))
    assert all(part in message for part in said), message
