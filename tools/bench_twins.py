"""The dense models that `tools/bench.py sample` draws with beside an expert-choice model, and what a picture costs.

FLOPs are those of matrix products and attention; a multiply-add is two. What is done a token or a number at a time
(norms, activations, the choice itself, gathering and summing rows) is left out, as it is where FLOPs are published: the
time it takes is the overhead that the benchmark is after.
"""

from dataclasses import fields, replace
from typing import Any

from ecdit_ds.model_config import EXPERT_CHOICE_SWITCHES, ModelConfig

_TIMESTEP_WAVES = 256
_ALIGNMENTS = (64, 32, 16, 8, 4, 2, 1)
"""Inner widths that a matrix product likes, best first."""
_CLOSE_ENOUGH = 0.005


def image_flops(config: ModelConfig, pool_images: int) -> int:
    """Return the FLOPs of one image in a forward that has the text's keys and values.

    Args:
        pool_images: images among whose tokens an expert chooses.
    """
    d, s, t = config.hidden_size, config.num_tokens, config.max_text_tokens
    patch = config.in_channels * config.patch_size**2
    ends = 2 * _product(s, patch, d)
    condition = _product(1, _TIMESTEP_WAVES + 2 * d + config.text_embed_dim, d)
    modulation = _product(1, d, (6 + 2) * d)
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    cross_width = config.cross_num_heads * config.cross_head_dim
    projections = 2 * _product(s, d, width + kv_width + cross_width)
    scores_and_values = 2 * _product(s, s, width) + 2 * _product(s, t, cross_width)
    layers = config.num_layers * (projections + scores_and_values)
    return ends + condition + modulation + layers + _feed_forward_flops(config, pool_images)


def text_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one text's keys and values in all layers."""
    cross_width = config.cross_num_heads * config.cross_head_dim
    return config.num_layers * 2 * _product(config.max_text_tokens, config.text_embed_dim, cross_width)


def picture_flops(config: ModelConfig, *, batch_size: int, num_steps: int, is_guided: bool, reuses_text: bool) -> float:
    """Return the FLOPs of a picture drawn beside `batch_size - 1` others, one evaluation a step or, guided, two.

    With reuse all pictures share the keys and values of the null text, which are had also where nothing is guided.
    """
    evaluations = num_steps * (2 if is_guided else 1)
    texts = (1 + 1 / batch_size) if reuses_text else evaluations
    return evaluations * image_flops(config, config.pool_images(batch_size)) + texts * text_flops(config)


def dense_twin(config: ModelConfig) -> ModelConfig:
    """Return the same model with a dense feed-forward network where experts were."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(ModelConfig)}
    return replace(config, ffn="dense", **{name: defaults[name] for name in EXPERT_CHOICE_SWITCHES})


def equal_flops_dense(config: ModelConfig, pool_images: int) -> ModelConfig:
    """Return the dense twin whose ffn_hidden_size, in every layer, brings its forward to the FLOPs of `config`'s.

    Of the inner widths within 0.5 % of it, one that is a multiple of as large a power of two as can be, up to 64:
    odd widths are slow, which is not what shall be compared.
    """
    twin, wanted = dense_twin(config), image_flops(config, pool_images)
    a_unit = image_flops(replace(twin, ffn_hidden_size=2), 1) - image_flops(replace(twin, ffn_hidden_size=1), 1)
    exact = twin.ffn_hidden_size + (wanted - image_flops(twin, 1)) / a_unit
    found = twin
    for alignment in _ALIGNMENTS:
        found = replace(twin, ffn_hidden_size=max(1, round(exact / alignment)) * alignment)
        if abs(image_flops(found, 1) / wanted - 1) <= _CLOSE_ENOUGH:
            break
    return found


def _feed_forward_flops(config: ModelConfig, pool_images: int) -> int:
    d, s, matrices = config.hidden_size, config.num_tokens, 3 if config.ffn_activation == "swiglu" else 2
    a_row = matrices * _product(1, d, config.ffn_hidden_size)
    num_sparse = sum(config.is_moe_layer(layer) for layer in range(config.num_layers))
    dense = (config.num_layers - num_sparse) * s * a_row
    if not num_sparse:
        return dense
    pool_rows = config.num_experts * config.expert_capacity(s * pool_images)
    rows = pool_rows / pool_images + config.num_shared_experts * s
    return dense + num_sparse * round(_product(s, d, config.num_experts) + rows * a_row)


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns
