"""One transformer block: self-attention, cross-attention, FFN or experts, each residual.

Modulation is adaLN-single (PixArt-alpha): one map from the condition to 6D values, shared by all blocks, plus a small
learned table a block. All of it starts at zero, so each block starts as the identity.

Suffixes: B micro-batch, S image tokens, T text tokens, D hidden_size.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.model.attention import CrossAttention, SelfAttention, TextKV
from ecdit_ds.model.layers import LayerFactory
from ecdit_ds.model.moe import DenseFFN, ExpertChoiceFFN


@dataclass(frozen=True, kw_only=True)
class Modulation:
    """adaLN-Zero's triple for one residual branch, each (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def apply(self, x_BSD: Tensor) -> Tensor:
        """Return the normalised token, scaled and shifted."""
        return x_BSD * (1 + self.scale) + self.shift


class DiTBlock(nn.Module):
    """A block; `layer` (from 0, decoder blocks last) decides between dense FFN and experts."""

    def __init__(self, layers: LayerFactory, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.modulation_table = nn.Parameter(torch.empty(6, config.hidden_size))
        self.self_attention = SelfAttention(layers, config)
        self.cross_attention = CrossAttention(layers, config)
        self.ffn: nn.Module
        if not config.is_moe_layer(layer):
            self.ffn = DenseFFN(layers, config)
        elif config.ffn == "expert_choice":
            self.ffn = ExpertChoiceFFN(layers, config)
        else:
            self.ffn = layers.token_choice(config)
        self.is_moe = config.is_moe_layer(layer)

    def forward(
        self,
        x_BSD: Tensor,
        modulation_BMD: Tensor,
        angles: Tensor,
        text: Tensor | TextKV,
        text_mask_BT: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens and the auxiliary loss (zero but for token choice).

        Args:
            modulation_BMD: the shared 6 modulation vectors.
            angles: of the tokens' positions, as for `rotate`.
            text: text_embeds_BTD, or this layer's memory of it.
        """
        attention, ffn = self._modulations(modulation_BMD)
        x_BSD = x_BSD + attention.gate * self.self_attention(attention.apply(layer_norm(x_BSD)), angles)
        x_BSD = x_BSD + self.cross_attention(layer_norm(x_BSD), text, text_mask_BT)
        update_BSD, auxiliary_loss = self._feed_forward(layer_norm(x_BSD), ffn)
        return x_BSD + ffn.gate * update_BSD, auxiliary_loss

    def _feed_forward(self, normed_BSD: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]:
        modulated_BSD = modulation.apply(normed_BSD)
        no_loss = modulated_BSD.new_zeros((), dtype=torch.float32)
        if not self.is_moe:
            return self.ffn(modulated_BSD), no_loss
        if self.config.ffn == "token_choice":
            return self.ffn(modulated_BSD)
        router_input = modulated_BSD if self.config.router_input == "modulated" else normed_BSD
        return self.ffn(modulated_BSD, router_input), no_loss

    def _modulations(self, modulation_BMD: Tensor) -> tuple[Modulation, Modulation]:
        vectors = rearrange(modulation_BMD + self.modulation_table, "b m d -> m b 1 d").unbind(0)
        first, second = vectors[:3], vectors[3:]
        return (
            Modulation(shift=first[0], scale=first[1], gate=first[2]),
            Modulation(shift=second[0], scale=second[1], gate=second[2]),
        )


class FinalLayer(nn.Module):
    """Tokens to patches of the predicted velocity, with its own shift and scale; starts at zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.in_channels * config.patch_size**2)

    def forward(self, x_BSD: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition_BD))[:, None].chunk(2, dim=-1)
        return self.linear(layer_norm(x_BSD) * (1 + scale) + shift)


def layer_norm(x_BSD: Tensor) -> Tensor:
    """Return each token with zero mean and unit variance; scale and shift come from the modulation."""
    return F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=1e-6)
