"""Which layouts fit, which of them is fastest, and why the others are not possible.

A layout is tensor and expert parallelism, ZeRO stage with or without overlap, and activation checkpointing. Each gets,
for each phase, the largest micro-batch that fits, since larger ones only save traffic, and the number of dispatch
chunks that is fastest. What a recipe or a topology refuses, it says itself.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ecdit_ds.config.deepspeed_json import load_deepspeed_config
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.validation import divisors_of, require_divides
from ecdit_ds.errors import ConfigError, EcditError
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.hardware import MOST_NODES, Cluster
from ecdit_ds.planner.memory import memory_of_rank
from ecdit_ds.planner.plan import phases_of, with_micro_batch
from ecdit_ds.planner.timing import step_time
from ecdit_ds.planner.zero import ZeroSettings, zero_settings

Mode = Literal["none", "block", "selective"]
ALL_RECOMPUTATIONS: tuple[tuple[Mode, int], ...] = (
    ("none", 1),
    ("selective", 2),
    ("selective", 1),
    ("block", 2),
    ("block", 1),
)
"""train.recompute and train.recompute_every; 2 means the blocks with experts."""
DISPATCH_CHUNKS = (1, 2, 4)
"""k of them hide (k - 1) / k of an exchange at most, and make matrices k times smaller."""
MOST_IMAGES = 10**12
"""A batch beyond any run, whose divisors are still found in no time."""
MAX_NODE_COUNTS = 12
"""How many larger machines are tried where nothing fits."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What is searched; a single value is fixed."""

    tp: tuple[int, ...]
    ep: tuple[int, ...]
    deepspeed_files: tuple[Path, ...]
    """One configuration for each ZeRO stage, or several, such as with overlap."""
    recompute: tuple[tuple[Mode, int], ...]
    dispatch_chunks: tuple[int, ...]
    """Without effect, and not tried, but where experts are exchanged."""
    micro_batch: int | None
    """None for the largest that fits."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that the recipe, the topology and DeepSpeed accept."""

    recipe: Recipe
    """With this layout in it, and the micro-batch of the first phase."""
    topology: Topology
    zero: ZeroSettings
    deepspeed_file: Path
    micro_batches: dict[str, int]
    """By phase."""
    needed_bytes: int
    seconds: float
    """Time of all the run's steps, with overlap; 0 where it does not fit."""

    @property
    def images_per_s(self) -> float:
        """Mean over the phases."""
        train = self.recipe.train
        return train.max_steps * train.global_batch_size / self.seconds

    @property
    def layout(self) -> str:
        """Name it in a line."""
        train = self.recipe.train
        every = f"/{train.recompute_every}" if train.recompute_every > 1 else ""
        micro = "+".join(str(size) for size in dict.fromkeys(self.micro_batches.values()))
        return (
            f"tp {self.topology.tp} x ep {self.topology.ep}, ZeRO-{self.zero.stage}, micro-batch {micro}, "
            f"recompute {train.recompute}{every}"
            + (", overlap" if self.zero.overlap_comm and self.zero.stage < 3 else "")
            + (f", {chunks} chunks" if (chunks := self.recipe.parallel.dispatch_chunks) > 1 else "")
        )


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    feasible: list[Candidate]
    """The fastest first."""
    too_large: list[Candidate]
    """At their smallest micro-batch, the nearest to fitting first."""
    refusals: Counter[str]
    """Why, and how many layouts."""


def all_choices(recipe: Recipe, machine: Cluster, deepspeed_files: tuple[Path, ...]) -> SearchSpace:
    """Return every layout worth a try: tensor parallelism within a node, experts over any divisor of their number."""
    experts = recipe.model.num_experts if recipe.model.is_sparse else 1
    is_cut = recipe.model.ffn == "expert_choice" and recipe.model.routing_pool != "batch"
    return SearchSpace(
        tp=divisors_of(machine.gpus_per_node),
        ep=divisors_of(experts),
        deepspeed_files=deepspeed_files,
        recompute=ALL_RECOMPUTATIONS,
        dispatch_chunks=DISPATCH_CHUNKS if is_cut else (1,),
        micro_batch=None,
    )


def search(recipe: Recipe, machine: Cluster, choices: SearchSpace) -> SearchResult:
    """Try every layout of `choices`."""
    feasible, too_large, refusals = list[Candidate](), list[Candidate](), Counter[str]()
    for chosen, topology, path in _layouts(recipe, machine, choices, refusals):
        try:
            candidate = _fastest(chosen, topology, path, machine, choices)
        except EcditError as error:
            refusals[str(error)] += 1
            continue
        (feasible if candidate.needed_bytes <= machine.usable_bytes else too_large).append(candidate)
    return SearchResult(
        feasible=sorted(feasible, key=lambda candidate: (candidate.seconds, candidate.needed_bytes)),
        too_large=sorted(too_large, key=lambda candidate: candidate.needed_bytes),
        refusals=refusals,
    )


def smallest_nodes(recipe: Recipe, machine: Cluster, choices: SearchSpace) -> int | None:
    """Return the smallest larger number of nodes on which a layout fits, or None among those that were tried."""
    strongest = replace(choices, recompute=choices.recompute[-1:])
    tried = 0
    for nodes in range(machine.nodes + 1, _most_nodes(recipe, machine, choices) + 1):
        if not _split_sizes(recipe, machine, nodes, choices):
            continue
        if search(recipe, machine.with_nodes(nodes), strongest).feasible:
            return nodes
        tried += 1
        if tried == MAX_NODE_COUNTS:
            return None
    return None


def working_nodes(recipe: Recipe, machine: Cluster, choices: SearchSpace) -> list[int]:
    """Return the nearest numbers of nodes, fewer and more, over which the batch splits as the recipe wants it."""
    above = range(machine.nodes + 1, _most_nodes(recipe, machine, choices) + 1)
    nearest = (
        next((nodes for nodes in each if _split_sizes(recipe, machine, nodes, choices)), None)
        for each in (range(machine.nodes - 1, 0, -1), above)
    )
    return [nodes for nodes in nearest if nodes is not None]


def check_before_search(recipe: Recipe, machine: Cluster, choices: SearchSpace) -> None:
    """Refuse what no layout can mend: a batch that no ranks share, experts, a DeepSpeed file given alone.

    Raises:
        ConfigError: with the numbers, and the nearest numbers of nodes that work.
    """
    train = recipe.train
    if train.global_batch_size > MOST_IMAGES:
        raise ConfigError(f"train.global_batch_size: {train.global_batch_size} is more than {MOST_IMAGES} images")
    within = [tp for tp in choices.tp if tp <= machine.gpus_per_node]
    ranks = {tp: machine.world_size // tp for tp in within if machine.world_size % tp == 0}
    sizes = _split_sizes(recipe, machine, machine.nodes, choices)
    if ranks and not sizes:
        splitting = [tp for tp, dp in ranks.items() if train.global_batch_size % dp == 0]
        nodes = working_nodes(recipe, machine, choices)
        way_out = f"the batch splits over {' or '.join(map(str, nodes))} nodes" if nodes else ""
        if splitting:
            reason = _refusal(recipe, ranks[splitting[0]], choices.micro_batch)
            raise ConfigError("; ".join(filter(None, (reason, way_out))))
        split = ", ".join(f"{dp} (tp {tp})" for tp, dp in ranks.items())
        ways = [way for way in (way_out, _other_batches(recipe, machine, choices)) if way]
        raise ConfigError(
            f"--nodes {machine.nodes}: train.global_batch_size({train.global_batch_size}) is no multiple of the "
            f"data-parallel ranks of {machine.world_size} GPUs, which are {split}; "
            f"{', and '.join(ways) or 'change the batch'}"
        )
    if len(choices.deepspeed_files) == 1 and sizes:
        _check_file(recipe, choices.deepspeed_files[0], sizes)


def _other_batches(recipe: Recipe, machine: Cluster, choices: SearchSpace) -> str:
    """Return the nearest batches, smaller and larger, that split over the machine as it is, in words."""
    batch, group = recipe.train.global_batch_size, recipe.model.routing_group
    units = {machine.world_size // tp * group for tp in choices.tp if machine.world_size % tp == 0}
    near = sorted({count * unit for unit in units for count in (batch // unit, batch // unit + 1)} - {0})

    def splits(size: int) -> bool:
        other = replace(recipe, train=replace(recipe.train, global_batch_size=size))
        return bool(_split_sizes(other, machine, machine.nodes, choices))

    below = [size for size in near if size < batch and splits(size)][-1:]
    above = [size for size in near if size > batch and splits(size)][:1]
    return f"a batch of {' or '.join(map(str, below + above))} splits over these" if below + above else ""


def _check_file(recipe: Recipe, path: Path, sizes: dict[int, int]) -> None:
    refusals = list[ConfigError]()
    for dp, size in sizes.items():
        try:
            load_deepspeed_config(path, with_micro_batch(recipe, size), dp)
        except ConfigError as error:
            refusals.append(error)
    if len(refusals) == len(sizes):
        raise refusals[0]


def require_experts_divide(recipe: Recipe, dp: int, ep: int) -> None:
    """Refuse expert parallelism that the ranks cannot be cut into, naming what divides them and the experts.

    Raises:
        ConfigError: `ep` does not divide `dp`.
    """
    if dp % ep:
        experts = recipe.model.num_experts if recipe.model.is_sparse else 1
        both = divisors_of(math.gcd(dp, experts))
        raise ConfigError(
            f"parallel.ep({ep}) does not divide the {dp} data-parallel ranks; choose ep from "
            f"{', '.join(map(str, both))}, which divide both them and model.num_experts({experts})"
        )


def _layouts(
    recipe: Recipe, machine: Cluster, choices: SearchSpace, refusals: Counter[str]
) -> Iterator[tuple[Recipe, Topology, Path]]:
    each = len(choices.deepspeed_files) * len(choices.recompute)
    for tp in choices.tp:
        for ep in choices.ep:
            try:
                if tp > machine.gpus_per_node:
                    raise ConfigError(
                        f"parallel.tp: {tp} is more than the {machine.gpus_per_node} GPUs of a node, and its sums "
                        "would cross the network in every layer; use fewer"
                    )
                if machine.world_size % tp == 0:
                    require_experts_divide(recipe, machine.world_size // tp, ep)
                topology = Topology(world_size=machine.world_size, tp=tp, ep=ep)
                chunks = choices.dispatch_chunks[0]
                placed = replace(
                    recipe,
                    train=replace(recipe.train, recompute="none", recompute_every=1),
                    parallel=replace(recipe.parallel, tp=tp, ep=ep, dispatch_chunks=chunks),
                )
            except EcditError as error:
                refusals[str(error)] += each
                continue
            for mode, every in choices.recompute:
                try:
                    train = replace(placed.train, recompute=mode, recompute_every=every)
                    chosen = replace(placed, train=train)
                except EcditError as error:
                    refusals[str(error)] += len(choices.deepspeed_files)
                    continue
                yield from ((chosen, topology, path) for path in choices.deepspeed_files)


def _fastest(recipe: Recipe, topology: Topology, path: Path, machine: Cluster, choices: SearchSpace) -> Candidate:
    """Return the layout with the number of dispatch chunks that is fastest, the smallest of several.

    Raises:
        EcditError: as `_candidate`, for the first number.
    """
    best = _candidate(recipe, topology, path, machine, choices.micro_batch)  # with the first number, by `_layouts`
    if recipe.parallel.ep == 1 or not best.seconds:
        return best
    for chunks in choices.dispatch_chunks[1:]:
        with suppress(EcditError):  # a micro-batch that they do not divide
            other = _candidate(_in_chunks(recipe, chunks), topology, path, machine, choices.micro_batch)
            best = min(best, other, key=lambda candidate: candidate.seconds or math.inf)
    return best


def _in_chunks(recipe: Recipe, chunks: int) -> Recipe:
    return replace(recipe, parallel=replace(recipe.parallel, dispatch_chunks=chunks))


def _candidate(recipe: Recipe, topology: Topology, path: Path, machine: Cluster, micro_batch: int | None) -> Candidate:
    """Return the layout with the largest micro-batches that fit, or else the smallest.

    Raises:
        ConfigError: the batch does not split, or DeepSpeed's file contradicts the recipe.
    """
    sizes = [micro_batch] if micro_batch else _micro_batches(recipe, topology)
    sized = with_micro_batch(recipe, sizes[0])
    sized.micro_batch_size(topology.dp)
    zero = zero_settings(load_deepspeed_config(path, sized, topology.dp))
    chosen, needed, seconds = dict[str, int](), 0, 0.0
    for name, _, ratio in phases_of(recipe):
        size, bytes_needed = _largest(recipe, topology, zero, ratio, sizes, machine.usable_bytes)
        chosen[name], needed = size, max(needed, bytes_needed)
    if needed <= machine.usable_bytes:
        for name, steps, ratio in phases_of(recipe):
            own = with_micro_batch(recipe, chosen[name])
            seconds += steps * step_time(own, topology, zero, machine, ratio).with_overlap
    first = next(iter(chosen.values()))
    return Candidate(
        recipe=with_micro_batch(recipe, first),
        topology=topology,
        zero=zero,
        deepspeed_file=path,
        micro_batches=chosen,
        needed_bytes=needed,
        seconds=seconds,
    )


def _largest(
    recipe: Recipe, topology: Topology, zero: ZeroSettings, ratio: float, sizes: list[int], limit: int
) -> tuple[int, int]:
    """Return the largest size that fits, or the smallest, and its bytes; memory grows with the micro-batch."""

    def needs(size: int) -> int:
        return _needed_bytes(with_micro_batch(_in_chunks(recipe, 1), size), topology, zero, ratio)

    low, low_bytes, high = 0, needs(sizes[0]), len(sizes)
    while high - low > 1 and low_bytes <= limit:
        middle = (low + high) // 2
        bytes_needed = needs(sizes[middle])
        if bytes_needed <= limit:
            low, low_bytes = middle, bytes_needed
        else:
            high = middle
    return sizes[low], low_bytes


@lru_cache(maxsize=1024)
def _needed_bytes(recipe: Recipe, topology: Topology, zero: ZeroSettings, ratio: float) -> int:
    """Return the memory of a rank, which any number of chunks needs alike."""
    return memory_of_rank(recipe, topology, zero, ratio).total


def _micro_batches(recipe: Recipe, topology: Topology) -> list[int]:
    """Return the micro-batches that the recipe accepts, ascending.

    Raises:
        ConfigError: there is none; what it says of the largest.
    """
    require_divides("data-parallel ranks", topology.dp, "train.global_batch_size", recipe.train.global_batch_size)
    share = recipe.train.global_batch_size // topology.dp
    sizes = [size for size in divisors_of(share) if _accepts(recipe, topology, size)]
    if not sizes:
        with_micro_batch(recipe, share).micro_batch_size(topology.dp)
    return sizes


def _accepts(recipe: Recipe, topology: Topology, size: int) -> bool:
    try:
        with_micro_batch(recipe, size).micro_batch_size(topology.dp)
    except ConfigError:
        return False
    return True


def _split_sizes(recipe: Recipe, machine: Cluster, nodes: int, choices: SearchSpace) -> dict[int, int]:
    """Return the data-parallel ranks among which `nodes` can split the batch, and the smallest micro-batch on each."""
    found, world = dict[int, int](), nodes * machine.gpus_per_node
    for tp in choices.tp:
        dp, rest = divmod(world, tp)
        if tp > machine.gpus_per_node or rest or recipe.train.global_batch_size % dp:
            continue
        topology = Topology(world_size=dp)
        sizes = [choices.micro_batch] if choices.micro_batch else divisors_of(recipe.train.global_batch_size // dp)
        smallest = next((size for size in sizes if _accepts(recipe, topology, size)), None)
        if smallest is not None:
            found[dp] = smallest
    return found


def _refusal(recipe: Recipe, dp: int, micro_batch: int | None) -> str:
    try:
        with_micro_batch(recipe, micro_batch or recipe.train.global_batch_size // dp).micro_batch_size(dp)
    except ConfigError as error:
        return str(error)
    return f"train.micro_batch_size: none is accepted on {dp} data-parallel ranks"


def _most_nodes(recipe: Recipe, machine: Cluster, choices: SearchSpace) -> int:
    return min(MOST_NODES, recipe.train.global_batch_size * max(choices.tp) // machine.gpus_per_node)
