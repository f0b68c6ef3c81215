"""Self-attention over image tokens and cross-attention to the text.

A text's keys and values depend on neither the image nor the time: `CrossAttention.text_kv` computes them once, and
forward takes them in place of the text.

Suffixes: B micro-batch, S image tokens, T text tokens, D hidden_size, H heads, K head_dim. Heads are inferred from
the layer's width, so a factory may cut them.
"""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.model.embedders import apply_rope
from ecdit_ds.model.layers import LayerFactory


class SelfAttention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys and 2-D rotary positions (DiT-Air App. A)."""

    def __init__(self, layers: LayerFactory, config: ModelConfig) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.copy_to_tp = layers.copy_to_tp()
        self.query = layers.column_linear(config.hidden_size, width)
        self.key = layers.column_linear(config.hidden_size, kv_width)
        self.value = layers.column_linear(config.hidden_size, kv_width)
        self.out = layers.row_linear(width, config.hidden_size)
        self.query_norm = layers.qk_norm(config.head_dim)
        self.key_norm = layers.qk_norm(config.head_dim)

    def forward(self, x_BSD: Tensor, angles: Tensor) -> Tensor:
        """Mix the tokens; `angles` as for `apply_rope`."""
        x_BSD = self.copy_to_tp(x_BSD)
        query, key, value = (
            rearrange(project(x_BSD), "b s (h k) -> b h s k", k=self.head_dim)
            for project in (self.query, self.key, self.value)
        )
        query, key = apply_rope(self.query_norm(query), angles), apply_rope(self.key_norm(key), angles)
        y_BHSK = F.scaled_dot_product_attention(query, key, value, enable_gqa=key.shape[1] != query.shape[1])
        return self.out(rearrange(y_BHSK, "b h s k -> b s (h k)"))


class TextKV(NamedTuple):
    """Keys and values of a text in one layer. ZeRO-3 looks for tensors in tuples only."""

    key_BHTK: Tensor
    value_BHTK: Tensor

    def expand(self, count: int) -> "TextKV":
        """Return views for `count` images of a memory of one text, or the memory of `count` texts as it is."""
        return TextKV(*(t.expand(count, -1, -1, -1) for t in self))


class CrossAttention(nn.Module):
    """Image tokens read the text; masked text tokens are never read (paper eq. 2-3)."""

    def __init__(self, layers: LayerFactory, config: ModelConfig) -> None:
        super().__init__()
        width = config.cross_num_heads * config.cross_head_dim
        self.head_dim = config.cross_head_dim
        self.copy_to_tp = layers.copy_to_tp()
        self.query = layers.column_linear(config.hidden_size, width)
        self.key = layers.column_linear(config.text_embed_dim, width)
        self.value = layers.column_linear(config.text_embed_dim, width)
        self.out = layers.row_linear(width, config.hidden_size)
        self.query_norm = layers.qk_norm(config.cross_head_dim)
        self.key_norm = layers.qk_norm(config.cross_head_dim)

    def text_kv(self, text_embeds_BTD: Tensor) -> TextKV:
        """Return the text's keys and values."""
        key, value = (
            rearrange(project(text_embeds_BTD), "b t (h k) -> b h t k", k=self.head_dim)
            for project in (self.key, self.value)
        )
        return TextKV(key_BHTK=self.key_norm(key), value_BHTK=value)

    def forward(self, x_BSD: Tensor, text: Tensor | TextKV, text_mask_BT: Tensor) -> Tensor:
        """Return what the tokens read; `text` is text_embeds_BTD, or what `text_kv` made of it."""
        query = rearrange(self.query(self.copy_to_tp(x_BSD)), "b s (h k) -> b h s k", k=self.head_dim)
        key, value = text if isinstance(text, TextKV) else self.text_kv(text)
        y_BHSK = F.scaled_dot_product_attention(
            self.query_norm(query), key, value, attn_mask=rearrange(text_mask_BT, "b t -> b 1 1 t")
        )
        return self.out(rearrange(y_BHSK, "b h s k -> b s (h k)"))
