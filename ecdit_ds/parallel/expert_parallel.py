"""The layers a model asks for, and who builds them.

The model knows no ranks: it asks a `LayerFactory` for linear layers whose output or input dimension may be cut, for
experts, and for the dispatcher that reaches them. `SerialLayers` is the specification.
"""

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import nn

from ecdit_ds.config.model_config import Activation, ModelConfig
from ecdit_ds.model.experts import Experts
from ecdit_ds.model.sharding import Share
from ecdit_ds.parallel.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher


class LayerFactory(Protocol):
    """Builds what a layout can cut. No linear layer has a bias.

    Between `entrance` and `row_linear` a rank computes its own heads, or its own part of the inner width.
    """

    def entrance(self) -> nn.Module:
        """Return the identity that tokens pass once before the column layers that read them."""
        ...

    def column_linear(self, in_features: int, out_features: int) -> nn.Module:
        """Return a linear layer whose output dimension may be cut."""
        ...

    def row_linear(self, in_features: int, out_features: int) -> nn.Module:
        """Return a linear layer whose input dimension may be cut and whose output is summed."""
        ...

    def head_norm(self, head_dim: int) -> nn.Module:
        """Return the RMS norm that all heads of a layer share, wherever they are."""
        ...

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, *, activation: Activation) -> Experts:
        """Return this rank's share of the experts."""
        ...

    def dispatcher(self) -> Dispatcher:
        """Return what moves tokens to the experts and back."""
        ...

    def token_choice(self, config: ModelConfig) -> nn.Module:
        """Return the token-choice baseline layer: x_BSD -> (y_BSD, auxiliary loss)."""
        ...


class SerialLayers:
    """One process holds everything."""

    def entrance(self) -> nn.Module:
        return nn.Identity()

    def column_linear(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=False)

    def row_linear(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=False)

    def head_norm(self, head_dim: int) -> nn.Module:
        return nn.RMSNorm(head_dim, eps=1e-6)

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, *, activation: Activation) -> Experts:
        return Experts(num_experts, hidden_size, ffn_hidden_size, activation=activation)

    def dispatcher(self) -> Dispatcher:
        return LocalDispatcher()

    def token_choice(self, config: ModelConfig) -> nn.Module:
        # DeepSpeed is needed for this baseline alone, so a serial model imports it only when asked.
        from ecdit_ds.parallel.deepspeed_moe import TokenChoice

        return TokenChoice(config, ep=Share())


@dataclass(frozen=True, kw_only=True)
class ExpertParallelLayers(SerialLayers):
    """Experts spread over `ep_group`; everything else is whole on each rank.

    Its experts carry DeepSpeed's marks also when the group has one rank, because the engine trains through them.
    """

    ep: Share
    ep_group: dist.ProcessGroup
    dispatch_chunks: int = 1

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, *, activation: Activation) -> Experts:
        from ecdit_ds.parallel.deepspeed_moe import DeepSpeedExperts

        return DeepSpeedExperts(num_experts, hidden_size, ffn_hidden_size, activation=activation, ep=self.ep)

    def dispatcher(self) -> Dispatcher:
        return LocalDispatcher() if self.ep.count == 1 else AllToAllDispatcher(self.ep_group, self.dispatch_chunks)

    def token_choice(self, config: ModelConfig) -> nn.Module:
        from ecdit_ds.parallel.deepspeed_moe import TokenChoice

        return TokenChoice(config, ep=self.ep)
