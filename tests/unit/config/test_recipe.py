"""A recipe that cannot work is refused before a cluster sees it, with the values that would work."""

import math
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import pytest

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import (
    MAY_CHANGE_ON_RESUME,
    FlowConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    SampleConfig,
    TrainConfig,
    changed_fields,
)
from ecdit_ds.config.yaml_loader import recipe_from_dict
from ecdit_ds.errors import ConfigError

RefusalOf = Callable[[Callable[[], object]], str]
Rounding = Literal["floor", "nearest", "ceil"]


def edited(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return the recipe with dotted fields replaced all at once, so that only the end result is judged."""
    data = recipe.to_dict()
    for key, value in changes.items():
        section, name = key.split(".")
        data[section][name] = value
    return recipe_from_dict(data)


def suggestions(message: str) -> list[int]:
    """Return the numbers that a message offers."""
    offered = re.search(r"(?:choose(?: from)?|may be) ([\d, or]+)$", message)
    assert offered, f"no values offered: {message!r}"
    return [int(number) for number in re.findall(r"\d+", offered.group(1))]


POSITIVE = [
    *(
        ("model", name)
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "cross_num_heads",
            "cross_head_dim",
            "ffn_hidden_size",
            "patch_size",
            "in_channels",
            "latent_height",
            "latent_width",
            "text_embed_dim",
            "max_text_tokens",
            "num_experts",
            "routing_group",
            "top_k",
        )
    ),
    ("data", "num_train"),
    ("data", "num_heldout"),
    ("flow", "logit_std"),
    ("flow", "timestep_shift"),
    ("optimizer", "learning_rate"),
    ("optimizer", "eps"),
    *(
        ("train", name)
        for name in (
            "max_steps",
            "global_batch_size",
            "micro_batch_size",
            "checkpoint_every",
            "log_every",
            "evaluate_every",
            "sample_every",
            "max_skipped_steps",
        )
    ),
    ("parallel", "ep"),
    ("sample", "num_steps"),
]


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(("section", "name"), POSITIVE)
def test_a_size_that_is_not_positive_is_refused(
    section: str, name: str, value: int, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    message = refusal_of(lambda: edited(tiny_recipe, {f"{section}.{name}": value}))
    assert f"{section}.{name}" in message
    assert str(value) in message


@pytest.mark.parametrize("value", [-0.1, 1.5])
@pytest.mark.parametrize(
    "key",
    [
        "flow.text_dropout_prob",
        *(f"optimizer.{n}" for n in ("final_lr_fraction", "beta1", "beta2", "momentum", "smoothing", "ema_decay")),
    ],
)
def test_a_share_outside_0_and_1_is_refused(key: str, value: float, tiny_recipe: Recipe, refusal_of: RefusalOf) -> None:
    assert f"{key}: {value} is outside [0, 1]" in refusal_of(lambda: edited(tiny_recipe, {key: value}))


FLOAT_FIELDS = [
    f"{section}.{spec.name}"
    for section, cls in (
        ("model", ModelConfig),
        ("flow", FlowConfig),
        ("optimizer", OptimizerConfig),
        ("sample", SampleConfig),
    )
    for spec in fields(cls)
    if spec.type is float
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", FLOAT_FIELDS)
def test_a_number_that_is_not_finite_is_refused(
    key: str, value: float, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    message = refusal_of(lambda: edited(tiny_recipe, {key: value}))
    assert key in message
    assert str(value) in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.capacity_factor": 4.5}, ["model.capacity_factor", "4.5", "num_experts=4"]),
        ({"model.capacity_factor": 0.0}, ["model.capacity_factor", "0.0"]),
        ({"model.num_experts": 1, "model.capacity_factor": 1.0}, ["model.num_experts", "1", "model.ffn: dense"]),
        ({"model.num_experts": 1}, ["model.num_experts", "1", "model.ffn: dense"]),
        ({"model.ffn": "token_choice", "model.top_k": 3}, ["model.top_k", "3", "1 and 2"]),
        ({"model.routing_group": 2}, ["model.routing_group", "2", "routing_pool: group", "routing_group: 1"]),
        ({"model.num_shared_experts": -1}, ["model.num_shared_experts", "-1"]),
        ({"model.load_balance_weight": -0.5}, ["model.load_balance_weight", "-0.5"]),
        ({"model.capacity_rounding": "floor", "model.capacity_factor": 0.1}, ["capacity_rounding", "floor", "ceil"]),
        ({"model.capacity_rounding": "nearest", "model.capacity_factor": 0.1}, ["capacity_rounding", "nearest of"]),
        ({"data.num_workers": -1}, ["data.num_workers", "-1", "0 or more"]),
        ({"optimizer.warmup_steps": -1}, ["optimizer.warmup_steps", "-1", "0 or more"]),
        ({"optimizer.weight_decay": -0.1}, ["optimizer.weight_decay", "-0.1", "0 or more"]),
        ({"optimizer.gradient_clipping": -1.0}, ["optimizer.gradient_clipping", "-1.0", "0 or more"]),
        ({"train.keep_checkpoints": 1}, ["train.keep_checkpoints", "1", "2 or more"]),
        (
            {"parallel.tp": 4},
            ["parallel.tp(4)", "model.num_kv_heads(2)", "num_heads", "= 4, 2, 2, 48 choose from 1, 2"],
        ),
        ({"parallel.tp": 2, "model.num_kv_heads": 1}, ["parallel.tp(2)", "model.num_kv_heads(1)", "choose from 1"]),
        (
            {"parallel.tp": 2, "model.cross_num_heads": 3},
            ["parallel.tp(2)", "model.cross_num_heads(3)", "choose from 1"],
        ),
        ({"parallel.tp": 0}, ["parallel.tp", "0"]),
        ({"parallel.tp": 2, "model.ffn": "token_choice"}, ["parallel.tp: 2", "use tp 1"]),
        ({"parallel.dispatch_chunks": 2}, ["parallel.dispatch_chunks: 2 has no effect", "parallel.ep: 1"]),
        ({"parallel.dispatch_chunks": 2, "parallel.ep": 2, "model.routing_pool": "batch"}, ["routing_pool: batch"]),
        ({"train.recompute": "selective"}, ["train.recompute: selective", "parallel.ep: 1", "use block"]),
        (
            {"train.recompute": "selective", "parallel.ep": 2, "train.recompute_every": 3},
            ["recompute_every: 3 of 4 layers", "use block"],
        ),
        ({"train.recompute_every": 2}, ["train.recompute_every: 2 has no effect", "block or selective"]),
        ({"train.recompute": "block", "train.recompute_every": 5}, ["recompute_every: 5", "num_layers(4)", "1 to 4"]),
        ({"parallel.ep": 2, "model.ffn": "dense"}, ["parallel.ep", "2", "model.ffn: dense", "use 1"]),
        ({"sample.guidance_scale": -1.0}, ["sample.guidance_scale", "-1.0"]),
    ],
)
def test_an_impossible_setting_is_refused_with_the_way_out(
    changes: dict[str, Any], said: list[str], tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    message = refusal_of(lambda: edited(tiny_recipe, changes))
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("bad", "mended"),
    [
        ({"model.num_kv_heads": 3}, "model.num_kv_heads"),
        ({"model.head_dim": 10}, "model.head_dim"),
        ({"model.head_dim": 2}, "model.head_dim"),
        ({"model.patch_size": 3}, "model.patch_size"),
        ({"model.patch_size": 5, "model.latent_height": 16, "model.latent_width": 12}, "model.patch_size"),
        ({"model.patch_size": 8, "model.latent_height": 16, "model.latent_width": 12}, "model.patch_size"),
        ({"parallel.ep": 3}, "parallel.ep"),
        ({"train.micro_batch_size": 3}, "train.micro_batch_size"),
    ],
)
def test_every_value_that_a_refusal_offers_is_accepted(
    bad: dict[str, Any], mended: str, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    message = refusal_of(lambda: edited(tiny_recipe, bad))
    assert mended in message
    assert str(bad[mended]) in message
    for value in suggestions(message):
        edited(tiny_recipe, {**bad, mended: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"model.capacity_factor": 4.0},
        {"model.ffn": "dense", "model.num_experts": 1},
        {"model.num_layers": 1, "model.ffn": "dense"},
        {"optimizer.gradient_clipping": 0.0},
        {"flow.text_dropout_prob": 1.0},
        {"parallel.ep": 4},
        # One image has half a token for each expert, but a pool of two images has a whole one.
        {
            "model.capacity_factor": 0.125,
            "model.capacity_rounding": "floor",
            "model.routing_pool": "group",
            "model.routing_group": 2,
        },
    ],
)
def test_settings_at_the_edge_of_the_possible_are_accepted(changes: dict[str, Any], tiny_recipe: Recipe) -> None:
    recipe = edited(tiny_recipe, changes).to_dict()
    assert all(recipe[key.split(".")[0]][key.split(".")[1]] == value for key, value in changes.items())


@pytest.mark.parametrize(
    ("rounding", "capacity_factor", "num_experts", "pool_tokens", "capacity"),
    [
        ("floor", 1.5, 4, 9, 3),
        ("nearest", 1.5, 4, 9, 3),
        ("ceil", 1.5, 4, 9, 4),
        ("floor", 1.5, 4, 18, 6),
        ("nearest", 1.5, 4, 18, 7),
        ("ceil", 1.5, 4, 18, 7),
        ("floor", 2.0, 4, 16, 8),
        ("nearest", 2.0, 4, 16, 8),
        ("ceil", 2.0, 4, 16, 8),
        ("ceil", 4.0, 4, 16, 16),
        ("ceil", 0.01, 4, 16, 1),
        ("ceil", 2.0, 3, 1, 1),
        ("nearest", 2.0, 2, 5, 5),
        # 1.1 x 100 / 10 is 11, though not in binary floating point; 0.29 x 100 / 4 is 7.25, 0.58 x 100 / 2 is 29.
        ("ceil", 1.1, 10, 100, 11),
        ("floor", 0.58, 2, 100, 29),
        ("floor", 0.29, 4, 100, 7),
    ],
)
def test_expert_capacity_is_f_s_over_e_rounded_as_asked(
    rounding: Rounding,
    capacity_factor: float,
    num_experts: int,
    pool_tokens: int,
    capacity: int,
    tiny_config: ModelConfig,
) -> None:
    config = replace(tiny_config, capacity_rounding=rounding, capacity_factor=capacity_factor, num_experts=num_experts)
    assert config.expert_capacity(pool_tokens) == capacity


@pytest.mark.parametrize("capacity_factor", ["0.3", "0.7", "1.1", "1.25", "2", "3.9"])
@pytest.mark.parametrize("pool_tokens", [16, 48, 100, 256, 1000])
def test_floor_and_ceil_enclose_the_exact_capacity(
    capacity_factor: str, pool_tokens: int, tiny_config: ModelConfig
) -> None:
    exact = Fraction(capacity_factor) * pool_tokens / tiny_config.num_experts
    config = replace(tiny_config, capacity_factor=float(capacity_factor))
    low = replace(config, capacity_rounding="floor").expert_capacity(pool_tokens)
    near = replace(config, capacity_rounding="nearest").expert_capacity(pool_tokens)
    high = replace(config, capacity_rounding="ceil").expert_capacity(pool_tokens)
    assert exact - 1 < low <= exact <= high < exact + 1
    assert abs(near - exact) <= Fraction(1, 2)


@pytest.mark.parametrize(("pool", "group", "images"), [("image", 1, 1), ("group", 3, 3), ("batch", 1, 12)])
def test_a_routing_pool_holds_the_images_it_names(
    pool: Literal["image", "group", "batch"], group: int, images: int, tiny_config: ModelConfig
) -> None:
    assert replace(tiny_config, routing_pool=pool, routing_group=group).pool_images(12) == images


def test_tokens_are_counted_in_patches(tiny_config: ModelConfig) -> None:
    assert replace(tiny_config, latent_height=12, latent_width=8, patch_size=2).num_tokens == 24


def test_every_second_layer_is_sparse_from_the_second_on(tiny_config: ModelConfig) -> None:
    layers = range(tiny_config.num_layers)
    assert [tiny_config.is_moe_layer(layer) for layer in layers] == [False, True, False, True]
    assert not any(replace(tiny_config, ffn="dense").is_moe_layer(layer) for layer in layers)


@pytest.mark.parametrize(
    ("micro", "dp_size", "expected"), [("auto", 1, 24), ("auto", 4, 6), (2, 4, 2), (3, 8, 3), (24, 1, 24)]
)
def test_micro_batch_size_is_asked_or_what_the_ranks_leave(
    micro: int | Literal["auto"], dp_size: int, expected: int, tiny_recipe: Recipe
) -> None:
    train = replace(tiny_recipe.train, global_batch_size=24, micro_batch_size=micro)
    assert replace(tiny_recipe, train=train).micro_batch_size(dp_size) == expected


@pytest.mark.parametrize(
    ("changes", "dp_size", "said", "offered"),
    [
        ({}, 5, ["data-parallel ranks(5)", "train.global_batch_size(24)"], [1, 2, 3, 4, 6, 8, 12, 24]),
        ({}, 0, ["data-parallel ranks(0)", "train.global_batch_size(24)"], [1, 2, 3, 4, 6, 8, 12, 24]),
        ({"train.micro_batch_size": 8}, 4, ["train.global_batch_size", "24", "(8)", "(4)"], [1, 2, 3, 6]),
        (
            {"model.routing_pool": "group", "model.routing_group": 4},
            4,
            ["model.routing_group(4)", "micro_batch_size(6)"],
            [1, 2, 3, 6],
        ),
    ],
)
def test_a_batch_that_does_not_split_is_refused_with_what_does(
    changes: dict[str, Any],
    dp_size: int,
    said: list[str],
    offered: list[int],
    tiny_recipe: Recipe,
    refusal_of: RefusalOf,
) -> None:
    recipe = edited(tiny_recipe, {"train.global_batch_size": 24, **changes})
    message = refusal_of(lambda: recipe.micro_batch_size(dp_size))
    assert all(part in message for part in said), message
    assert suggestions(message) == offered


@pytest.mark.parametrize(
    ("ffn", "switch", "value"),
    [
        ("dense", "routing_pool", "batch"),
        ("dense", "num_shared_experts", 1),
        ("dense", "top_k", 1),
        ("token_choice", "router_scores", "sigmoid"),
        ("token_choice", "gate_normalization", "token"),
        ("token_choice", "router_input", "unmodulated"),
        ("token_choice", "capacity_rounding", "floor"),
        ("expert_choice", "load_balance_weight", 0.5),
        ("expert_choice", "top_k", 1),
    ],
)
def test_a_switch_that_the_kind_of_layer_does_not_read_is_refused(
    ffn: str, switch: str, value: Any, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    message = refusal_of(lambda: edited(tiny_recipe, {"model.ffn": ffn, f"model.{switch}": value}))
    assert f"model.{switch}: {value!r} has no effect with model.ffn: {ffn}" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.num_layers": 1}, "no second layer"),
        ({"optimizer.beta1": 1.0}, "optimizer.beta1: 1.0"),
        ({"optimizer.smoothing": 1.0}, "optimizer.smoothing: 1.0"),
    ],
)
def test_settings_that_could_never_learn_are_refused(
    changes: dict[str, Any], said: str, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    assert said in refusal_of(lambda: edited(tiny_recipe, changes))


@pytest.mark.parametrize("name", ["../../x", "", "a/b", "..", ".hidden"])
def test_a_name_that_is_no_folders_name_is_refused(name: str, tiny_recipe: Recipe, refusal_of: RefusalOf) -> None:
    assert refusal_of(lambda: replace(tiny_recipe, name=name)).startswith(f"name: {name!r}")


def test_changed_fields_names_every_leaf_that_differs_and_no_other(tiny_recipe: Recipe) -> None:
    new = edited(tiny_recipe, {"train.max_steps": 9, "sample.prompts": ["a red seven"], "optimizer.beta1": 0.5})
    assert changed_fields(tiny_recipe.to_dict(), new.to_dict()) == {
        "optimizer.beta1": (0.9, 0.5),
        "sample.prompts": ([], ["a red seven"]),
        "train.max_steps": (4, 9),
    }
    assert changed_fields(new.to_dict(), new.to_dict()) == {}


def test_changed_fields_sees_keys_that_only_one_side_has() -> None:
    assert changed_fields({"a": {"b": 1}, "c": 2}, {"a": {"d": 1}, "c": 2}) == {"a.b": (1, None), "a.d": (None, 1)}


def test_fields_that_may_change_on_resume_exist_and_leave_the_mathematics_alone() -> None:
    sections = {
        "model": ModelConfig,
        "data": DataConfig,
        "flow": FlowConfig,
        "optimizer": OptimizerConfig,
        "train": TrainConfig,
        "parallel": ParallelConfig,
        "sample": SampleConfig,
    }
    known = {f"{section}.{spec.name}" for section, cls in sections.items() for spec in fields(cls)}
    assert not MAY_CHANGE_ON_RESUME - known
    assert not any(key.startswith(("model.", "flow.", "optimizer.")) for key in MAY_CHANGE_ON_RESUME)
    assert {key for key in known - MAY_CHANGE_ON_RESUME if not key.startswith(("model.", "flow.", "optimizer."))} == {
        "train.seed",
        "train.global_batch_size",
        "train.precision",
        "train.mask_ratio",
        "train.reconstruction_weight",
        "data.dataset",
        "data.seed",
        "data.num_train",
        "data.weights",
        "data.encode",
        "data.vae",
        "data.text",
        "data.image_column",
        "data.caption_column",
    }, "which samples are seen, in which order, and what is learned of them"


def _numeric_fields() -> list[tuple[str, str, type]]:
    """Return (section, field, kind of its number) of every number, and list of numbers, that a recipe holds."""
    found: list[tuple[str, str, type]] = []
    for section in fields(Recipe):
        for spec in fields(section.type) if isinstance(section.type, type) and is_dataclass(section.type) else ():
            kinds = [kind for kind in (int, float) if re.search(rf"\b{kind.__name__}\b", str(spec.type))]
            found += [(section.name, spec.name, kind) for kind in kinds]
    return found


@pytest.mark.parametrize(("section", "name", "kind"), _numeric_fields())
def test_every_number_of_a_recipe_has_bounds(
    section: str, name: str, kind: type, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    """Whole numbers beyond what can be counted, and others that fp32 cannot tell from infinity or from 0."""
    cases: list[Any] = [10**13, 9007199254740993, 10**29] if kind is int else [1e30, 1e39, 1e300, 1e-40, 5e-324]
    as_list = isinstance(getattr(getattr(tiny_recipe, section), name), tuple)
    for case in cases:
        if kind is int and name == "seed":
            case = 2**63
        changes = {f"{section}.{name}": [case] if as_list else case}
        message = refusal_of(partial(edited, tiny_recipe, changes))
        assert message.startswith(f"{section}.{name}: {case} is"), message
    if kind is float and name != "max_bad":
        not_finite = [math.inf] if as_list else math.inf
        assert f"{section}.{name}" in refusal_of(lambda: edited(tiny_recipe, {f"{section}.{name}": not_finite}))


def test_every_number_is_among_those_with_bounds() -> None:
    assert len(_numeric_fields()) > 60
    assert ("model", "num_layers", int) in _numeric_fields()
    assert ("data", "weights", float) in _numeric_fields()
    assert ("train", "micro_batch_size", int) in _numeric_fields()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample.capacity_factor": 5.0}, "sample.capacity_factor: 5.0 is outside (0, num_experts=4]"),
        ({"sample.capacity_factor": 1.0, "model.ffn": "dense"}, "sample.capacity_factor: 1.0 has no effect with"),
        ({"sample.capacity_factor": 1e-9, "model.capacity_rounding": "floor"}, "is 0 tokens an expert; raise it"),
    ],
)
def test_a_capacity_for_drawing_that_the_model_cannot_use_is_refused(
    changes: dict[str, Any], said: str, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    assert said in refusal_of(lambda: edited(tiny_recipe, changes))


def test_an_image_of_more_numbers_than_any_machine_holds_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(
        ConfigError, match=r"latent_height\(1048576\) x model.latent_width\(1048576\): .* numbers an image"
    ):
        make_recipe("model.latent_height=1048576", "model.latent_width=1048576")
