"""Floating-point operations of matrix products and attention, by part of the model; a multiply-add is two.

What is done a number at a time (norms, activations, the choice itself, gathering and summing rows) is left out, as it
is where FLOPs are published. A test compares every part with `torch.utils.flop_counter`.

Letters: N tokens that a block sees, T text tokens, D hidden_size, F ffn_hidden_size, E experts, f capacity factor.
"""

from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.planner.parameters import TIMESTEP_WAVES


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs by part."""

    attention: float = 0.0
    """Projections, scores and sums of self-attention."""
    cross_attention: float = 0.0
    """The same for the text."""
    dense_ffn: float = 0.0
    """Feed-forward layers that every token passes; shared experts are among them."""
    experts: float = 0.0
    """Routed ones."""
    router: float = 0.0
    modulation: float = 0.0
    """The adaLN maps, shared by all blocks, and the last layer's."""
    other: float = 0.0
    """Patches in and out, and the embedding of the time and the pooled text."""

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def times(self, factor: float) -> "Flops":
        """Return `factor` times as much of each part."""
        return Flops(**{part.name: factor * getattr(self, part.name) for part in fields(self)})

    def plus(self, other: "Flops") -> "Flops":
        """Return the sum of each part."""
        return Flops(**{part.name: getattr(self, part.name) + getattr(other, part.name) for part in fields(self)})


def forward_flops(config: ModelConfig, kept_tokens: int, pool_images: int) -> Flops:
    """Return the forward FLOPs of one image.

    Outside the blocks: 2 P D for each of the S tokens on its way in and out, P numbers a patch; the condition's four
    matrices and the 8 D^2 of adaLN once.

    Args:
        kept_tokens: tokens that the main blocks see; decoder blocks see all.
        pool_images: images among whose tokens an expert chooses.
    """
    d = config.hidden_size
    patch = config.in_channels * config.patch_size**2
    ends = 2 * _product(config.num_tokens, patch, d)
    condition = _product(1, TIMESTEP_WAVES + 2 * d + config.text_embed_dim, d)
    total = Flops(modulation=_product(1, d, (6 + 2) * d), other=ends + condition)
    for layer in range(config.num_layers + config.decoder_layers):
        total = total.plus(block_flops(config, layer, kept_tokens, pool_images))
    return total


@lru_cache(maxsize=256)
def training_flops(config: ModelConfig, kept_tokens: int, pool_images: int) -> Flops:
    """Return the "model FLOPs" of one image's forward and backward; nothing that is computed again counts.

    Each product of forward, Y = X W, has two in backward of the same size: the gradients of X and of W. Only that of W
    is needed where X is an input: the patches, the text for every block's keys and values, the pooled text, and the
    waves of the time.
    """
    thrice = forward_flops(config, kept_tokens, pool_images).times(3.0)
    texts = (config.num_layers + config.decoder_layers) * block_text_flops(config)
    patches = _product(config.num_tokens, config.in_channels * config.patch_size**2, config.hidden_size)
    condition = _product(1, TIMESTEP_WAVES + config.text_embed_dim, config.hidden_size)
    return thrice.plus(Flops(cross_attention=-texts, other=-patches - condition))


def recomputed_flops(recipe: Recipe, kept_tokens: int, pool_images: int) -> Flops:
    """Return what activation checkpointing adds to an image: one more forward of each block that it forgets.

    With `selective` it is as much: only exchanges are spared.
    """
    config, total = recipe.model, Flops()
    for layer in range(config.num_layers + config.decoder_layers):
        if is_recomputed(recipe, layer):
            total = total.plus(block_flops(config, layer, kept_tokens, pool_images))
    return total


def is_recomputed(recipe: Recipe, layer: int) -> bool:
    """Return whether block `layer` (from 0, decoder blocks last) forgets its activations."""
    return recipe.train.recompute != "none" and (layer + 1) % recipe.train.recompute_every == 0


def block_flops(config: ModelConfig, layer: int, kept_tokens: int, pool_images: int) -> Flops:
    """Return one image's forward FLOPs in block `layer` (from 0, decoder blocks last).

    Self-attention has width A = heads x head_dim and key-value width K: 2 N D (2 A + 2 K) for its four matrices and
    2 N N A each for scores and sums. Cross-attention of width A: 2 N D 2 A, the text's 2 T D_text 2 A, and
    2 N T A twice. A dense FFN: 2 N D F for each of its 2 (swiglu: 3) matrices. Experts: the same for the E C rows
    that they take of a pool, C = expert_capacity, where a router's 2 N D E come on top.
    """
    tokens = kept_tokens if layer < config.num_layers else config.num_tokens
    d = config.hidden_size
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = _product(tokens, d, 2 * width + 2 * kv_width)
    flops = Flops(
        attention=projections + 2 * _product(tokens, tokens, width),
        cross_attention=_cross_attention_flops(config, tokens) + block_text_flops(config),
    )
    row = (3 if config.ffn_activation == "swiglu" else 2) * _product(1, d, config.ffn_hidden_size)
    if not config.is_moe_layer(layer):
        return flops.plus(Flops(dense_ffn=tokens * row))
    rows = Fraction(config.num_experts * config.expert_capacity(tokens * pool_images), pool_images)
    router = _product(tokens, d, config.num_experts)
    shared = config.num_shared_experts * tokens * row
    return flops.plus(Flops(dense_ffn=shared, experts=float(rows * row), router=router))


def _cross_attention_flops(config: ModelConfig, tokens: int) -> int:
    """Return one block's cross-attention FLOPs of an image whose text's keys and values are there."""
    width = config.cross_num_heads * config.cross_head_dim
    return _product(tokens, config.hidden_size, 2 * width) + 2 * _product(tokens, config.max_text_tokens, width)


def block_text_flops(config: ModelConfig) -> int:
    """Return one block's FLOPs for the keys and values of one text."""
    width = config.cross_num_heads * config.cross_head_dim
    return _product(config.max_text_tokens, config.text_embed_dim, 2 * width)


def _product(rows: int, inner: int, columns: int) -> int:
    """Return the FLOPs of one matrix product."""
    return 2 * rows * inner * columns
