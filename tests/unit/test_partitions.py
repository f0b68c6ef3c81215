"""A range that is not where it is said to be is found before anything is trained or saved."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.partitions import Range, check_partitions


class Flat:
    """Two parameters in one flat tensor, as a ZeRO stage would keep them; `swapped` names them the wrong way round."""

    def __init__(self, swapped: bool) -> None:
        first, second = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.ones(2, 3))
        self._flat = torch.cat([first.detach().flatten(), second.detach().flatten()])
        self._order = (second, first) if swapped else (first, second)

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
    check_partitions(Flat(swapped=False))


def test_ranges_of_other_parameters_are_found() -> None:
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) is not at 0 of flat tensor 0"):
        check_partitions(Flat(swapped=True))
