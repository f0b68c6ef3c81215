"""What part of a global tensor a parameter is.

Expert parallelism cuts the leading expert axis, tensor parallelism one axis of a matrix; everything else is whole on
every rank. Checkpoints and initialisation ask here, so that neither ever mentions a rank.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """One of `count` equal slices."""

    index: int = 0
    count: int = 1

    def of(self, size: int) -> int:
        """Return the slice's length along an axis of `size`."""
        return size // self.count


UNSHARDED = ShardIndex()


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """A parameter's place in its global tensor: `global_shape`, and the `offset` of this rank's box."""

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    is_tp_sharded: bool = False
    """Whether tensor-parallel ranks hold different slices; else each holds the same."""


def set_shard(parameter: nn.Parameter, *cuts: tuple[int, ShardIndex], is_tp_sharded: bool = False) -> None:
    """Mark `parameter` as a slice of its global tensor: for each cut, which axis and which share of it."""
    shape, offset = list(parameter.shape), [0] * parameter.dim()
    for axis, share in cuts:
        offset[axis] = share.index * shape[axis]
        shape[axis] *= share.count
    spec = ShardSpec(global_shape=tuple(shape), offset=tuple(offset), is_tp_sharded=is_tp_sharded)
    parameter.shard_spec = spec  # type: ignore[attr-defined]


def shard_of(parameter: nn.Parameter) -> ShardSpec:
    """Return the parameter's place; a parameter without a mark is whole."""
    whole = ShardSpec(global_shape=tuple(parameter.shape), offset=(0,) * parameter.dim())
    return getattr(parameter, "shard_spec", whole)
