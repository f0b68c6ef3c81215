"""Device memory of one rank, as DeepSpeed 0.19.8 spends it, and the size of a checkpoint.

A step has three moments at which memory may be fullest:

    backward             activations that are still needed, and gradients that are already there: at its beginning
                         all of the former, and of the latter only those of micro-batches before, if there are any;
                         recomputed blocks are fullest near its end
    backward's end       all gradients, and the bucket that the last ones travel in
    the optimizer step   gradients of one group once more, flat and in fp32, and what the optimizer computes with

`Memory.total` is the largest of the three.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.activations import live_activations, shapes_of
from ecdit_ds.planner.parameters import NUMBER_BYTES, parameters
from ecdit_ds.planner.zero import ZeroSettings
from ecdit_ds.planner.zero_groups import Group, local_groups, local_size, touched_numbers

_FP32 = 4
_FP64 = 8
_STATES = 2
"""Numbers that either optimizer remembers of each weight: two running means, or one and a momentum."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device of the fullest rank, by kind."""

    parameters: int
    """What the model computes with; under ZeRO-3 this rank's parts, and the small ones that are never cut."""
    gradients: int
    """At the end of backward."""
    optimizer: int
    """fp32 weights, also beside a model in fp32, and the optimizer's state."""
    ema: int
    activations: int
    """The most at one time, with the checkpointing that the recipe asks for."""
    buffers: int
    """Buckets of gradients in backward, and under ZeRO-3 the weights that are gathered."""
    backward: int = 0
    """The most that activations and gradients take together on the way through backward."""
    step: int = 0
    """What the optimizer step takes besides gradients, while activations and buckets are gone."""

    @property
    def total(self) -> int:
        """Bytes at the fullest of the three moments."""
        always = self.parameters + self.optimizer + self.ema
        return always + max(self.backward + self.buffers, self.gradients + self.buffers, self.gradients + self.step)


def memory_of_rank(
    recipe: Recipe, topology: Topology, zero: ZeroSettings, mask_ratio: float, rank: int | None = None
) -> Memory:
    """Return what `rank` needs while `mask_ratio` of the tokens is left out; None for the fullest rank."""
    live = live_activations(recipe, shapes_of(recipe, topology, mask_ratio, is_gpu=True))
    groups = local_groups(recipe, topology)
    kept = _kept_by_zero_3(recipe, groups, zero) if zero.stage == 3 else _kept(recipe, topology, groups, zero, rank)
    is_held = zero.stage == 3 or _accumulates(recipe, topology)
    there = [1.0] * len(live) if is_held else shares_after(recipe.model, topology)
    backward = fullest_in_backward(live, there, kept["gradients"])
    return Memory(activations=max(live), backward=backward, **kept)


def fullest_in_backward(activations: Sequence[int], shares: Sequence[float], gradients: int) -> int:
    """Return the most bytes of both, block by block: activations that live then, and the share of gradients."""
    return max(bytes_ + math.ceil(share * gradients) for bytes_, share in zip(activations, shares, strict=True))


@lru_cache(maxsize=256)
def shares_after(model: ModelConfig, topology: Topology) -> tuple[float, ...]:
    """Return the share of a rank's parameters that backward is through with: at each block, and at the final layer."""
    names = [f"blocks.{n}." for n in range(model.num_layers)] + [f"decoder.{n}." for n in range(model.decoder_layers)]
    places = {name: place for place, name in enumerate(names)}
    numbers = [0] * (len(names) + 1)
    for parameter in parameters(model):
        place = places.get(
            ".".join(parameter.name.split(".")[:2]) + ".", len(names) if "final" in parameter.name else 0
        )
        numbers[place] += local_size(parameter, topology.tp, topology.ep)
    after = list(itertools.accumulate(reversed(numbers), initial=0))[:-1]
    return tuple(count / sum(numbers) for count in reversed(after))


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the bytes of a checkpoint: for each parameter fp32 weight, average and the optimizer's two numbers.

    AdamW keeps means of gradients and of their squares, RMSProp of their squares and a momentum.
    """
    return (2 + _STATES) * _FP32 * sum(parameter.size for parameter in parameters(recipe.model))


def _kept(
    recipe: Recipe, topology: Topology, groups: list[Group], zero: ZeroSettings, rank: int | None
) -> dict[str, int]:
    """Return what ZeRO-1 and 2 keep, by kind.

    Parameters: the flat groups, with their padding, w bytes a number. Optimizer: of this rank's parts fp32 weights
    (a copy also where the model is fp32) and two states. EMA: one more.

    Gradients: ZeRO-1 holds them all until the end of backward. ZeRO-2 holds, of each parameter of which this rank has a
    piece, the gradient of the whole parameter. So a large parameter cut over many ranks is kept by each of them whole,
    and experts, whose groups are short, are hardly cut at all. With a second micro-batch they are there twice, for
    the new ones are collected before they are added.

    Buffers: a bucket (two with overlap_comm), and a flat copy of what is reduced: a bucket or one larger parameter.
    Offloaded, fp32 weights, states, average and gradients are in host memory, and one parameter's gradient travels.
    """
    w = NUMBER_BYTES[recipe.train.precision]
    whole = sum(group.part * group.ranks for group in groups)
    part, largest = sum(group.part for group in groups), max(max(group.sizes) for group in groups)
    touched = touched_numbers(groups, topology, rank)
    on_device = 0 if zero.is_offloaded else _FP32 * part
    numbers = whole if zero.stage == 1 else 0 if zero.is_offloaded else touched
    bucket = zero.reduce_bucket_size
    reduced = min(whole, max(bucket, largest))
    is_twice = zero.stage == 1 or _accumulates(recipe, topology)
    copies = (2 if zero.overlap_comm else 1) * bucket + reduced + (touched if is_twice and on_device else 0)
    step = 0 if zero.is_offloaded else _step_bytes(recipe, w, [group.part for group in groups], largest)
    return {
        "parameters": w * whole,
        "gradients": w * numbers,
        "optimizer": (1 + _STATES) * on_device,
        "ema": on_device,
        "buffers": w * (copies + (largest if zero.is_offloaded else 0)),
        "step": step,
    }


def _kept_by_zero_3(recipe: Recipe, groups: list[Group], zero: ZeroSettings) -> dict[str, int]:
    """Return what ZeRO-3 keeps, by kind.

    Each parameter is cut, padded to equal parts: w bytes a number; those below the persistence threshold stay whole
    as well. fp32 weights are a copy, though where the model is fp32 DeepSpeed means to do without. Gradients: a flat
    tensor of all parts, always.
    Buffers: the bucket and what is scattered from it, and gathered weights: as many as may live, or the largest.
    """
    w = NUMBER_BYTES[recipe.train.precision]
    parts = [[math.ceil(size / group.ranks) for size in group.sizes] for group in groups]
    part = sum(map(sum, parts))
    sizes = [size for group in groups for size in group.sizes]
    persistent = sum(size for size in sizes if zero.is_persistent(size))
    gathered = min(sum(sizes) - persistent, max(zero.max_live_parameters, max(sizes)))
    on_device = 0 if zero.is_offloaded else _FP32 * part
    updated_at_once = [min(sum(piece), zero.sub_group_size + max(piece)) for piece in parts]
    reduced = min(sum(sizes), max(zero.reduce_bucket_size, max(sizes)))
    step = 0 if zero.is_offloaded else _step_bytes(recipe, w, updated_at_once, max(map(max, parts)))
    return {
        "parameters": w * (part + persistent),
        "gradients": 0 if zero.is_offloaded else w * part,
        "optimizer": (1 + _STATES) * on_device,
        "ema": on_device,
        "buffers": w * (zero.reduce_bucket_size + reduced + gathered),
        "step": step,
    }


def _step_bytes(recipe: Recipe, width: int, updated_at_once: list[int], largest: int) -> int:
    """Return the transients of the optimizer step.

    First each gradient's norm is taken in fp64. Then, group by group, gradients are made flat (w bytes a number), and
    fp32 of that; fused AdamW works in place, RMSProp makes roots of the squares, and with weight decay new gradients.
    """
    is_decayed = recipe.optimizer.weight_decay > 0
    extra = (1 + is_decayed) if recipe.optimizer.name == "rmsprop" else 0
    flat = width if width < _FP32 else 0
    a_number = max(flat + _FP32, _FP32 * (1 + extra))
    return max(_FP64 * largest, a_number * max(updated_at_once))


def _accumulates(recipe: Recipe, topology: Topology) -> bool:
    return recipe.train.global_batch_size > recipe.micro_batch_size(topology.dp) * topology.dp
