"""How long a step takes, by a roofline for each part, and what of it hides behind something else.

A part that computes takes the longer of its FLOPs at the peak's reached share and its bytes at the memory's; a
collective the longer of its two links' times, which work at once. Without overlap all of it adds up. With overlap,
what the settings let run side by side is taken off:

    gradients   behind backward, where the DeepSpeed JSON sets overlap_comm: ZeRO-1 behind the last micro-batch's alone
    weights     ZeRO-3's gatherings behind what is left of forward and backward, where it sets overlap_comm
    exchanges   behind their own pass's experts, where parallel.dispatch_chunks k is 2 or more: at most (k - 1) / k of
                either; the experts' time that hides them hides no gradients or weights

Sums of tensor parallelism and ZeRO-1/2's gathering after the step hide behind nothing. Not counted: latency of small
messages, stragglers, waiting for data, evaluation.
"""

from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.communication import (
    LinkBytes,
    Traffic,
    by_link,
    exchange_bytes,
    expert_rows,
    group_placement,
    held_by_rank,
    traffic_of_step,
)
from ecdit_ds.planner.flops import Flops, is_recomputed, recomputed_flops, training_flops
from ecdit_ds.planner.hardware import Cluster
from ecdit_ds.planner.parameters import NUMBER_BYTES
from ecdit_ds.planner.zero import ZeroSettings

_CUT_BY_TP = ("attention", "cross_attention", "dense_ffn", "experts")
OPTIMIZER_BYTES = 48
"""Moved for each number that a rank updates: read and write fp32 weight (8), two numbers of state (16) and average
(8); widen the gradient (2 + 4), read it for the norm (4) and for the update (4); write the weight in bf16 (2)."""
_WEIGHT_PASSES = 3
"""Forward reads a matrix, backward reads it again and writes a gradient of its size."""


@dataclass(frozen=True, kw_only=True)
class CollectiveTime:
    """One line of a step's communication."""

    traffic: Traffic
    bytes: LinkBytes
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: dict[str, float]
    """By part; `elementwise` is norms, modulation, activations and residuals, `optimizer` the update."""
    communication: list[CollectiveTime]
    hidden: dict[str, float]
    """By purpose, what overlap takes off."""

    @property
    def without_overlap(self) -> float:
        return sum(self.compute.values()) + sum(line.seconds for line in self.communication)

    @property
    def with_overlap(self) -> float:
        return self.without_overlap - sum(self.hidden.values())


def step_time(recipe: Recipe, topology: Topology, zero: ZeroSettings, machine: Cluster, mask_ratio: float) -> StepTime:
    """Predict one optimizer step of the phase that leaves out a share of `mask_ratio`.

    Raises:
        ConfigError: the batch does not split over the ranks.
    """
    compute = compute_seconds(recipe, topology, zero, machine, mask_ratio)
    communication = []
    for traffic in traffic_of_step(recipe, topology, zero, mask_ratio):
        sent = by_link(traffic, group_placement(topology, traffic.axis, machine.gpus_per_node))
        seconds = max(sent.link / machine.link_bytes_per_s, sent.network / machine.network_bytes_per_s)
        communication.append(CollectiveTime(traffic=traffic, bytes=sent, seconds=seconds))
    once = compute_seconds(_computed_once(recipe), topology, zero, machine, mask_ratio)
    hidden = _hidden(recipe, topology, zero, compute, once, communication)
    return StepTime(compute=compute, communication=communication, hidden=hidden)


def model_flops_utilization(recipe: Recipe, machine: Cluster, mask_ratio: float, pool: int, seconds: float) -> float:
    """Return model FLOPs of a step, nothing computed again, over what all GPUs' bf16 peaks do in `seconds`."""
    flops = training_flops(recipe.model, recipe.model.num_kept_tokens(mask_ratio), pool).total
    return flops * recipe.train.global_batch_size / (machine.world_size * machine.gpu.bf16_flops_per_s * seconds)


def rank_flops(recipe: Recipe, topology: Topology, mask_ratio: float) -> Flops:
    """Return what one rank computes in a step, recomputation included.

    A rank has global batch / dp images. Tensor parallelism cuts attention and feed-forward layers; router, adaLN and
    the ends are computed by each of its ranks. Expert parallelism moves work and leaves its amount: every rank's
    experts take as many rows as its own tokens are taken.
    """
    model, kept = recipe.model, recipe.model.num_kept_tokens(mask_ratio)
    pool = model.pool_images(recipe.micro_batch_size(topology.dp))
    image = _image_flops(recipe, kept, pool)
    images = recipe.train.global_batch_size / topology.dp
    shares = {part.name: topology.tp if part.name in _CUT_BY_TP else 1 for part in fields(Flops)}
    return Flops(**{name: getattr(image, name) * images / share for name, share in shares.items()})


@lru_cache(maxsize=256)
def _image_flops(recipe: Recipe, kept_tokens: int, pool_images: int) -> Flops:
    training = training_flops(recipe.model, kept_tokens, pool_images)
    return training.plus(recomputed_flops(recipe, kept_tokens, pool_images))


def compute_seconds(
    recipe: Recipe, topology: Topology, zero: ZeroSettings, machine: Cluster, mask_ratio: float
) -> dict[str, float]:
    """Return the seconds of each part in a step."""
    gpu, reached = machine.gpu, machine.assumptions
    peak = gpu.bf16_flops_per_s if recipe.train.precision == "bf16" else gpu.fp32_flops_per_s
    memory_rate = gpu.hbm_bytes_per_s * reached.bandwidth_efficiency
    micro = recipe.micro_batch_size(topology.dp)
    count = recipe.train.global_batch_size // (micro * topology.dp)
    flops, weights = rank_flops(recipe, topology, mask_ratio), _weight_bytes(recipe, topology)
    seconds = {}
    for part in fields(Flops):
        is_attention = part.name in ("attention", "cross_attention")
        rate = peak * (reached.attention_efficiency if is_attention else reached.matmul_efficiency)
        read = count * weights.get(part.name, 0.0) / memory_rate
        seconds[part.name] = max(getattr(flops, part.name) / rate, read)
    kept = recipe.model.num_kept_tokens(mask_ratio)
    seconds["elementwise"] = count * elementwise_bytes(recipe, topology, micro, kept) / memory_rate
    seconds["optimizer"] = optimizer_seconds(recipe, topology, zero, machine)
    return seconds


def elementwise_bytes(recipe: Recipe, topology: Topology, micro_batch: int, kept_tokens: int) -> float:
    """Return what kernels other than products move in a micro-batch, each reading and writing its tensors once.

    In numbers a token, forward: three norms (2 D each), two modulations of two kernels each (4 D), two gated residuals
    (5 D) and a plain one (3 D) are 27 D; norms and rotary angles of queries and keys 8 a number, cross-attention's
    norms 2; the activation between the matrices 2 F, for experts f times as much, with 4 D more for each row that is
    gathered and summed. Backward moves twice as much, and what is recomputed once more.
    """
    model, tp = recipe.model, topology.tp
    heads = (
        8 * (model.num_heads + model.num_kv_heads) * model.head_dim + 2 * model.cross_num_heads * model.cross_head_dim
    )
    always = 27 * model.hidden_size + heads / tp
    inner = 2 * model.ffn_hidden_size * (1.5 if model.ffn_activation == "swiglu" else 1)
    total = 0.0
    for layer in range(model.num_layers + model.decoder_layers):
        tokens = micro_batch * (kept_tokens if layer < model.num_layers else model.num_tokens)
        if model.is_moe_layer(layer):
            rows = expert_rows(recipe, micro_batch, kept_tokens)
            numbers = tokens * (always + model.num_shared_experts * inner / tp)
            numbers += rows * (inner / tp + 4 * model.hidden_size)
        else:
            numbers = tokens * (always + inner / tp)
        total += numbers * (4 if is_recomputed(recipe, layer) else 3)
    return total * NUMBER_BYTES[recipe.train.precision]


def optimizer_seconds(recipe: Recipe, topology: Topology, zero: ZeroSettings, machine: Cluster) -> float:
    """Return the seconds of the update: OPTIMIZER_BYTES for each number of this rank's part.

    Offloaded, they move in host memory, and gradients and weights cross PCIe besides.
    """
    mine = partition_numbers(recipe, topology)
    if not zero.is_offloaded:
        return mine * OPTIMIZER_BYTES / (machine.gpu.hbm_bytes_per_s * machine.assumptions.bandwidth_efficiency)
    crossing = 2 * mine * NUMBER_BYTES[recipe.train.precision] / machine.gpu.pcie_bytes_per_s
    return mine * OPTIMIZER_BYTES / machine.assumptions.host_bytes_per_s + crossing


def partition_numbers(recipe: Recipe, topology: Topology) -> float:
    """Return how many weights one rank updates: its experts' share among their copies, of the rest its share of dp."""
    held = held_by_rank(recipe.model, topology.tp, topology.ep)
    return sum(one.size / (topology.edp if one.is_expert else topology.dp) for one in held)


def _weight_bytes(recipe: Recipe, topology: Topology) -> dict[str, float]:
    """Return, by part, what reading its matrices in forward and backward of a micro-batch moves."""
    width = _WEIGHT_PASSES * NUMBER_BYTES[recipe.train.precision]
    return {part: width * size for part, size in _weights_by_part(recipe.model, topology.tp, topology.ep)}


@lru_cache(maxsize=256)
def _weights_by_part(model: ModelConfig, tp: int, ep: int) -> tuple[tuple[str, int], ...]:
    """Return how many weights of each part a rank holds."""
    total = Counter[str]()
    for one in held_by_rank(model, tp, ep):
        total[_part_of(one.name, one.is_expert)] += one.size
    return tuple(total.items())


def _part_of(name: str, is_expert: bool) -> str:
    if is_expert:
        return "experts"
    marks = {
        ".self_attention.": "attention",
        ".cross_attention.": "cross_attention",
        ".router.": "router",
        ".gate.wg.": "router",
        ".ffn.": "dense_ffn",
        "modulation": "modulation",
    }
    return next((part for mark, part in marks.items() if mark in name), "other")


def _computed_once(recipe: Recipe) -> Recipe:
    """Return the recipe that keeps all activations."""
    return replace(recipe, train=replace(recipe.train, recompute="none", recompute_every=1))


def _hidden(
    recipe: Recipe,
    topology: Topology,
    zero: ZeroSettings,
    compute: dict[str, float],
    once: dict[str, float],
    communication: list[CollectiveTime],
) -> dict[str, float]:
    """Return, by purpose, the seconds that overlap takes off; no second of computing hides two collectives.

    Of what is computed `once`, without recomputation, a third is forward; the rest and all recomputation is backward.
    """
    times = {line.traffic.purpose: line.seconds for line in communication}
    hidden = {}
    in_forward = in_backward = 0.0
    if recipe.parallel.dispatch_chunks > 1 and "token_exchanges" in times:
        again = compute["experts"] - once["experts"]
        in_forward, in_backward = _hidden_exchanges(recipe, topology, times["token_exchanges"], once["experts"], again)
        hidden["token_exchanges"] = in_forward + in_backward
    if not zero.overlap_comm:
        return hidden
    forward = (sum(once.values()) - once["optimizer"]) / 3
    recomputed = sum(compute.values()) - sum(once.values())
    # While an exchange hides, it has the link; what of it does not hide lengthens the step, and no gradient uses that.
    budget = 2 * forward + recomputed - in_backward
    if zero.stage == 1:
        budget *= recipe.micro_batch_size(topology.dp) * topology.dp / recipe.train.global_batch_size
    for purpose in ("dense_gradients", "expert_gradients"):
        if purpose in times:
            hidden[purpose] = min(times[purpose], budget)
            budget -= hidden[purpose]
    if zero.stage == 3:
        budget += forward - in_forward
        for purpose in ("dense_weights", "expert_weights"):
            if purpose in times:
                hidden[purpose] = min(times[purpose], budget)
                budget -= hidden[purpose]
    return hidden


def _hidden_exchanges(
    recipe: Recipe, topology: Topology, seconds: float, experts: float, experts_again: float
) -> tuple[float, float]:
    """Return the seconds of exchanges that hide in forward and in backward, each pass behind its own experts.

    Forward and backward exchange as much. What is left of `seconds` is exchanged again with what is recomputed:
    nothing with `selective`, whose recomputed experts hence hide nothing.

    Args:
        experts: seconds of experts without recomputation, a third of them forward.
        experts_again: seconds of recomputed experts.
    """
    micro, chunks = recipe.micro_batch_size(topology.dp), recipe.parallel.dispatch_chunks
    first, every = (
        exchange_bytes(one, topology, micro, recipe.model.num_tokens) for one in (_computed_once(recipe), recipe)
    )
    each = seconds * (first / every) / 2
    backward = min(each, 2 * experts / 3) + min(seconds - 2 * each, experts_again)
    return (chunks - 1) / chunks * min(each, experts / 3), (chunks - 1) / chunks * backward
