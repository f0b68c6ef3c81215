"""What part of a global tensor a parameter is.

Expert parallelism cuts the leading expert axis; everything else is whole on every rank. Checkpoints and
initialisation ask here, so that neither ever mentions a rank.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """A parameter's place in its global tensor: `global_shape`, and the `offset` of this rank's box."""

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]


def set_shard(parameter: nn.Parameter, *, axis: int, index: int, count: int) -> None:
    """Mark `parameter` as slice `index` of `count` equal ones along `axis`."""
    shape, offset = list(parameter.shape), [0] * parameter.dim()
    offset[axis] = index * shape[axis]
    shape[axis] *= count
    parameter.shard_spec = ShardSpec(global_shape=tuple(shape), offset=tuple(offset))  # type: ignore[attr-defined]


def shard_of(parameter: nn.Parameter) -> ShardSpec:
    """Return the parameter's place; a parameter without a mark is whole."""
    whole = ShardSpec(global_shape=tuple(parameter.shape), offset=(0,) * parameter.dim())
    return getattr(parameter, "shard_spec", whole)
