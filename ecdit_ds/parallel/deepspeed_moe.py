"""What DeepSpeed must see to train experts: its marker classes and its parameter marks.

The engine recognises a Mixture-of-Experts layer by `isinstance` alone. Without the marker, experts of different
ranks are broadcast over one another at the start and their gradients averaged: training runs, the model is wrong.
DeepSpeed is imported here, in `setup.py` and in `training/engine.py` only.
"""

from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from einops import rearrange
from torch import Tensor, nn

from ecdit_ds.config.model_config import Activation, ModelConfig
from ecdit_ds.model.experts import Experts
from ecdit_ds.model.sharding import UNSHARDED, ShardIndex


def expert_group_name(ep_size: int) -> str:
    """Return DeepSpeed's name for the expert-parallel group; it parses the number out of it."""
    return f"ep_size_{ep_size}"


class DeepSpeedExperts(Experts, AutoEPMoELayer):
    """Experts that the engine keeps apart: reduced and clipped over their copies, never averaged over one another.

    AutoEPMoELayer is inherited for its type alone (the engine asks `isinstance`), hence its `__init__` is not run.
    It is accepted by ZeRO-1, 2 and 3.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        activation: Activation,
        ep: ShardIndex = UNSHARDED,
        tp: ShardIndex = UNSHARDED,
    ) -> None:
        Experts.__init__(self, num_experts, hidden_size, ffn_hidden_size, activation=activation, ep=ep, tp=tp)
        _mark_expert_parameters(self, ep)
        if tp.count > 1:
            for parameter in self.parameters():
                mark_tp_sharded(parameter)

    def forward(self, x_LRD: Tensor) -> Tensor:
        return Experts.forward(self, x_LRD)

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """Do nothing: the dispatcher already holds its group. The engine calls this, in two signatures."""


class TokenChoice(nn.Module):
    """The baseline: each token takes its top-k experts (GShard), by DeepSpeed's own layer.

    An expert has as many places as under expert choice, capacity_factor * tokens / E over the rank's micro-batch;
    tokens beyond are dropped. So, unlike expert choice, its result depends on how the batch is split over ranks.

    Returns from forward:
        (y_BSD, auxiliary load-balance loss, a scalar)
    """

    def __init__(self, config: ModelConfig, *, ep: ShardIndex) -> None:
        super().__init__()
        places_per_choice = config.capacity_factor / config.top_k
        self.moe = MoE(
            config.hidden_size,
            nn.Identity(),
            config.num_experts,
            ep.count,
            k=config.top_k,
            capacity_factor=places_per_choice,
            eval_capacity_factor=places_per_choice,
            min_capacity=1,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        # DeepSpeed's own bank holds one module an expert; ours is one tensor, named and cut as under expert choice.
        experts = Experts(
            config.num_experts, config.hidden_size, config.ffn_hidden_size, activation=config.ffn_activation, ep=ep
        )
        self.moe.deepspeed_moe.experts = _PeerMajor(experts)
        _mark_expert_parameters(experts, ep)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        y_BSD, auxiliary_loss, _ = self.moe(x_BSD)
        return y_BSD, auxiliary_loss


class _PeerMajor(nn.Module):
    """Let experts, which want (local expert, row), take what DeepSpeed hands over: (peer, local expert, row)."""

    def __init__(self, bank: Experts) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x_PLCD: Tensor) -> Tensor:
        y_LRD = self.bank(rearrange(x_PLCD, "p l c d -> l (p c) d"))
        return rearrange(y_LRD, "l (p c) d -> p l c d", p=x_PLCD.shape[0])


def create_expert_groups(ep_size: int, mpu: Any = None) -> Any:
    """Create DeepSpeed's expert-parallel and expert-data groups, and return this rank's expert-parallel group.

    Args:
        mpu: where there are tensor-parallel groups, DeepSpeed's view of them.
    """
    groups.mpu = mpu
    if mpu is None:
        groups._create_expert_and_data_parallel(ep_size)
    else:
        groups._create_expert_data_and_model_parallel(ep_size, mpu)
    return groups._get_expert_parallel_group(expert_group_name(ep_size))


def zero_shard_of(parameter: nn.Parameter) -> ShardIndex:
    """Return which part of how many this rank updates, of the ranks that hold the same weights."""
    name = getattr(parameter, "group_name", None)
    if name is None:
        return ShardIndex(index=groups._get_data_parallel_rank(), count=groups._get_data_parallel_world_size())
    return ShardIndex(
        index=groups._get_expert_data_parallel_rank(name), count=groups._get_expert_data_parallel_world_size(name)
    )


def mark_tp_sharded(parameter: nn.Parameter) -> None:
    """Tell DeepSpeed that each tensor-parallel rank holds another slice, so that each counts in the gradient norm."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.model_parallel = True  # type: ignore[attr-defined]


def _mark_expert_parameters(module: nn.Module, ep: ShardIndex) -> None:
    name = expert_group_name(ep.count)
    for parameter in module.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]  # DeepSpeed's only test for "expert parameter"
        parameter.group_name = name  # type: ignore[attr-defined]
        # ZeRO-3 cuts it over the copies of this expert, not over all data-parallel ranks.
        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
