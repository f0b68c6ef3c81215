"""Tensor parallelism on megatron-core's linear layers. Imported only where parallel.tp is more than 1.

Attention heads and inner widths are cut; the residual stream is whole, and the same bits, on every rank of a group.
So gradients of what is not cut come out equal by themselves: between `copy_to_tp` and `row_linear` a rank sees only
its own part, and all that enters there passes an operator whose backward adds the parts up.
"""

import warnings
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that Transformer Engine and Apex, which are not needed, are not here
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from ecdit_ds.config.model_config import Activation
from ecdit_ds.model.dispatch import Dispatcher
from ecdit_ds.model.experts import Experts
from ecdit_ds.model.sharding import ShardIndex, set_shard
from ecdit_ds.parallel.collectives import copy_to_tp_region
from ecdit_ds.parallel.deepspeed_moe import DeepSpeedExperts, mark_tp_sharded
from ecdit_ds.parallel.dispatch import TensorParallelDispatcher
from ecdit_ds.parallel.expert_parallel import ExpertParallelLayers


class MegatronMPU:
    """What DeepSpeed asks of a model-parallel unit; megatron's own module lacks two of these names."""

    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_pipeline_model_parallel_world_size = staticmethod(lambda: 1)


def create_tensor_groups(tp_size: int, timeout_minutes: int) -> MegatronMPU:
    """Create megatron's tensor- and data-parallel groups over all ranks, and return DeepSpeed's view of them."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,
    )
    return MegatronMPU()


@dataclass(frozen=True, kw_only=True)
class TensorParallelLayers(ExpertParallelLayers):
    """Everything that can be cut is cut over `tp_group`; experts over the expert-parallel group besides."""

    tp: ShardIndex
    tp_group: dist.ProcessGroup

    def copy_to_tp(self) -> nn.Module:
        return _Entrance(self.tp_group)

    def column_linear(self, in_features: int, out_features: int) -> nn.Module:
        return _Column(in_features, out_features, self.tp)

    def row_linear(self, in_features: int, out_features: int) -> nn.Module:
        return _Row(in_features, out_features, self.tp)

    def qk_norm(self, head_dim: int) -> nn.Module:
        return _HeadNorm(head_dim, self.tp_group)

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, *, activation: Activation) -> Experts:
        return DeepSpeedExperts(
            num_experts, hidden_size, ffn_hidden_size, activation=activation, ep=self.ep, tp=self.tp
        )

    def dispatcher(self) -> Dispatcher:
        return TensorParallelDispatcher(super().dispatcher(), self.tp_group)


class _Entrance(nn.Module):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        return copy_to_tp_region(x, self._group)


class _HeadNorm(nn.RMSNorm):
    """Its weight is whole, but each rank sees the gradient of its own heads only."""

    def __init__(self, head_dim: int, group: dist.ProcessGroup) -> None:
        super().__init__(head_dim, eps=1e-6)
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, copy_to_tp_region(self.weight, self._group), self.eps)


class _Column(ColumnParallelLinear):
    def __init__(self, in_features: int, out_features: int, tp: ShardIndex) -> None:
        # The gradient of the input is summed once, by the copy_to_tp, for all layers that read it.
        super().__init__(
            in_features,
            out_features,
            config=_linear_config(tp),
            init_method=_no_init,
            bias=False,
            gather_output=False,
            disable_grad_reduce=True,
        )
        _mark_cut(self.weight, axis=0, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _Row(RowParallelLinear):
    def __init__(self, in_features: int, out_features: int, tp: ShardIndex) -> None:
        super().__init__(
            in_features,
            out_features,
            config=_linear_config(tp),
            init_method=_no_init,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        _mark_cut(self.weight, axis=1, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def _linear_config(tp: ShardIndex) -> ModelParallelConfig:
    # "CPU initialization" leaves the weight to the surrounding torch.device, here meta; weights are filled by name.
    return ModelParallelConfig(
        tensor_model_parallel_size=tp.count, use_cpu_initialization=True, perform_initialization=False
    )


def _no_init(weight: Tensor) -> Tensor:
    raise AssertionError("weights are initialised by name, in model/init.py")


def _mark_cut(weight: nn.Parameter, *, axis: int, tp: ShardIndex) -> None:
    set_shard(weight, (axis, tp), is_tp_sharded=True)
    mark_tp_sharded(weight)
