"""The layers a model asks for, and who builds them.

The model knows no ranks: it asks a `LayerFactory` for linear layers whose output or input dimension may be cut, for
experts, and for the dispatcher that reaches them. `SerialLayers` is the specification; `ecdit_ds.parallel` implements
the same for several ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ecdit_ds.config.model_config import Activation, ModelConfig
from ecdit_ds.model.dispatch import Dispatcher, LocalDispatcher
from ecdit_ds.model.experts import Experts


class LayerFactory(Protocol):
    """Builds what a layout can cut. No linear layer has a bias.

    Between `copy_to_tp` and `row_linear` a rank computes its own heads, or its own part of the inner width.
    """

    def copy_to_tp(self) -> nn.Module:
        """Return the identity that tokens pass once before the column layers that read them."""
        ...

    def column_linear(self, in_features: int, out_features: int) -> nn.Module:
        """Return a linear layer whose output dimension may be cut."""
        ...

    def row_linear(self, in_features: int, out_features: int) -> nn.Module:
        """Return a linear layer whose input dimension may be cut and whose output is summed."""
        ...

    def qk_norm(self, head_dim: int) -> nn.Module:
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


@dataclass(frozen=True, kw_only=True)
class SerialLayers:
    """One process holds everything.

    Args:
        make_token_choice: makes the token-choice baseline layer, which is DeepSpeed's and not the model's own
            (`ecdit_ds.parallel.expert_parallel.serial_layers` brings it); None where no model asks for it.
    """

    make_token_choice: Callable[[ModelConfig], nn.Module] | None = None

    def copy_to_tp(self) -> nn.Module:
        return nn.Identity()

    def column_linear(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=False)

    def row_linear(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=False)

    def qk_norm(self, head_dim: int) -> nn.Module:
        return nn.RMSNorm(head_dim, eps=1e-6)

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, *, activation: Activation) -> Experts:
        return Experts(num_experts, hidden_size, ffn_hidden_size, activation=activation)

    def dispatcher(self) -> Dispatcher:
        return LocalDispatcher()

    def token_choice(self, config: ModelConfig) -> nn.Module:
        assert self.make_token_choice is not None, "a token-choice model needs the layers of `serial_layers`"
        return self.make_token_choice(config)
