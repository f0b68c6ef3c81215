"""The DeepSpeed engine behind a small surface, and the only place that knows its internals.

ZeRO-1 and 2 keep, on each rank, one flat fp32 partition a parameter group: the weights that this rank updates, and
beside them the optimizer's state. Everything that outlives a step (checkpoint, average) lives on those partitions, so
nothing is ever gathered. Besides the expert marks in `parallel/deepspeed_moe.py`, DeepSpeed is imported here only.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed its search, and us its warning

import deepspeed
import deepspeed.ops
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from ecdit_ds.config import OptimizerConfig
from ecdit_ds.ema import ShardedEMA
from ecdit_ds.errors import TopologyError
from ecdit_ds.optim import STATE_NAMES, build_optimizer, parameter_groups
from ecdit_ds.parallel.deepspeed_moe import create_expert_groups
from ecdit_ds.parallel.layers import ExpertParallelLayers
from ecdit_ds.parallel.sharding import ShardSpec, shard_of
from ecdit_ds.parallel.topology import Topology

WEIGHT = "weight"
EMA = "ema"


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """This rank's part of one parameter: a flat range of its local tensor, and what is kept for it."""

    name: str
    shard: ShardSpec
    local_shape: tuple[int, ...]
    start: int
    """Of the range, in the row-major local tensor."""
    states: dict[str, Tensor]
    """Flat fp32 views of equal length: weight, ema and the optimizer's own; writing to them changes the state."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step, on this rank; tensors stay on the device."""

    loss: Tensor
    """fp32 scalar: mean flow loss of this rank's micro-batches."""
    auxiliary_loss: Tensor
    grad_norm: Tensor | float
    """Global norm before clipping."""
    is_skipped: bool
    """Some gradient somewhere was not finite, so no rank changed anything."""


def initialize_distributed(timeout_minutes: float = 10.0) -> torch.device:
    """Join the other processes and return this one's device; needs the launcher's environment.

    Raises:
        TopologyError: the port where they meet cannot be used.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU this op is compiled for a minute and used for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(minutes=timeout_minutes))
    except dist.DistNetworkError as error:
        raise TopologyError(
            f"MASTER_PORT {os.environ['MASTER_PORT']}: cannot be used ({str(error).splitlines()[0]}); if another run "
            "holds it, start with deepspeed --master_port N"
        ) from None
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def expert_parallel_layers(topology: Topology) -> ExpertParallelLayers:
    """Return the layer factory of this rank, having made DeepSpeed's expert groups."""
    at = topology.coordinates(dist.get_rank())
    return ExpertParallelLayers(ep_rank=at.ep, ep_size=topology.ep, group=create_expert_groups(topology.ep))


class DeepSpeedEngine:
    """Trains a model under ZeRO-1 or 2.

    Args:
        model: on this rank's device and in its precision, weights filled.
        optimizer: the recipe's.
        deepspeed_config: from `load_deepspeed_config`.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, deepspeed_config: dict[str, Any]) -> None:
        deepspeed_config = deepspeed_config | {"zero_allow_untested_optimizer": True}  # RMSProp; parity tests cover it
        groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups(model, optimizer.weight_decay))
        self._optimizer_name = optimizer.name
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(groups, optimizer), config=deepspeed_config
        )
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.ema = ShardedEMA(self._partitions(), optimizer.ema_decay)
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
            self.ema.update(self._partitions())
        return StepResult(
            loss=torch.stack(losses).mean(),
            auxiliary_loss=torch.stack(auxiliary_losses).mean(),
            grad_norm=self._engine.get_global_grad_norm(),
            is_skipped=is_skipped,
        )

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank keeps. Over all ranks, each element of each parameter comes exactly once."""
        for index, (flat, parameters) in enumerate(zip(self._partitions(), self._zero.bit16_groups, strict=True)):
            kept = {WEIGHT: flat.data, EMA: self.ema.averages[index]}
            kept |= {name: self._zero.optimizer.state[flat][name] for name in STATE_NAMES[self._optimizer_name]}
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:  # all of it is another rank's
                    continue
                address = mapping.get_hp_fragment_address()
                yield Fragment(
                    name=self._names[id(parameter)],
                    shard=shard_of(parameter),
                    local_shape=tuple(parameter.shape),
                    start=mapping.lp_fragment_address.start,
                    states={name: state.narrow(0, address.start, address.numel) for name, state in kept.items()},
                )

    @property
    def num_updates(self) -> int:
        """Optimizer steps that were not skipped; Adam's bias correction and the average's decay count them."""
        return self.ema.num_updates

    def restored(self, num_updates: int) -> None:
        """Take over fragments that were just written: count on from `num_updates` and show the weights to the model."""
        self.ema.num_updates = num_updates
        for flat in self._partitions():
            self._zero.optimizer.state[flat]["step"].fill_(float(num_updates))
        self._zero.update_lp_params()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Let the model compute with the averaged weights; collective, exact to undo, and without a copy."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        for flat, average in zip(self._partitions(), self.ema.averages, strict=True):
            flat.data, average.data = average.data, flat.data
        self._zero.update_lp_params()

    def _partitions(self) -> list[Tensor]:
        partitions: list[Tensor] = self._zero.single_partition_of_fp32_groups
        return partitions

    def _make_optimizer_state(self) -> None:
        """Make the state that torch's optimizers make at their first step, so that one can be loaded before it."""
        for flat in self._partitions():
            state = self._zero.optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {name: torch.zeros_like(flat) for name in STATE_NAMES[self._optimizer_name]}
