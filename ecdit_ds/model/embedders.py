"""What enters the transformer: patches, timestep, pooled text, and the rotary angles of positions.

Suffixes: B micro-batch, S image tokens, D hidden_size, K head_dim.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

_TIMESTEP_FREQUENCIES = 256
_TIMESTEP_SCALE = 1000.0
_ROTARY_BASE = 100.0


class PatchEmbed(nn.Module):
    """Latents to tokens: non-overlapping patches, row by row, through one linear layer."""

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(in_channels * patch_size**2, hidden_size)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        p = self.patch_size
        return self.linear(rearrange(latents_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p))


class ConditionEmbedder(nn.Module):
    """Timestep and pooled text to one vector c_BD: MLP(sinusoids of t) + MLP(pooled text) (DiT-Air App. A)."""

    def __init__(self, text_embed_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.time_in = nn.Linear(_TIMESTEP_FREQUENCIES, hidden_size)
        self.time_out = nn.Linear(hidden_size, hidden_size)
        self.text_in = nn.Linear(text_embed_dim, hidden_size)
        self.text_out = nn.Linear(hidden_size, hidden_size)

    def forward(self, timesteps_B: Tensor, text_pooled_BD: Tensor) -> Tensor:
        waves = timestep_embedding(timesteps_B).to(self.time_in.weight.dtype)
        return self.time_out(F.silu(self.time_in(waves))) + self.text_out(F.silu(self.text_in(text_pooled_BD)))


def timestep_embedding(timesteps_B: Tensor) -> Tensor:
    """Return fp32 sinusoids (B, 256) of t in [0, 1], with periods from 2 pi / 1000 up to about 2 pi * 10."""
    half = _TIMESTEP_FREQUENCIES // 2
    exponent = torch.arange(half, device=timesteps_B.device, dtype=torch.float32) / half
    angles = timesteps_B.float()[:, None] * _TIMESTEP_SCALE * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_angles(height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Return fp32 angles (S, head_dim / 2) of an image of height x width tokens.

    Half of the pairs turn with the row, half with the column, so attention sees relative positions in 2-D.
    """
    quarter = head_dim // 4
    frequencies = _ROTARY_BASE ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None] * frequencies
    columns = torch.arange(width, device=device, dtype=torch.float32)[:, None] * frequencies
    row_part = rows[:, None, :].expand(height, width, quarter)
    column_part = columns[None, :, :].expand(height, width, quarter)
    return rearrange(torch.cat([row_part, column_part], dim=-1), "h w k -> (h w) k")


def sincos_pos_embed(height: int, width: int, hidden_size: int, device: torch.device) -> Tensor:
    """Return fp32 sines and cosines (S, D) of each token's row and column, a quarter of D each; D a multiple of 4."""
    angles_SK = rope_angles(height, width, hidden_size, device)
    return torch.cat([angles_SK.sin(), angles_SK.cos()], dim=-1)


def apply_rope(x_BHSK: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) of every head by its token's angle; norms are kept.

    Args:
        angles: angles_SK, or (B, 1, S, K) where each image has other tokens.
    """
    first, second = x_BHSK.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x_BHSK.dtype), angles.sin().to(x_BHSK.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
