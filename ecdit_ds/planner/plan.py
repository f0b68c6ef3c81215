"""A plan: one layout on one machine, with everything that is predicted of it."""

from dataclasses import dataclass, replace

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import ConfigError
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.flops import Flops, recomputed_flops, training_flops
from ecdit_ds.planner.hardware import Cluster
from ecdit_ds.planner.memory import Memory, checkpoint_bytes, memory_of_rank
from ecdit_ds.planner.parameters import ParameterCount, count_parameters
from ecdit_ds.planner.reliability import (
    FAILURE_RATES,
    SECONDS_A_DAY,
    CheckpointCost,
    GoodputEstimate,
    checkpoint_cost,
    estimate_goodput,
)
from ecdit_ds.planner.timing import StepTime, model_flops_utilization, step_time
from ecdit_ds.planner.zero import ZeroSettings


@dataclass(frozen=True, kw_only=True)
class ClusterAssumptions:
    """What is known of the cluster beside its machines."""

    storage_bytes_per_s: float
    """For checkpoints, of all ranks together."""
    recovery_seconds: float
    """From an interruption to the next step: noticing, requeueing, starting, loading."""
    failure_rates: tuple[float, ...] = tuple(FAILURE_RATES.values())
    """Interruptions per 1000 node-days."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--storage-gbps", self.storage_bytes_per_s),
            *(("--failures-per-1000-node-days", rate) for rate in self.failure_rates),
        ):
            if not value > 0:
                raise ConfigError(f"{flag}: {value:g} is not a positive number")
        if not self.recovery_seconds >= 0:
            raise ConfigError(f"--recovery-minutes: {self.recovery_seconds / 60:g} is negative")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps that are alike: with a share of the tokens left out, or with all."""

    name: str
    steps: int
    mask_ratio: float
    micro_batch: int
    accumulated: int
    """Micro-batches of a step."""
    memory: Memory
    model_flops: Flops
    """FLOPs of a whole step on all ranks."""
    recomputed_flops: Flops
    time: StepTime
    mfu: float
    """With overlap."""
    mfu_without_overlap: float
    images_per_s: float
    """With overlap."""
    images_per_s_without_overlap: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything predicted of one layout."""

    recipe: Recipe
    topology: Topology
    zero: ZeroSettings
    machine: Cluster
    parameters: ParameterCount
    phases: tuple[Phase, ...]
    checkpoint: CheckpointCost
    training_seconds: float
    """Time of all steps, without stalls and interruptions."""
    outlooks: tuple[GoodputEstimate, ...]

    @property
    def needed_bytes(self) -> int:
        """Memory of the phase that needs most."""
        return max(phase.memory.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.machine.usable_bytes


def phases_of(recipe: Recipe) -> list[tuple[str, int, float]]:
    """Return name, steps and mask ratio of each phase of a run."""
    train = recipe.train
    masked = min(train.max_steps, train.unmasked_from_step or train.max_steps) if train.mask_ratio else 0
    found = [("masked", masked, train.mask_ratio), ("unmasked", train.max_steps - masked, 0.0)]
    return [phase for phase in found if phase[1]]


def with_micro_batch(recipe: Recipe, micro_batch: int) -> Recipe:
    """Return the recipe with another micro-batch."""
    return replace(recipe, train=replace(recipe.train, micro_batch_size=micro_batch))


def make_plan(
    recipe: Recipe,
    topology: Topology,
    zero: ZeroSettings,
    machine: Cluster,
    surroundings: ClusterAssumptions,
    micro_batches: dict[str, int] | None = None,
) -> Plan:
    """Predict a layout.

    Args:
        micro_batches: by phase, where they differ; the recipe's otherwise.

    Raises:
        ConfigError: the batch does not split over the ranks, or the pools over the chunks.
    """
    phases = []
    for name, steps, ratio in phases_of(recipe):
        own = with_micro_batch(recipe, micro_batches[name]) if micro_batches else recipe
        phases.append(_phase(own, topology, zero, machine, name, steps, ratio))
    total = checkpoint_bytes(recipe)
    cost = checkpoint_cost(
        total,
        ranks=topology.world_size,
        storage_bytes_per_s=surroundings.storage_bytes_per_s,
        pcie_bytes_per_s=machine.gpu.pcie_bytes_per_s,
        is_async=recipe.train.async_save,
    )
    seconds = sum(phase.steps * phase.time.with_overlap for phase in phases)
    outlooks = tuple(
        estimate_goodput(
            rate,
            nodes=machine.nodes,
            training_seconds=seconds,
            cost=cost,
            set_interval=recipe.train.checkpoint_every * seconds / recipe.train.max_steps,
            recovery_seconds=surroundings.recovery_seconds,
        )
        for rate in surroundings.failure_rates
    )
    return Plan(
        recipe=recipe,
        topology=topology,
        zero=zero,
        machine=machine,
        parameters=count_parameters(recipe.model),
        phases=tuple(phases),
        checkpoint=cost,
        training_seconds=seconds,
        outlooks=outlooks,
    )


def _phase(
    recipe: Recipe, topology: Topology, zero: ZeroSettings, machine: Cluster, name: str, steps: int, ratio: float
) -> Phase:
    micro, batch = recipe.micro_batch_size(topology.dp), recipe.train.global_batch_size
    kept, pool = recipe.model.num_kept_tokens(ratio), recipe.model.pool_images(micro)
    time = step_time(recipe, topology, zero, machine, ratio)
    return Phase(
        name=name,
        steps=steps,
        mask_ratio=ratio,
        micro_batch=micro,
        accumulated=batch // (micro * topology.dp),
        memory=memory_of_rank(recipe, topology, zero, ratio),
        model_flops=training_flops(recipe.model, kept, pool).times(batch),
        recomputed_flops=recomputed_flops(recipe, kept, pool).times(batch),
        time=time,
        mfu=model_flops_utilization(recipe, machine, ratio, pool, time.with_overlap),
        mfu_without_overlap=model_flops_utilization(recipe, machine, ratio, pool, time.without_overlap),
        images_per_s=batch / time.with_overlap,
        images_per_s_without_overlap=batch / time.without_overlap,
    )


def days(seconds: float) -> float:
    """Return seconds as days."""
    return seconds / SECONDS_A_DAY
