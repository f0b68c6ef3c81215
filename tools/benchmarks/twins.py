"""The dense models that `tools/bench.py sample` draws with beside an expert-choice model, and what a picture costs.

FLOPs are those of matrix products and attention (ecdit_ds/planner/flops.py). The time that all else takes (norms,
activations, the choice itself, gathering and summing rows) is the overhead that the benchmark is after.
"""

from dataclasses import fields, replace
from typing import Any

from ecdit_ds.config.model_config import EXPERT_CHOICE_SWITCHES, ModelConfig
from ecdit_ds.planner.flops import block_text_flops, forward_flops

_ALIGNMENTS = (64, 32, 16, 8, 4, 2, 1)
"""Inner widths that a matrix product likes, best first."""
_CLOSE_ENOUGH = 0.005


def image_flops(config: ModelConfig, pool_images: int) -> int:
    """Return the FLOPs of one image in a forward that has the text's keys and values.

    Args:
        pool_images: images among whose tokens an expert chooses.
    """
    return round(forward_flops(config, config.num_tokens, pool_images).total) - text_flops(config)


def text_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one text's keys and values in all layers."""
    return (config.num_layers + config.decoder_layers) * block_text_flops(config)


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
