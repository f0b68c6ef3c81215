"""The planner's parameters are the model's, name by name, and its totals the paper's."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.yaml_loader import load_recipe, recipe_names
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.parallel.partition_rules import sharded_axes
from ecdit_ds.planner.parameters import (
    AUTOENCODER_PARAMETERS,
    TEXT_ENCODER_PARAMETERS,
    ParameterCount,
    count_parameters,
    parameters,
)

ODD: dict[str, dict[str, Any]] = {
    "dense": {"ffn": "dense"},
    "swiglu": {"ffn_activation": "swiglu"},
    "shared": {"num_shared_experts": 3, "ffn_activation": "swiglu"},
    "sigmoid": {"router_scores": "sigmoid", "gate_normalization": "token"},
    "absolute": {"positions": "rotary_and_absolute"},
    "token_choice": {"ffn": "token_choice"},
    "decoder": {"decoder_layers": 3, "num_layers": 3},
    "heads": {"num_kv_heads": 1, "head_dim": 12, "cross_num_heads": 3, "cross_head_dim": 7},
    "ends": {"patch_size": 4, "in_channels": 5, "text_embed_dim": 9, "ffn_hidden_size": 31},
}

PAPER = {
    "dense_xl": 1.47e9,
    "dense_xxl": 2.35e9,
    "dense_3xl": 4.50e9,
    "dense_m": 8.03e9,
    "ecdit_xl_32e": 6.08e9,
    "ecdit_xxl_32e": 13.47e9,
    "ecdit_3xl_32e": 32.15e9,
    "ecdit_m_64e": 97.21e9,
}
"""arXiv 2410.02098 table 1, encoders included."""


def assert_is_the_models(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = ECDiT(config, serial_layers())
    assert [(p.name, p.shape) for p in parameters(config)] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


@pytest.mark.parametrize("name", recipe_names())
def test_each_parameter_of_a_recipe_has_the_models_name_and_shape(name: str) -> None:
    assert_is_the_models(load_recipe(name).model)


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD.keys())
def test_each_parameter_of_an_odd_model_has_the_models_name_and_shape(
    tiny_config: ModelConfig, changes: dict[str, Any]
) -> None:
    assert_is_the_models(replace(tiny_config, **changes))


@pytest.mark.parametrize(("name", "total"), PAPER.items(), ids=PAPER.keys())
def test_the_papers_totals_hold_within_two_per_mille(name: str, total: float) -> None:
    assert count_parameters(load_recipe(name).model).with_encoders == pytest.approx(total, rel=2e-3)


def test_a_token_meets_8_27_billion_parameters_of_the_largest_model() -> None:
    assert count_parameters(load_recipe("ecdit_m_64e").model).activated == pytest.approx(8.27e9, rel=2e-3)


def test_a_dense_model_activates_all_it_has() -> None:
    count = count_parameters(load_recipe("dense_xl").model)
    assert count == ParameterCount(dit=count.dit, in_experts=0, activated=count.with_encoders)
    assert count.with_encoders - count.dit == TEXT_ENCODER_PARAMETERS + AUTOENCODER_PARAMETERS == 754_000_000


def test_experts_are_counted_by_hand(tiny_config: ModelConfig) -> None:
    count = count_parameters(replace(tiny_config, capacity_factor=1.5))
    assert count.in_experts == 2 * 4 * (32 * 48 + 48 * 32)  # two layers of four experts of two matrices
    assert count.with_encoders - count.activated == count.in_experts * (4 - 1.5) / 4


@pytest.mark.parametrize(("ffn", "axes"), [("expert_choice", {"tp": 2, "ep": 0}), ("token_choice", {"ep": 0})])
def test_experts_of_either_kind_are_known_by_name_as_cut(
    tiny_config: ModelConfig, ffn: Any, axes: dict[str, int]
) -> None:
    (name, *_) = (p.name for p in parameters(replace(tiny_config, ffn=ffn)) if p.name.endswith(".w1"))
    assert sharded_axes(name) == axes


def test_nothing_but_experts_has_three_axes(tiny_config: ModelConfig) -> None:
    for parameter in parameters(tiny_config):
        assert parameter.is_expert == ("ep" in sharded_axes(parameter.name)), parameter.name
