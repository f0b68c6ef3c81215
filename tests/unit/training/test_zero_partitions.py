"""A range that is not where it is said to be is found before anything is trained or saved."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.training import zero_partitions as partitions
from ecdit_ds.training.zero_partitions import ParameterPartitions, Range, check_partitions


class Flat:
    """Parameters in one flat tensor, as a ZeRO stage would keep them, and the order in which its book names them."""

    def __init__(self, order: tuple[int, ...]) -> None:
        parameters = [nn.Parameter(torch.full((2, 3), float(number))) for number in range(len(order))]
        self._flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self._order = [parameters[number] for number in order]

    def flats(self) -> list[Tensor]:
        return [self._flat]

    def ranges(self) -> Iterator[Range]:
        for index, parameter in enumerate(self._order):
            yield Range(parameter=parameter, partition=0, at=6 * index, start=0, length=6)

    def shown(self, here: Range) -> Tensor:
        return here.parameter.detach().flatten().narrow(0, here.start, here.length)

    def show(self) -> None:
        """Do nothing."""


def test_ranges_that_hold_their_parameters_pass() -> None:
    check_partitions(Flat((0, 1, 2)))


@pytest.mark.parametrize(("order", "at"), [((1, 0, 2), 0), ((0, 2, 1), 6)])
def test_ranges_of_other_parameters_are_found(order: tuple[int, ...], at: int) -> None:
    with pytest.raises(RuntimeError, match=rf"shape \(2, 3\) is not at {at} of flat tensor 0"):
        check_partitions(Flat(order))


@pytest.mark.parametrize(("rank", "ranges"), [(1, [(4, 4), (3, 3)]), (2, [(8, 1), (0, 3)]), (3, [(3, 3)])])
def test_under_zero_3_a_rank_counts_its_parts_among_those_that_hold_the_same_parameter(
    rank: int, ranges: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions.dist, "get_rank", lambda group=None: {"all": rank, "copies": rank % 2}.get(group, 7))
    dense: Any = SimpleNamespace(ds_process_group="all", ds_numel=9)
    expert: Any = SimpleNamespace(ds_process_group="copies", ds_numel=6)
    zero = SimpleNamespace(
        fp16_groups=[[dense], [expert]], get_param_id=id, grad_position={id(dense): (0, 0, 4), id(expert): (1, 0, 3)}
    )
    found = [(here.start, here.length) for here in ParameterPartitions(zero).ranges()]
    assert found == ranges
