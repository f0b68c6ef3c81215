"""Where ZeRO keeps the fp32 weights that this rank updates: the one home of what each stage does differently.

All stages keep flat fp32 tensors, beside each of which the optimizer keeps its state. ZeRO-1 and 2 flatten a whole
group of parameters and cut it into equal parts; ZeRO-3 cuts each parameter into equal parts and flattens those. So in
all three a rank's piece of a parameter is a flat range of that parameter's local tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Range:
    """This rank's part of one parameter."""

    parameter: nn.Parameter
    partition: int
    """Index of the flat tensor it is in."""
    at: int
    """Where it begins there."""
    start: int
    """Where it begins in the row-major local tensor of the parameter."""
    length: int


class Partitions(Protocol):
    """The flat tensors of one ZeRO stage."""

    def flats(self) -> list[Tensor]:
        """Return the flat fp32 tensors; the optimizer's state is keyed by them."""
        ...

    def ranges(self) -> Iterator[Range]:
        """Yield what is in them."""
        ...

    def shown(self, here: Range) -> Tensor:
        """Return the numbers that the model computes with in that range."""
        ...

    def show(self) -> None:
        """Let the model compute with what the flat tensors hold now; collective."""
        ...


def check_partitions(partitions: Partitions) -> None:
    """Compare each range with its parameter, so that no checkpoint ever gives weights another's name.

    The stages keep this book inside DeepSpeed, and at least one of its settings gets it wrong in silence.

    Raises:
        RuntimeError: they differ; not what a user can mend.
    """
    flats = partitions.flats()
    for here in partitions.ranges():
        shown = partitions.shown(here)
        if not torch.equal(
            flats[here.partition].detach().narrow(0, here.at, here.length), shown.to(flats[here.partition])
        ):
            raise RuntimeError(
                f"a parameter of shape {tuple(here.parameter.shape)} is not at {here.at} of flat tensor "
                f"{here.partition}, where DeepSpeed says it is; nothing was trained"
            )


class GroupPartitions:
    """ZeRO-1 and 2."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def flats(self) -> list[Tensor]:
        flats: list[Tensor] = self._zero.single_partition_of_fp32_groups
        return flats

    def ranges(self) -> Iterator[Range]:
        for index, parameters in enumerate(self._zero.bit16_groups):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:  # else all of it is another rank's
                    here = mapping.get_hp_fragment_address()
                    start = mapping.lp_fragment_address.start
                    yield Range(parameter=parameter, partition=index, at=here.start, start=start, length=here.numel)

    def shown(self, here: Range) -> Tensor:
        return here.parameter.detach().flatten().narrow(0, here.start, here.length)

    def show(self) -> None:
        self._zero.update_lp_params()


class ParameterPartitions:
    """ZeRO-3. Every parameter is padded to equal parts, so the last ranks may hold padding."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def flats(self) -> list[Tensor]:
        flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        return flats

    def ranges(self) -> Iterator[Range]:
        for parameters in self._zero.fp16_groups:
            for parameter in parameters:
                index, at, part = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = dist.get_rank(parameter.ds_process_group) * part
                length = min(part, parameter.ds_numel - start)
                if length > 0:
                    yield Range(parameter=parameter, partition=index, at=at, start=start, length=length)

    def shown(self, here: Range) -> Tensor:
        return here.parameter.ds_tensor.detach().narrow(0, 0, here.length)  # type: ignore[attr-defined]

    def show(self) -> None:
        # As the optimizer's own step does: nothing may be gathered while it changes.
        self._zero._partition_all_parameters()
        for index in range(len(self.flats())):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
