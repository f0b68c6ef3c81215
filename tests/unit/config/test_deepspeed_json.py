"""The DeepSpeed JSON: what it may say, what is filled in, and how a contradiction is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ecdit_ds.config.deepspeed_json import DEFAULT_PATH, load_deepspeed_config
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import ConfigError

Load = Callable[..., dict[str, Any]]
RefusalOf = Callable[[Callable[[], object]], str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where `load` writes."""
    return tmp_path / "mine.json"


@pytest.fixture
def load(path: Path, make_recipe: Callable[..., Recipe]) -> Load:
    """Return `load(text or changes, *recipe overrides)`: a working ZeRO-2 file, changed, read for two ranks."""

    def load_changed(content: str | bytes | dict[str, Any], *overrides: str) -> dict[str, Any]:
        if isinstance(content, dict):
            content = json.dumps({"zero_optimization": {"stage": 2}} | content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_deepspeed_config(path, make_recipe(*overrides), dp_size=2)

    return load_changed


@pytest.mark.parametrize("content", [{}, {"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {}}])
def test_what_is_auto_or_absent_is_filled_from_the_recipe(load: Load, content: dict[str, Any]) -> None:
    config = load(content, "train.micro_batch_size=2", "optimizer.gradient_clipping=0.5")
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": False}


def test_a_value_that_agrees_with_the_recipe_is_accepted(load: Load) -> None:
    agreed = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    assert load(agreed).items() >= agreed.items()


def test_what_is_deepspeeds_alone_is_left_as_it_is(load: Load) -> None:
    zero = {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": True}
    profiler = {"enabled": True, "profile_step": 3}
    config = load({"zero_optimization": zero, "wall_clock_breakdown": True, "flops_profiler": profiler})
    assert config["zero_optimization"] == zero
    assert config["wall_clock_breakdown"] is True
    assert config["flops_profiler"] == profiler


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("dump_state", True, "--print-config"),
        ("comms_logger", {"enabled": True}, "tools/plan.py"),
        ("comms_logger", {"enabled": False, "verbose": True}, "tools/plan.py"),
        ("steps_per_print", 7, "train.log_every"),
        ("zero_allow_untested_optimizer", False, "delete it"),
    ],
)
def test_a_key_without_an_effect_is_refused_with_what_to_use(
    load: Load, refusal_of: RefusalOf, path: Path, key: str, value: Any, way_out: str
) -> None:
    message = refusal_of(lambda: load({key: value}))
    assert message.startswith(f"{path}: {key}: {value!r} has no effect: ") and way_out in message


def test_a_file_that_only_says_what_holds_anyway_still_works(load: Load) -> None:
    load(
        {
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1000000000,
            "dump_state": False,
            "comms_logger": {"enabled": False},
            "flops_profiler": {"enabled": False, "profile_step": 99},
        }
    )


@pytest.mark.parametrize(
    ("profiler", "said"),
    [
        ({"enabled": 1}, ".enabled: 1 is not true or false"),
        ({"enabled": True, "profile_step": -1}, ".profile_step: -1 is not"),
        ({"enabled": True, "profile_step": 4}, ".profile_step: 4 never comes"),
        ({"enabled": True, "module_depth": "all"}, ".module_depth: 'all' is not"),
        ({"enabled": True, "recompute_fwd_factor": math.nan}, ".recompute_fwd_factor: nan is not"),
        ({"enabled": True, "top_modules": 0}, ".top_modules: 0 is not"),
        ({"enabled": True, "output_file": ""}, ".output_file: '' is not"),
        ({"enabled": True, "output_file": "/tmp/x"}, ".output_file: '/tmp/x' is not null or flops_profile.txt"),
        ({"enabled": True, "output_file": "../recipe.yaml"}, ".output_file: '../recipe.yaml' is not null"),
        ({"enabled": True, "output_file": ["a"]}, ".output_file: ['a'] is not null"),
        ({"enabled": True, "detail": True}, ".detail: is not known; keys are enabled"),
        ({"profile_step": 1}, 'has no effect without "enabled": true'),
    ],
)
def test_a_profile_that_would_not_be_made_is_refused(
    load: Load, refusal_of: RefusalOf, path: Path, profiler: dict[str, Any], said: str
) -> None:
    message = refusal_of(lambda: load({"flops_profiler": profiler}))
    assert message.startswith(f"{path}: flops_profiler") and said in message


@pytest.mark.parametrize(
    ("key", "way_out"),
    [
        ("activation_checkpointing", "train.recompute"),
        ("memory_breakdown", "memory_bytes"),
        ("tensorboard", "metrics.jsonl"),
        ("wandb", "metrics.jsonl"),
        ("csv_monitor", "metrics.jsonl"),
    ],
)
def test_what_is_done_here_in_another_way_is_refused_with_that_way(
    load: Load, refusal_of: RefusalOf, path: Path, key: str, way_out: str
) -> None:
    message = refusal_of(lambda: load({key: {"enabled": True}}))
    assert message.startswith(f"{path}: {key}: is not used here; ") and way_out in message


@pytest.mark.parametrize(("precision", "enabled"), [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("given", [None, "auto"])
def test_bf16_follows_the_recipes_precision(load: Load, precision: str, enabled: bool, given: str | None) -> None:
    section = {} if given is None else {"bf16": {"enabled": given}}
    assert load(section, f"train.precision={precision}")["bf16"] == {"enabled": enabled}
    assert load({"bf16": {"enabled": enabled}}, f"train.precision={precision}")["bf16"] == {"enabled": enabled}


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": True}, "stage: True"),
        ({"stage": 2, "reduce_bucket_size": "abc"}, "reduce_bucket_size: 'abc'"),
        ({"stage": 2, "overlap_comm": 1}, "overlap_comm: 1"),
        ({"stage": 2, "round_robin_gradients": True}, "write false: DeepSpeed 0.19.8 then tells wrong places"),
        ({"stage": 2, "contiguous_gradients": False}, "write true: DeepSpeed needs it for experts"),
        ({"stage": 3, "reduce_scatter": False}, "write true"),
        ({"stage": 2, "reduce_bucket_size": math.nan}, "is not a positive number"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": 1}}, "true or false"),
        ({"stage": 2, "nonsense": 3}, "nonsense: is not supported"),
        ({"stage": 2, "cpu_offload": True}, "offload_optimizer"),
        ({"stage": 2, "stage3_max_live_parameters": 5}, "is not supported with stage 2"),
        ({"stage": 3, "allgather_bucket_size": 5}, "allgather_bucket_size: is not supported with stage 3"),
        ({"stage": 2, "reduce_bucket_size": 1e300}, "whole elements; choose 1 to 2147483647"),
        ({"stage": 2, "reduce_bucket_size": 2**31}, "choose 1 to 2147483647"),
        ({"stage": 2, "allgather_bucket_size": 1}, "1 is not a positive number of whole elements; choose 2 to"),
        ({"stage": 1, "allgather_bucket_size": 200000001}, "choose 2 to 2147483647, a multiple of 2"),
        ({"stage": 3, "stage3_prefetch_bucket_size": 1e10}, "choose 1 to 2147483647"),
        *(
            (
                {"stage": 3, size: value},
                f"{size}: {value} is not a positive number of whole elements; choose 1 to 10000",
            )
            for size in (
                "sub_group_size",
                "stage3_param_persistence_threshold",
                "stage3_max_live_parameters",
                "stage3_max_reuse_distance",
            )
            for value in (1e300, 9223372036854775808)
        ),
        ({"stage": 2, "reduce_bucket_size": 1.5}, "reduce_bucket_size: 1.5 is not a positive number"),
        ({"stage": 3, "stage3_max_live_parameters": 0}, "stage3_max_live_parameters: 0 is not a positive number"),
    ],
)
def test_a_setting_of_zero_that_would_not_work_is_refused_here_and_not_by_a_traceback(
    load: Load, refusal_of: RefusalOf, path: Path, zero: dict[str, Any], said: str
) -> None:
    message = refusal_of(lambda: load({"zero_optimization": zero}))
    assert message.startswith(f"{path}: zero_optimization.")
    assert said in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("wall_clock_breakdown", "x"),
        ("dump_state", 1),
        ("zero_allow_untested_optimizer", "x"),
        ("comms_logger", 3),
        ("flops_profiler", [3]),
        ("steps_per_print", "x"),
        ("steps_per_print", 0),
        ("bf16", {"enabled": "auto", "x": 1}),
    ],
)
def test_a_value_that_deepspeed_would_stumble_over_is_refused(
    load: Load, refusal_of: RefusalOf, path: Path, key: str, value: Any
) -> None:
    assert refusal_of(lambda: load({key: value})).startswith(f"{path}: {key}: ")


@pytest.mark.parametrize(
    "key",
    ["optimizer", "scheduler", "fp16", "amp", "tensor_parallel", "checkpoint", "torch_autocast", "traon_batch_size"],
)
def test_a_section_that_the_recipe_replaces_is_refused(load: Load, refusal_of: RefusalOf, path: Path, key: str) -> None:
    message = refusal_of(lambda: load({key: {}}))
    assert message.startswith(f"{path}: {key}: ")
    assert "delete" in message


@pytest.mark.parametrize(
    "zero", [{}, {"stage": 0}, {"stage": 4}, {"stage": "2"}, {"stage": None}, {"stage": [2]}, 2, None, "auto"]
)
def test_any_other_stage_than_1_to_3_is_refused(load: Load, refusal_of: RefusalOf, path: Path, zero: Any) -> None:
    message = refusal_of(lambda: load({"zero_optimization": zero}))
    assert message.startswith(f"{path}: zero_optimization.stage: ")
    assert repr(zero.get("stage") if isinstance(zero, dict) else None) in message
    assert "1, 2 or 3" in message


def test_a_file_without_zero_is_refused(load: Load, refusal_of: RefusalOf, path: Path) -> None:
    assert f"{path}: zero_optimization.stage: " in refusal_of(lambda: load("{}"))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [{"device": "cpu"}, {"device": "cpu", "pin_memory": True}])
def test_the_optimizer_may_live_on_the_host(load: Load, stage: int, offload: dict[str, Any]) -> None:
    zero = {"stage": stage, "offload_optimizer": offload}
    assert load({"zero_optimization": zero})["zero_optimization"] == zero


@pytest.mark.parametrize(
    ("key", "offload"),
    [
        ("offload_optimizer", {"device": "nvme"}),
        ("offload_optimizer", {"device": "cpu", "ratio": 0.5}),
        ("offload_param", {"device": "cpu"}),
    ],
)
def test_any_other_offloading_is_refused(
    load: Load, refusal_of: RefusalOf, path: Path, key: str, offload: dict[str, Any]
) -> None:
    message = refusal_of(lambda: load({"zero_optimization": {"stage": 2, key: offload}}))
    assert message.startswith(f"{path}: zero_optimization.{key}: ")


def test_token_choice_is_refused_under_zero_3(load: Load, refusal_of: RefusalOf, path: Path) -> None:
    message = refusal_of(lambda: load({"zero_optimization": {"stage": 3}}, "model.ffn=token_choice"))
    assert message.startswith(f"{path}: zero_optimization.stage: 3 with model.ffn: token_choice")


@pytest.mark.parametrize(
    ("content", "key", "home", "given", "recipes"),
    [
        ({"train_batch_size": 16}, "train_batch_size", "train.global_batch_size", "16", "8"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu", "train.micro_batch_size", "3", "4"),
        ({"gradient_accumulation_steps": 5}, "gradient_accumulation_steps", "train.global_batch_size", "5", "1"),
        ({"gradient_clipping": 0.25}, "gradient_clipping", "optimizer.gradient_clipping", "0.25", "1.0"),
        ({"gradient_clipping": None}, "gradient_clipping", "optimizer.gradient_clipping", "None", "1.0"),
        ({"train_batch_size": "many"}, "train_batch_size", "train.global_batch_size", "'many'", "8"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "train.precision", "True", "fp32"),
    ],
)
def test_a_contradiction_names_both_places_and_both_values(
    load: Load,
    refusal_of: RefusalOf,
    path: Path,
    content: dict[str, Any],
    key: str,
    home: str,
    given: str,
    recipes: str,
) -> None:
    message = refusal_of(lambda: load(content))
    assert message.startswith(f"{path}: {key}: {given} differs from the recipe's {home}")
    assert f": {recipes}; " in message
    assert '"auto"' in message


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"bf16": True}, "bf16"),
        ({"bf16": None}, "bf16"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer"),
        ({"zero_optimization": {"stage": 2, "offload_param": ["cpu"]}}, "zero_optimization.offload_param"),
    ],
)
def test_a_value_where_a_section_belongs_is_refused(
    load: Load, refusal_of: RefusalOf, path: Path, content: dict[str, Any], key: str
) -> None:
    assert refusal_of(lambda: load(content)).startswith(f"{path}: {key}")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"gradient_clipping": 1.0, "gradient_clipping": 1.0}', "gradient_clipping"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage"),
    ],
)
def test_a_key_given_twice_is_refused(load: Load, refusal_of: RefusalOf, path: Path, text: str, key: str) -> None:
    message = refusal_of(lambda: load(text))
    assert message.startswith(f"{path}: {key}: is given twice")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{'stage': 2}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"zero_optimization": ', "not valid JSON"),
        (b"[1, 2]", "holds list, not an object"),
        (b"3", "holds int, not an object"),
        (b"\xff\xfe{}", "is not text"),
    ],
)
def test_a_file_that_holds_no_json_object_is_refused(
    load: Load, refusal_of: RefusalOf, path: Path, content: bytes, reason: str
) -> None:
    message = refusal_of(lambda: load(content))
    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize(("name", "reason"), [("nowhere.json", "No such file"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named_with_where_to_look(
    tiny_recipe: Recipe, refusal_of: RefusalOf, tmp_path: Path, name: str, reason: str
) -> None:
    missing = tmp_path / name
    message = refusal_of(lambda: load_deepspeed_config(missing, tiny_recipe, dp_size=1))
    assert message.startswith(f"--deepspeed {missing}: {reason}")
    assert "ds_configs/" in message


def test_a_batch_that_does_not_split_over_the_ranks_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match=r"ranks\(3\).*global_batch_size\(8\)"):
        load_deepspeed_config(DEFAULT_PATH, make_recipe(), dp_size=3)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"comms_logger": {"enabled": 0}}, "comms_logger: {'enabled': 0} has no effect"),
        ({"gradient_clipping": True}, "gradient_clipping: True differs"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps: True differs"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization? if not, delete it"),
        ({"comms_loger": {}}, "is not used here; the recipe decides such things: delete it"),
    ],
)
def test_values_of_other_types_folders_and_typos_are_refused_without_a_second_error_to_come(
    tmp_path: Path, make_recipe: Callable[..., Recipe], section: dict[str, object], told: str
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | section))
    with pytest.raises(ConfigError) as refused:
        load_deepspeed_config(path, make_recipe(), 1)
    assert told in str(refused.value)
