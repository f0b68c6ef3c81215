"""The DeepSpeed engine behind a small surface, and the only place that knows its internals.

ZeRO keeps, on each rank, flat fp32 tensors of the weights that this rank updates, and beside them the optimizer's
state (`zero_partitions.py`). Everything that outlives a step (checkpoint, average) lives on those, so nothing is ever
gathered. Besides `parallel/deepspeed_moe.py` and `parallel/setup.py`, DeepSpeed is imported here only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecdit_ds.parallel.setup import ParallelContext  # first: it names DeepSpeed's accelerator

# isort: split
import deepspeed
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from ecdit_ds.config.recipe import STATE_NAMES, OptimizerConfig
from ecdit_ds.model.sharding import ShardSpec, shard_of
from ecdit_ds.training.ema import ShardedEMA
from ecdit_ds.training.optimizer import build_optimizer, parameter_groups
from ecdit_ds.training.zero_partitions import GroupPartitions, ParameterPartitions, Partitions, check_partitions

WEIGHT = "weight"
EMA = "ema"


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """This rank's part of one parameter: a flat range of its local tensor, and what is kept for it."""

    name: str
    shard: ShardSpec
    local_shape: tuple[int, ...]
    start: int
    """Start of the range in the row-major local tensor."""
    states: dict[str, Tensor]
    """Flat fp32 views of equal length: weight, ema and the optimizer's own; writing to them changes the state."""
    is_saved_by_this_rank: bool
    """Whether this rank saves it; of tensor-parallel ranks that hold the same, the first does."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step, on this rank; tensors stay on the device."""

    loss: Tensor
    """fp32 scalar: mean flow loss of this rank's micro-batches."""
    auxiliary_loss: Tensor
    """What else was minimised, weighted: load balance and reconstruction."""
    grad_norm: Tensor | float
    """Global norm before clipping."""
    is_skipped: bool
    """Some gradient somewhere was not finite, so no rank changed anything."""


def optimizer_groups(model: nn.Module, weight_decay: float, stage: int) -> list[dict[str, Any]]:
    """Return the groups of parameters that ZeRO keeps apart; ZeRO-3 tells experts from the rest by itself."""
    groups = parameter_groups(model, weight_decay)
    return groups if stage == 3 else split_params_into_different_moe_groups_for_optimizer(groups)


class DeepSpeedEngine:
    """Trains a model under ZeRO-1, 2 or 3.

    Args:
        model: on this rank's device, weights filled.
        optimizer: the recipe's.
        deepspeed_config: from `load_deepspeed_config`.
        grid: the one that the model's layers come from.
    """

    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig, deepspeed_config: dict[str, Any], grid: ParallelContext
    ) -> None:
        zero = deepspeed_config["zero_optimization"]
        # Our RMSProp is not on DeepSpeed's list, nor is torch's AdamW for offloading; parity tests cover both.
        deepspeed_config = deepspeed_config | {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        groups = optimizer_groups(model, optimizer.weight_decay, zero["stage"])
        self._tp, self._optimizer_name = grid.tp, optimizer.name
        # Asked before ZeRO-3 takes the weights out of the parameters.
        self._places = {id(p): (name, shard_of(p), tuple(p.shape)) for name, p in model.named_parameters()}
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=model,
            config=deepspeed_config,
            mpu=grid.mpu,
            optimizer=build_optimizer(groups, optimizer, is_offloaded="offload_optimizer" in zero),
        )
        self._partitions: Partitions = (ParameterPartitions if zero["stage"] == 3 else GroupPartitions)(self._zero)
        if zero["stage"] == 3 and grid.tp.count > 1:
            _count_each_expert_slice_once(self._zero)
        check_partitions(self._partitions)
        self.ema = ShardedEMA(self._partitions.flats(), optimizer.ema_decay)
        self._make_optimizer_state()

    @property
    def module(self) -> nn.Module:
        """The model, to call without gradients."""
        module: nn.Module = self._engine.module
        return module

    def step(
        self, micro_batches: list[Any], loss_of: Callable[[nn.Module, Any], tuple[Tensor, Tensor]], learning_rate: float
    ) -> StepResult:
        """Accumulate over the micro-batches and update the weights and their average.

        Args:
            micro_batches: on the device.
            loss_of: (model, micro-batch) -> (loss, auxiliary loss), fp32 scalars; their sum is minimised.
            learning_rate: of this step.
        """
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        skipped_before = self._engine.skipped_steps
        losses, auxiliary_losses = [], []
        for micro_batch in micro_batches:
            loss, auxiliary_loss = loss_of(self._engine, micro_batch)
            self._engine.backward(loss + auxiliary_loss)
            self._engine.step()
            losses.append(loss.detach())
            auxiliary_losses.append(auxiliary_loss.detach())
        is_skipped = self._engine.skipped_steps > skipped_before
        if not is_skipped:
            self.ema.update(self._partitions.flats())
        return StepResult(
            loss=torch.stack(losses).mean(),
            auxiliary_loss=torch.stack(auxiliary_losses).mean(),
            grad_norm=self._engine.get_global_grad_norm(),
            is_skipped=is_skipped,
        )

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank keeps. Over all ranks, each element comes once where `is_saved_by_this_rank`."""
        kept = self._kept()
        for here in self._partitions.ranges():
            name, shard, local_shape = self._places[id(here.parameter)]
            yield Fragment(
                name=name,
                shard=shard,
                local_shape=local_shape,
                start=here.start,
                states={name: state.narrow(0, here.at, here.length) for name, state in kept[here.partition].items()},
                is_saved_by_this_rank=shard.is_tp_sharded or self._tp.index == 0,
            )

    def is_finite(self) -> bool:
        """Return whether all that this rank keeps is finite; one pass over it, for which the host waits: for reports.

        What is not finite never becomes so again. Gradients do not tell: they may be finite, and the update not.
        """
        tensors = [state for states in self._kept() for state in states.values() if state.numel()]
        extremes = [extreme for tensor in tensors for extreme in tensor.aminmax()]  # NaN where any is
        return not extremes or bool(torch.stack(extremes).isfinite().all())

    def _kept(self) -> list[dict[str, Tensor]]:
        """Return, for each flat tensor, what is kept for it by name."""
        flats = self._partitions.flats()
        kept = [{WEIGHT: flat.data, EMA: average} for flat, average in zip(flats, self.ema.averages, strict=True)]
        for flat, states in zip(flats, kept, strict=True):
            states |= {name: self._zero.optimizer.state[flat][name] for name in STATE_NAMES[self._optimizer_name]}
        return kept

    @property
    def num_updates(self) -> int:
        """Optimizer steps that were not skipped; Adam's bias correction and the average's decay count them."""
        return self.ema.num_updates

    def restored(self, num_updates: int) -> None:
        """Take over fragments that were just written: count on from `num_updates` and show the weights to the model."""
        self.ema.num_updates = num_updates
        for flat in self._partitions.flats():
            self._zero.optimizer.state[flat]["step"].fill_(float(num_updates))
        self._partitions.show()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Let the model compute with the averaged weights; collective, exact to undo, and without a copy."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        for flat, average in zip(self._partitions.flats(), self.ema.averages, strict=True):
            flat.data, average.data = average.data, flat.data
        self._partitions.show()

    def _make_optimizer_state(self) -> None:
        """Make the state that torch's optimizers make at their first step, so that one can be loaded before it."""
        for flat in self._partitions.flats():
            state = self._zero.optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {name: torch.zeros_like(flat) for name in STATE_NAMES[self._optimizer_name]}


def _count_each_expert_slice_once(zero: Any) -> None:
    """Mend DeepSpeed 0.19.8's ZeRO-3 gradient norm, which differs between tensor-parallel ranks when experts are cut.

    It takes for granted that expert-parallel groups span the tensor-parallel ranks; ours do not, so the sum over
    tensor-parallel ranks, which it leaves out for experts, is needed.
    """
    original = zero._grad_norm_counts_every_rank

    def counts_every_rank(parameters: Any, group: Any) -> bool:
        is_expert = zero._autoep_expert_parallel_group(parameters) is not None
        return False if is_expert else original(parameters, group)

    zero._grad_norm_counts_every_rank = counts_every_rank
