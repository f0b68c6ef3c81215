"""What one rank sends in an optimizer step, by collective and by link.

A collective's payload is the longer of its two tensors on one rank: what an all-reduce or an all-to-all is handed,
what a reduce-scatter is handed, what an all-gather returns. Of a payload V over n ranks a rank sends V (n-1)/n, since
its own n-th part need not travel; an all-reduce is a reduce-scatter and an all-gather, hence twice that. Tests compare
payloads with the calls of real runs. Left out, being bytes: losses, norms, the agreement to stop.

Suffixes and letters: B images of a micro-batch, N tokens a block sees, D hidden_size, E experts, C expert capacity.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.parallel.topology import Axis, Topology
from ecdit_ds.planner.flops import is_recomputed
from ecdit_ds.planner.parameters import NUMBER_BYTES, parameters
from ecdit_ds.planner.zero import ZeroSettings
from ecdit_ds.planner.zero_groups import local_size

Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
_GATE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All calls of one collective for one purpose in one optimizer step, on one rank."""

    purpose: str
    collective: Collective
    axis: Axis
    """Which ranks take part."""
    payload_bytes: float

    def sent_bytes(self, ranks: int) -> float:
        """Return what a rank sends where `ranks` take part."""
        return self.payload_bytes * (2 if self.collective == "all_reduce" else 1) * (ranks - 1) / ranks


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the ranks of a group are."""

    ranks: int
    here: int
    """Ranks of the group on one node, this one included; the fewest of any node."""


@dataclass(frozen=True, kw_only=True)
class LinkBytes:
    """What one rank sends, by link."""

    link: float
    """Within the node: NVLink or Infinity Fabric."""
    network: float


def group_placement(topology: Topology, axis: Axis, gpus_per_node: int) -> Placement:
    """Return where the groups of an axis are when ranks fill one node after another.

    Ranks of a group stand `stride` apart: 1 for tp, tp for ep and dp, tp * ep for edp. With strides and node sizes
    that divide one another all groups are alike; else the group with the fewest neighbours counts, which is slowest.
    """
    count = {"tp": topology.tp, "dp": topology.dp, "ep": topology.ep, "edp": topology.edp}[axis]
    stride = {"tp": 1, "dp": topology.tp, "ep": topology.tp, "edp": topology.tp * topology.ep}[axis]
    span = stride * count
    if gpus_per_node % span == 0:
        return Placement(ranks=count, here=count)
    if span % gpus_per_node == 0 and gpus_per_node % stride == 0:
        return Placement(ranks=count, here=gpus_per_node // stride)
    fewest = count
    for first in _first_ranks(topology.world_size, stride, span):
        on_node: dict[int, int] = {}
        for rank in range(first, first + span, stride):
            on_node[rank // gpus_per_node] = on_node.get(rank // gpus_per_node, 0) + 1
        fewest = min(fewest, *on_node.values())
    return Placement(ranks=count, here=fewest)


def _first_ranks(world_size: int, stride: int, span: int) -> Iterator[int]:
    for start in range(0, world_size, span):
        yield from range(start, start + stride)


def by_link(traffic: Traffic, placement: Placement) -> LinkBytes:
    """Return how a rank's bytes split over the links.

    An all-to-all sends each peer as much, so the network carries the share of peers on other nodes,
    (n - k) / (n - 1) with k ranks of n on a node. Reductions and gathers go around rings, as NCCL's do: a ring visits
    all k ranks of a node before it leaves, and k rings leave through different ranks, so of a rank's bytes 1 / k take
    the network; all stay inside where there is one node.
    """
    sent = traffic.sent_bytes(placement.ranks)
    if placement.here == placement.ranks:
        return LinkBytes(link=sent, network=0.0)
    if traffic.collective == "all_to_all":
        away = (placement.ranks - placement.here) / (placement.ranks - 1)
    else:
        away = 1 / placement.here
    return LinkBytes(link=sent * (1 - away), network=sent * away)


def traffic_of_step(recipe: Recipe, topology: Topology, zero: ZeroSettings, mask_ratio: float) -> list[Traffic]:
    """Return what one rank's collectives carry in an optimizer step, those with a single rank left out.

    Raises:
        ConfigError: the batch does not split over the ranks.
    """
    micro = recipe.micro_batch_size(topology.dp)
    count = recipe.train.global_batch_size // (micro * topology.dp)
    kept = recipe.model.num_kept_tokens(mask_ratio)
    found = [
        Traffic(
            purpose="tensor_parallel_sums",
            collective="all_reduce",
            axis="tp",
            payload_bytes=count * tensor_parallel_bytes(recipe, micro, kept),
        ),
        Traffic(
            purpose="token_exchanges",
            collective="all_to_all",
            axis="ep",
            payload_bytes=count * exchange_bytes(recipe, topology, micro, kept),
        ),
        *weight_traffic(recipe, topology, zero, count),
    ]
    sizes = {"tp": topology.tp, "dp": topology.dp, "ep": topology.ep, "edp": topology.edp}
    return [traffic for traffic in found if traffic.payload_bytes and sizes[traffic.axis] > 1]


def tensor_parallel_bytes(recipe: Recipe, micro_batch: int, kept_tokens: int) -> int:
    """Return what the tensor-parallel sums of a micro-batch's forward and backward carry.

    A block's forward sums B N D after self-attention, cross-attention and the feed-forward layer (once more for shared
    experts), and its backward as much where the same three begin. Experts' gates, fp32, enter beside their tokens:
    B / pool * E * C gradients more. Norms of heads have whole weights, whose gradients add up over the ranks:
    2 (head_dim + cross_head_dim). Activation checkpointing repeats the forward's.
    """
    model, width = recipe.model, NUMBER_BYTES[recipe.train.precision]
    total = 0
    for layer in range(model.num_layers + model.decoder_layers):
        tokens = kept_tokens if layer < model.num_layers else model.num_tokens
        has_experts = model.is_moe_layer(layer)
        sums = 3 + int(has_experts and model.num_shared_experts > 0)
        passes = 2 + int(is_recomputed(recipe, layer))
        total += passes * sums * micro_batch * tokens * model.hidden_size * width
        total += 2 * (model.head_dim + model.cross_head_dim) * width
        if has_experts:
            total += expert_rows(recipe, micro_batch, kept_tokens) * _GATE_BYTES
    return total


def exchange_bytes(recipe: Recipe, topology: Topology, micro_batch: int, kept_tokens: int) -> int:
    """Return what the all-to-alls of a micro-batch's forward and backward carry.

    Each layer of experts sends its rows of D numbers there and back, in forward and in backward: 4 times; `block`
    sends those of the layers it recomputes there and back again, `selective` has kept what came.
    """
    if topology.ep == 1:
        return 0
    model = recipe.model
    row_bytes = expert_rows(recipe, micro_batch, kept_tokens) * model.hidden_size * NUMBER_BYTES[recipe.train.precision]
    exchanges = 0
    for layer in range(model.num_layers):
        if model.is_moe_layer(layer):
            is_repeated = recipe.train.recompute == "block" and is_recomputed(recipe, layer)
            exchanges += 6 if is_repeated else 4
    return exchanges * row_bytes


def expert_rows(recipe: Recipe, micro_batch: int, kept_tokens: int) -> int:
    """Return the rows that all experts together take of a micro-batch: B / pool * E * C.

    The token-choice baseline has as many places, f * B * N / E an expert, whether they are all taken or not.
    """
    model = recipe.model
    pool = micro_batch if model.ffn == "token_choice" else model.pool_images(micro_batch)
    return micro_batch // pool * model.num_experts * model.expert_capacity(pool * kept_tokens)


def weight_traffic(recipe: Recipe, topology: Topology, zero: ZeroSettings, micro_batches: int) -> Iterator[Traffic]:
    """Yield how gradients are reduced and weights gathered, as DeepSpeed 0.19.8 does it.

    ZeRO-1 and 2 all-reduce whole gradients, although each rank keeps a part only (`use_multi_rank_bucket_allreduce`,
    stage_1_and_2.py): stage 1 once a step, stage 2 every micro-batch. After the step all ranks gather all weights.
    ZeRO-3 reduce-scatters gradients every micro-batch and gathers weights when they are missing. Experts do all this
    among their copies (edp), everything else among all data-parallel ranks.
    """
    width = NUMBER_BYTES[recipe.train.precision]
    held = held_by_rank(recipe.model, topology.tp, topology.ep)
    for name, axis, ranks, is_expert in (
        ("dense", "dp", topology.dp, False),
        ("expert", "edp", topology.edp, True),
    ):
        sizes = {one.name: one.size for one in held if one.is_expert == is_expert}
        if zero.stage == 3:
            sizes = {key: -(-size // ranks) * ranks for key, size in sizes.items()}  # padded to equal parts
            gathered = micro_batches * _gathered_again(recipe, zero, sizes) + sum(_persistent(zero, sizes).values())
        else:
            gathered = sum(sizes.values())
        reductions = 1 if zero.stage == 1 else micro_batches
        yield Traffic(
            purpose=f"{name}_gradients",
            collective="reduce_scatter" if zero.stage == 3 else "all_reduce",
            axis="dp" if axis == "dp" else "edp",
            payload_bytes=reductions * width * sum(sizes.values()),
        )
        yield Traffic(
            purpose=f"{name}_weights",
            collective="all_gather",
            axis="dp" if axis == "dp" else "edp",
            payload_bytes=width * gathered,
        )


@dataclass(frozen=True, kw_only=True)
class OwnedParameter:
    """A parameter, or the slice of it that one rank computes with."""

    name: str
    size: int
    """Numbers in it."""
    is_expert: bool


@lru_cache(maxsize=256)
def held_by_rank(config: ModelConfig, tp: int, ep: int) -> tuple[OwnedParameter, ...]:
    """Return what one rank computes with under tensor and expert parallelism."""
    return tuple(
        OwnedParameter(name=parameter.name, size=local_size(parameter, tp, ep), is_expert=parameter.is_expert)
        for parameter in parameters(config)
    )


def _persistent(zero: ZeroSettings, sizes: dict[str, int]) -> dict[str, int]:
    """Return the parameters that ZeRO-3 keeps whole: gathered once, after the step."""
    return {name: size for name, size in sizes.items() if zero.is_persistent(size)}


def _gathered_again(recipe: Recipe, zero: ZeroSettings, sizes: dict[str, int]) -> float:
    """Return how many weights ZeRO-3 gathers in one micro-batch.

    All that are cut, in forward and again in backward. But a weight stays whole when it is needed again within
    `max_reuse_distance` numbers: at the turn from forward to backward that spares the last R / 2, since the distance
    counts the way there and the way back (DeepSpeed spares up to a block more: prefetching keeps what it meets). A
    recomputed block, visited once more just before its backward, is spared this third gathering likewise, as far as
    half the distance reaches.
    """
    persistent = _persistent(zero, sizes)
    cut = {name: size for name, size in sizes.items() if name not in persistent}
    total, reach = sum(cut.values()), zero.max_reuse_distance / 2
    gathered = total + max(0.0, total - reach)
    blocks = dict[int, int]()
    for name, size in cut.items():
        kind, _, rest = name.partition(".")
        if kind in ("blocks", "decoder"):
            layer = int(rest.partition(".")[0]) + (recipe.model.num_layers if kind == "decoder" else 0)
            blocks[layer] = blocks.get(layer, 0) + size
    again = (max(0.0, size - reach) for layer, size in blocks.items() if is_recomputed(recipe, layer))
    return gathered + sum(again)
