"""Which fields of the model are the experts' is said once, and holds: a dense model computes the same without them."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.checkpoint.convert.upcycle import check_upcyclable
from ecdit_ds.config.model_config import EXPERT_CHOICE_SWITCHES, EXPERT_FIELDS, ModelConfig
from ecdit_ds.config.recipe import Recipe, changed_fields, with_defaults
from ecdit_ds.errors import CheckpointError, ConfigError
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.layers import SerialLayers
from tools.benchmarks.twins import dense_twin

OTHER_VALUES: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 16,
    "cross_num_heads": 4,
    "cross_head_dim": 8,
    "ffn_hidden_size": 40,
    "patch_size": 4,
    "in_channels": 4,
    "latent_height": 16,
    "latent_width": 16,
    "text_embed_dim": 16,
    "max_text_tokens": 5,
    "decoder_layers": 1,
    "positions": "rotary_and_absolute",
    "ffn_activation": "swiglu",
    "num_experts": 2,
    "capacity_factor": 1.5,
    "capacity_rounding": "floor",
    "routing_pool": "batch",
    "routing_group": 2,
    "router_scores": "sigmoid",
    "router_input": "unmodulated",
    "gate_normalization": "token",
    "num_shared_experts": 1,
    "top_k": 1,
    "load_balance_weight": 0.5,
}
"""A value for each field but `ffn` that is not the tiny model's."""
Randomize = Callable[[nn.Module], None]


def outcome(config: ModelConfig, draw: Callable[..., Tensor], randomize: Randomize) -> tuple[Any, ...]:
    """Return what the model takes and what it makes of it."""
    model = ECDiT(config, SerialLayers())
    randomize(model)
    latents = draw("latents", 2, config.in_channels, config.latent_height, config.latent_width)
    text = draw("text", 2, config.max_text_tokens, config.text_embed_dim)
    with torch.no_grad():
        out = model(latents, torch.tensor([0.2, 0.7]), text, torch.ones(text.shape[:2], dtype=torch.bool), text[:, 0])
    return latents.shape, text.shape, out.velocity_BCHW


def is_same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    return ours[:2] == theirs[:2] and torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("name", sorted({spec.name for spec in fields(ModelConfig)} - {"ffn"}))
def test_a_field_is_the_experts_if_and_only_if_a_dense_model_does_not_use_it(
    tiny_config: ModelConfig, draw: Callable[..., Tensor], randomize: Randomize, name: str
) -> None:
    dense = replace(tiny_config, ffn="dense")
    assert OTHER_VALUES[name] != getattr(dense, name)
    try:
        changed = replace(dense, **{name: OTHER_VALUES[name]})
    except ConfigError:  # a switch of experts: refused, since it would do nothing
        assert name in EXPERT_FIELDS
        return
    uses_it = not is_same(outcome(dense, draw, randomize), outcome(changed, draw, randomize))
    assert uses_it == (name not in EXPERT_FIELDS)


@pytest.mark.parametrize(("name", "kinds"), EXPERT_FIELDS.items())
def test_a_switch_of_one_kind_of_experts_is_refused_by_every_other_kind(
    tiny_config: ModelConfig, name: str, kinds: tuple[str, ...]
) -> None:
    known = get_args(get_type_hints(ModelConfig)["ffn"])
    assert set(kinds) < set(known)
    for ffn in known:
        changes: dict[str, Any] = {"ffn": ffn, name: OTHER_VALUES[name]}
        if name == "routing_group":
            changes["routing_pool"] = "group"
        if ffn in kinds or len(kinds) > 1:
            replace(tiny_config, **changes)
        else:
            with pytest.raises(ConfigError, match=r"has no effect with model\.ffn"):
                replace(tiny_config, **changes)


def test_the_dense_twin_leaves_every_switch_at_its_default(tiny_config: ModelConfig) -> None:
    values = {name: OTHER_VALUES[name] for name in EXPERT_CHOICE_SWITCHES} | {"routing_pool": "group"}
    twin = dense_twin(replace(tiny_config, **values))
    defaults = {spec.name: spec.default for spec in fields(ModelConfig)}
    assert {name: getattr(twin, name) for name in EXPERT_CHOICE_SWITCHES} == {
        name: defaults[name] for name in EXPERT_CHOICE_SWITCHES
    }


class Written:
    """A checkpoint that says this of its recipe."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.meta = {"recipe": recipe}


def dense_of_an_older_release(recipe: Recipe) -> dict[str, Any]:
    """Return a dense recipe as a release wrote it that knew no field with a default."""
    written = replace(recipe, model=replace(recipe.model, ffn="dense")).to_dict()
    has_default = {
        spec.name
        for spec in fields(ModelConfig)
        if spec.name in EXPERT_FIELDS
        or spec.name
        in (
            "decoder_layers",
            "positions",
            "ffn_activation",
        )
    }
    written["model"] = {name: value for name, value in written["model"].items() if name not in has_default}
    return written


@pytest.mark.parametrize("name", sorted(EXPERT_FIELDS.keys() - {"num_shared_experts", "top_k", "load_balance_weight"}))
def test_an_older_dense_checkpoint_takes_every_experts_field(tiny_recipe: Recipe, name: str) -> None:
    changes = {name: OTHER_VALUES[name]} | ({"routing_pool": "group"} if name == "routing_group" else {})
    new = replace(tiny_recipe, model=replace(tiny_recipe.model, **changes))
    check_upcyclable(Written(dense_of_an_older_release(tiny_recipe)), new)  # type: ignore[arg-type]


def test_a_field_that_an_older_checkpoint_lacks_has_its_default_there_and_no_other_value(tiny_recipe: Recipe) -> None:
    source = Written(dense_of_an_older_release(tiny_recipe))
    new = replace(tiny_recipe, model=replace(tiny_recipe.model, ffn_activation="swiglu"))
    with pytest.raises(CheckpointError, match=r"model\.ffn_activation: 'gelu' there, 'swiglu' now"):
        check_upcyclable(source, new)  # type: ignore[arg-type]


def test_what_a_recipe_lacks_means_its_default_in_every_section(tiny_recipe: Recipe) -> None:
    whole = tiny_recipe.to_dict()
    assert with_defaults(whole) == whole
    needed = {"hidden_size": 32, "ffn": "dense"}
    filled = with_defaults({"name": "old", "model": needed, "train": {"max_steps": 3}, "extra": 1})
    assert filled["model"].items() >= needed.items() and filled["extra"] == 1
    assert filled["train"]["mask_ratio"] == 0.0 and filled["sample"]["guidance_interval"] == [0.0, 1.0]
    assert {field for field in changed_fields(filled, whole) if field.startswith(("flow.", "optimizer."))} == set()
