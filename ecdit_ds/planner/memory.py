"""Device memory of one rank, and the size of a checkpoint."""

import math
from dataclasses import dataclass, fields

from ecdit_ds.config import Recipe
from ecdit_ds.parallel.cutting import cut_axes
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.parameters import Parameter, parameters
from ecdit_ds.planner.zero import ZeroSettings

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device of the fullest rank, by kind."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(getattr(self, kind.name) for kind in fields(self))


def memory_of_rank(recipe: Recipe, topology: Topology, zero: ZeroSettings, mask_ratio: float) -> Memory:
    """Return the bytes on one rank."""
    width = 2 if recipe.train.precision == "bf16" else _FP32
    local = {True: 0, False: 0}
    for parameter in parameters(recipe.model):
        local[parameter.is_expert] += local_size(parameter, topology)
    whole = local[True] + local[False]
    cut = math.ceil(local[True] / topology.edp) + math.ceil(local[False] / topology.dp)
    tokens = recipe.model.num_kept_tokens(mask_ratio) * recipe.micro_batch_size(topology.dp)
    on_device = 0 if zero.is_offloaded else cut
    return Memory(
        parameters=width * (cut if zero.stage == 3 else whole),
        gradients=width * (whole if zero.stage == 1 else cut),
        optimizer=3 * _FP32 * on_device,
        ema=_FP32 * on_device,
        activations=40 * tokens * recipe.model.hidden_size * width * recipe.model.num_layers,
        buffers=width * zero.reduce_bucket_size * (2 if zero.overlap_comm else 1),
    )


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the bytes of a checkpoint: for each parameter fp32 weight, average and the optimizer's two numbers.

    AdamW keeps means of gradients and of their squares, RMSProp of their squares and a momentum.
    """
    return 4 * _FP32 * sum(parameter.size for parameter in parameters(recipe.model))


def local_size(parameter: Parameter, topology: Topology) -> int:
    """Return how many of a parameter's numbers a rank's model has."""
    ways = {"tp": topology.tp, "ep": topology.ep}
    return parameter.size // math.prod(ways[way] for way in cut_axes(parameter.name))
