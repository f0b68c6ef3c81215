"""EC-DiT: a text-to-image diffusion transformer whose every second FFN is a layer of experts.

Masked training (MaskDiT, arXiv 2306.09305): the blocks see the kept tokens of each image only; a few dense decoder
blocks after them see every position, a learned token standing where one was left out. Without a mask all see all.

Suffixes: B micro-batch, C channels, H W latent height and width, S image tokens, N kept tokens, T text tokens, D width,
M modulation vectors, K head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.model.attention import TextKV
from ecdit_ds.model.block import DiTBlock, FinalLayer
from ecdit_ds.model.embedders import ConditionEmbedder, PatchEmbed, rope_angles, sincos_pos_embed
from ecdit_ds.model.layers import LayerFactory


class Prediction(NamedTuple):
    """What the model returns. ZeRO-3 looks for tensors in tuples only."""

    velocity_BCHW: Tensor
    """Predicted velocity, in the latents' shape and dtype."""
    auxiliary_loss: Tensor
    """fp32 scalar: the token-choice baseline's load-balance loss; zero otherwise."""


class RunBlock(Protocol):
    """How a block is run: at once, or so that its activations are computed again in backward."""

    def __call__(self, layer: int, block: Callable[..., Any], *inputs: Any) -> Any:
        """Return `block(*inputs)` for block `layer` (from 0)."""
        ...


def run_block(layer: int, block: Callable[..., Any], *inputs: Any) -> Any:
    """Return `block(*inputs)`."""
    return block(*inputs)


class ECDiT(nn.Module):
    """The transformer. It asks `layers` for what a layout may cut and knows nothing of ranks."""

    def __init__(self, config: ModelConfig, layers: LayerFactory, run_block: RunBlock = run_block) -> None:
        super().__init__()
        self.config = config
        self.run_block = run_block
        self.patches = PatchEmbed(config.in_channels, config.patch_size, config.hidden_size)
        self.condition = ConditionEmbedder(config.text_embed_dim, config.hidden_size)
        self.modulation = nn.Linear(config.hidden_size, 6 * config.hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(layers, config, layer) for layer in range(config.num_layers))
        self.decoder = nn.ModuleList(
            DiTBlock(layers, config, config.num_layers + layer) for layer in range(config.decoder_layers)
        )
        self.mask_token = nn.Parameter(torch.empty(config.hidden_size)) if config.decoder_layers else None
        self.final = FinalLayer(config)

    def text_kv(self, text_embeds_BTD: Tensor) -> list[TextKV]:
        """Return each layer's keys and values of a text, to be used at every time."""
        text_embeds_BTD = text_embeds_BTD.to(self.patches.linear.weight.dtype)
        blocks = [*self.blocks, *self.decoder]
        return [cast(DiTBlock, block).cross_attention.text_kv(text_embeds_BTD) for block in blocks]

    def forward(
        self,
        noisy_latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text: Tensor | Sequence[TextKV],
        text_mask_BT: Tensor,
        text_pooled_BD: Tensor,
        visible_BN: Tensor | None = None,
    ) -> Prediction:
        """Predict the velocity `noise - latents`.

        Args:
            noisy_latents_BCHW: height and width multiples of patch_size; not necessarily those of training.
            timesteps_B: in [0, 1]; 0 is data, 1 is noise.
            text: text_embeds_BTD, or what `text_kv` made of it.
            text_mask_BT: bool, True for a real token; at least one a row.
            visible_BN: int64, the tokens of each image that the main blocks see; None for all.
        """
        dtype, p = self.patches.linear.weight.dtype, self.config.patch_size
        height, width = noisy_latents_BCHW.shape[-2] // p, noisy_latents_BCHW.shape[-1] // p
        angles_SK = rope_angles(height, width, self.config.head_dim, noisy_latents_BCHW.device)

        x_BSD = self.patches(noisy_latents_BCHW.to(dtype))
        places_SD = None
        if self.config.positions == "rotary_and_absolute":
            places_SD = sincos_pos_embed(height, width, self.config.hidden_size, x_BSD.device).to(dtype)
            x_BSD = x_BSD + places_SD
        condition_BD = self.condition(timesteps_B, text_pooled_BD.to(dtype))
        modulation_BMD = rearrange(self.modulation(F.silu(condition_BD)), "b (m d) -> b m d", m=6)
        auxiliary_loss = torch.zeros((), device=x_BSD.device)
        num_blocks = len(self.blocks) + len(self.decoder)
        texts = [text.to(dtype)] * num_blocks if isinstance(text, Tensor) else text
        angles = angles_SK
        if visible_BN is not None:
            x_BSD, angles = gather_visible(x_BSD, visible_BN), rearrange(angles_SK[visible_BN], "b n k -> b 1 n k")
        for layer, block in enumerate([*self.blocks, *self.decoder]):
            if layer == len(self.blocks) and visible_BN is not None:
                x_BSD, angles = self._unmask(x_BSD, visible_BN, height * width, places_SD), angles_SK
            x_BSD, block_loss = self.run_block(layer, block, x_BSD, modulation_BMD, angles, texts[layer], text_mask_BT)
            auxiliary_loss = auxiliary_loss + block_loss.to(auxiliary_loss.device)  # a device map may spread blocks
        if self.mask_token is not None and visible_BN is None:
            # To a parameter that a step does not reach, DeepSpeed's ZeRO-3 would give the gradient of an earlier step.
            auxiliary_loss = auxiliary_loss + 0.0 * self.mask_token.sum().to(auxiliary_loss)
        patches = self.final(x_BSD, condition_BD)
        velocity = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p)
        return Prediction(velocity_BCHW=velocity.to(noisy_latents_BCHW.dtype), auxiliary_loss=auxiliary_loss)

    def _unmask(self, x_BND: Tensor, visible_BN: Tensor, num_tokens: int, places_SD: Tensor | None) -> Tensor:
        """Return every position: the kept tokens in their places, and the mask token, told its place, in the others."""
        assert self.mask_token is not None, "a recipe that masks has decoder blocks"
        filler = self.mask_token if places_SD is None else self.mask_token + places_SD
        x_BSD = filler.to(x_BND.dtype).expand(len(x_BND), num_tokens, -1)
        return x_BSD.scatter(1, visible_BN[:, :, None].expand_as(x_BND), x_BND)


def gather_visible(x_BSD: Tensor, visible_BN: Tensor) -> Tensor:
    """Return the tokens at `visible_BN` of each image, x_BND."""
    return x_BSD.gather(1, visible_BN[:, :, None].expand(-1, -1, x_BSD.shape[-1]))
