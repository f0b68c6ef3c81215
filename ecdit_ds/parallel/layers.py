"""The layers a model asks for, and who builds them.

The model knows no ranks: it asks a `LayerFactory` for linear layers whose output or input dimension may be cut, for
experts, and for the dispatcher that reaches them. `SerialLayers` is the specification.
"""

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import nn

from ecdit_ds.config import Activation, ModelConfig
from ecdit_ds.parallel.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from ecdit_ds.parallel.experts import Experts


class LayerFactory(Protocol):
    """Builds what a layout can cut."""

    def column_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """Return a linear layer whose output dimension may be cut."""
        ...

    def row_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """Return a linear layer whose input dimension may be cut and whose output is summed."""
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

    def column_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def row_linear(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, *, activation: Activation) -> Experts:
        return Experts(num_experts, hidden_size, ffn_hidden_size, activation=activation)

    def dispatcher(self) -> Dispatcher:
        return LocalDispatcher()

    def token_choice(self, config: ModelConfig) -> nn.Module:
        # DeepSpeed is needed for this baseline alone, so a serial model imports it only when asked.
        from ecdit_ds.parallel.deepspeed_moe import TokenChoice

        return TokenChoice(config, ep_rank=0, ep_size=1)


@dataclass(frozen=True, kw_only=True)
class ExpertParallelLayers(SerialLayers):
    """Experts spread over `group`; everything else is whole on each rank.

    Its experts carry DeepSpeed's marks also when the group has one rank, because the engine trains through them.
    """

    ep_rank: int
    ep_size: int
    group: dist.ProcessGroup | None

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, *, activation: Activation) -> Experts:
        from ecdit_ds.parallel.deepspeed_moe import DeepSpeedExperts

        return DeepSpeedExperts(
            num_experts, hidden_size, ffn_hidden_size, activation=activation, ep_rank=self.ep_rank, ep_size=self.ep_size
        )

    def dispatcher(self) -> Dispatcher:
        return LocalDispatcher() if self.group is None or self.ep_size == 1 else AllToAllDispatcher(self.group)

    def token_choice(self, config: ModelConfig) -> nn.Module:
        from ecdit_ds.parallel.deepspeed_moe import TokenChoice

        return TokenChoice(config, ep_rank=self.ep_rank, ep_size=self.ep_size)
