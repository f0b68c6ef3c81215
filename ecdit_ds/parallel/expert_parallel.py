"""Experts spread over ranks; and the layers of one process, with the baseline that is DeepSpeed's."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from ecdit_ds.config.model_config import Activation, ModelConfig
from ecdit_ds.model.dispatch import Dispatcher, LocalDispatcher
from ecdit_ds.model.experts import Experts
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.model.sharding import UNSHARDED, ShardIndex
from ecdit_ds.parallel.dispatch import AllToAllDispatcher


def serial_layers() -> SerialLayers:
    """Return the layers of one process, for any model."""
    return SerialLayers(make_token_choice=_token_choice)


def _token_choice(config: ModelConfig, ep: ShardIndex = UNSHARDED) -> nn.Module:
    # DeepSpeed is needed for this baseline alone, so one process imports it only when asked.
    from ecdit_ds.parallel.deepspeed_moe import TokenChoice

    return TokenChoice(config, ep=ep)


@dataclass(frozen=True, kw_only=True)
class ExpertParallelLayers(SerialLayers):
    """Experts spread over `ep_group`; everything else is whole on each rank.

    Its experts carry DeepSpeed's marks also when the group has one rank, because the engine trains through them.
    """

    ep: ShardIndex
    ep_group: dist.ProcessGroup
    dispatch_chunks: int = 1

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, *, activation: Activation) -> Experts:
        from ecdit_ds.parallel.deepspeed_moe import DeepSpeedExperts

        return DeepSpeedExperts(num_experts, hidden_size, ffn_hidden_size, activation=activation, ep=self.ep)

    def dispatcher(self) -> Dispatcher:
        return LocalDispatcher() if self.ep.count == 1 else AllToAllDispatcher(self.ep_group, self.dispatch_chunks)

    def token_choice(self, config: ModelConfig) -> nn.Module:
        return _token_choice(config, self.ep)
