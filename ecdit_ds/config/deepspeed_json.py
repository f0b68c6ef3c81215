"""The DeepSpeed JSON: mechanics from the file, facts from the recipe.

A fact that both could state (batch sizes, clipping, precision) has its home in the recipe; the file says "auto" or
nothing. A literal that differs is an error that names both places.
"""

import difflib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import ConfigError, shown

DEFAULT_PATH = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2.json"
_STAGES = (1, 2, 3)
_FACTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_CLOSED = "DeepSpeed would tell it in a log that is closed here"
_FIXED_KEYS: dict[str, tuple[Any, str]] = {
    "zero_allow_untested_optimizer": (True, "the recipe's optimizers are allowed, whatever stands here"),
    "steps_per_print": (1_000_000_000, f"{_CLOSED}; train.log_every says how often a run reports"),
    "dump_state": (False, f"{_CLOSED}; train.py --print-config tells what is trained"),
    "comms_logger": (
        {"enabled": False},
        "nobody asks DeepSpeed for this table, and all-to-alls of experts would not be in it; tools/plan.py tells the "
        "traffic, and tools/bench.py dispatch counts it",
    ),
}
"""Keys without an effect here: the one value that is accepted, and why any other would promise what does not happen."""
PROFILE_NAME = "flops_profile.txt"
"""The one file that DeepSpeed writes by a name of its JSON, in the run's folder: nobody's file chooses another."""
_PROFILER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "enabled": (lambda value: type(value) is bool, "true or false"),
    "profile_step": (lambda value: type(value) is int and value >= 0, "a whole number from 0 on"),
    "recompute_fwd_factor": (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number from 0 on"),
    "module_depth": (lambda value: type(value) is int and value >= -1, "a whole number from 0 on, or -1 for all"),
    "top_modules": (lambda value: type(value) is int and value >= 1, "a positive whole number"),
    "detailed": (lambda value: type(value) is bool, "true or false"),
    "output_file": (
        lambda value: value in (None, PROFILE_NAME),
        f"null or {PROFILE_NAME}, which is written in --output",
    ),
}
"""Keys of flops_profiler, which values each takes, and those in words."""
_KEYS = frozenset({*_FACTS, *_FIXED_KEYS, "bf16", "zero_optimization", "wall_clock_breakdown", "flops_profiler"})
_INSTEAD = {
    "activation_checkpointing": "train.recompute says what is computed again",
    "memory_breakdown": "metrics.jsonl has memory_bytes, and --dry-run counts them by kind",
} | dict.fromkeys(
    ("tensorboard", "wandb", "csv_monitor", "comet"),
    "a run's folder has every number, in metrics.jsonl and tensorboard/",
)
"""What does here what some other keys of DeepSpeed would."""
_ZERO_FLAGS = ("contiguous_gradients", "reduce_scatter", "overlap_comm", "round_robin_gradients")
_FIXED_FLAGS = {
    "contiguous_gradients": (True, "DeepSpeed needs it for experts"),
    "reduce_scatter": (True, "DeepSpeed needs it for experts"),
    "round_robin_gradients": (False, "DeepSpeed 0.19.8 then tells wrong places, and checkpoints mix weights up"),
}
"""Flags with one value that works, and why."""
_ZERO_1_AND_2_SIZES = ("reduce_bucket_size", "allgather_bucket_size")
_ZERO_3_SIZES = (
    "reduce_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
_MOST_ELEMENTS = 10**15
"""DeepSpeed 0.19.8 reads sizes as 64-bit whole numbers."""
_MOST_IN_BUCKET = 2**31 - 1
"""Buckets are made as large as they are asked for."""
_ALIGNMENT = {"allgather_bucket_size": 2}
"""What DeepSpeed 0.19.8 asks sizes to be multiples of."""


def with_profile_in(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the profile's file in a run's folder."""
    profiler = config.get("flops_profiler", {})
    if not profiler.get("output_file"):
        return config
    return config | {"flops_profiler": profiler | {"output_file": str(folder / PROFILE_NAME)}}


def load_deepspeed_config(path: Path, recipe: Recipe, dp_size: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, with the recipe's facts filled in.

    Raises:
        ConfigError: naming the file, the key and, where two places disagree, both values.
    """
    config = _read_json(path)
    for key in config:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS - _FIXED_KEYS.keys(), n=1)
            instead = f"{_INSTEAD.get(key, 'the recipe decides such things')}: delete it"
            mend = f"did you mean {near[0]}? if not, delete it" if near and key not in _INSTEAD else instead
            raise ConfigError(f"{path}: {key}: is not used here; {mend}")
    _check_values(path, config, recipe.train.max_steps)
    _check_zero(path, config.get("zero_optimization", {}))
    if config["zero_optimization"]["stage"] == 3 and recipe.model.ffn == "token_choice":
        raise ConfigError(
            f"{path}: zero_optimization.stage: 3 with model.ffn: token_choice: DeepSpeed's own layer does not train "
            "under ZeRO-3; use stage 1 or 2"
        )

    micro = recipe.micro_batch_size(dp_size)
    facts = {
        "train_batch_size": (recipe.train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "train.micro_batch_size"),
        "gradient_accumulation_steps": (
            recipe.train.global_batch_size // (micro * dp_size),
            "train.global_batch_size / (train.micro_batch_size * data-parallel ranks)",
        ),
        "gradient_clipping": (recipe.optimizer.gradient_clipping, "optimizer.gradient_clipping"),
    }
    for key, (value, home) in facts.items():
        given = config.get(key, "auto")
        if type(given) is bool or given not in ("auto", value):
            raise ConfigError(f'{path}: {key}: {given!r} differs from the recipe\'s {home}: {value}; write "auto"')
        config[key] = value
    bf16 = config.setdefault("bf16", {"enabled": "auto"})
    if not isinstance(bf16, dict) or bf16.keys() - {"enabled"}:
        raise ConfigError(f'{path}: bf16: {bf16!r} is not what is read here; write {{"enabled": "auto"}}')
    wants_bf16 = recipe.train.precision == "bf16"
    if bf16.get("enabled", "auto") not in ("auto", wants_bf16):
        raise ConfigError(
            f"{path}: bf16.enabled: {bf16['enabled']!r} differs from the recipe's train.precision: "
            f'{recipe.train.precision}; write "auto"'
        )
    bf16["enabled"] = wants_bf16
    return config


def _check_values(path: Path, config: dict[str, Any], max_steps: int) -> None:
    if type(config.get("wall_clock_breakdown", False)) is not bool:
        raise ConfigError(f"{path}: wall_clock_breakdown: {config['wall_clock_breakdown']!r} is neither true nor false")
    for key, (fixed, why) in _FIXED_KEYS.items():
        given = config.get(key, fixed)
        if json.dumps(given) != json.dumps(fixed):  # unlike ==, tells 0 from false, also within sections
            raise ConfigError(f"{path}: {key}: {given!r} has no effect: {why}; delete it")
    if "flops_profiler" in config:
        _check_profiler(path, config["flops_profiler"], max_steps)


def _check_profiler(path: Path, profiler: Any, max_steps: int) -> None:
    key = f"{path}: flops_profiler"
    if not isinstance(profiler, dict):
        raise ConfigError(f"{key}: {profiler!r} is not a section; write {{...}}")
    for name, value in profiler.items():
        if name not in _PROFILER:
            raise ConfigError(f"{key}.{name}: is not known; keys are {', '.join(_PROFILER)}")
        is_right, wanted = _PROFILER[name]
        if not is_right(value):
            raise ConfigError(f"{key}.{name}: {value!r} is not {wanted}")
    if "enabled" not in profiler:
        raise ConfigError(f'{key}: has no effect without "enabled": true; add it, or delete the section')
    step = profiler.get("profile_step", 1)
    if profiler["enabled"] and step >= max_steps:
        raise ConfigError(
            f"{key}.profile_step: {step} never comes: it counts from 0 in each life of a run, and train.max_steps is "
            f"{max_steps}; choose 0 to {max_steps - 1}"
        )


def _check_zero(path: Path, zero: Any) -> None:
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in _STAGES:
        raise ConfigError(
            f"{path}: zero_optimization.stage: {stage!r}; choose 1, 2 or 3 (without ZeRO, DeepSpeed averages the "
            "gradient norms of different experts, and clipping goes wrong)"
        )
    sizes = _ZERO_3_SIZES if stage == 3 else _ZERO_1_AND_2_SIZES
    for key, value in zero.items():
        if key in _ZERO_FLAGS and type(value) is not bool:
            raise ConfigError(f"{path}: zero_optimization.{key}: {value!r} is neither true nor false")
        if key in _FIXED_FLAGS and value is not _FIXED_FLAGS[key][0]:
            fixed, why = _FIXED_FLAGS[key]
            raise ConfigError(f"{path}: zero_optimization.{key}: {value!r}; write {str(fixed).lower()}: {why}")
        if key in sizes:
            _check_size(f"{path}: zero_optimization.{key}", key, value)
        if key not in ("stage", "offload_optimizer", *_ZERO_FLAGS, *sizes):
            raise ConfigError(
                f"{path}: zero_optimization.{key}: is not supported with stage {stage}; keys are stage, "
                f"offload_optimizer, {', '.join(_ZERO_FLAGS + sizes)}"
            )
    if "offload_optimizer" in zero:
        _check_offload(path, zero["offload_optimizer"])


def _check_size(where: str, key: str, value: Any) -> None:
    most, unit = _MOST_IN_BUCKET if "bucket" in key else _MOST_ELEMENTS, _ALIGNMENT.get(key, 1)
    if not (type(value) in (int, float) and unit <= value <= most and value % unit == 0):
        multiple = f", a multiple of {unit}" if unit > 1 else ""
        raise ConfigError(
            f"{where}: {shown(value)} is not a positive number of whole elements; choose {unit} to {most}{multiple}"
        )


def _check_offload(path: Path, offload: Any) -> None:
    is_section = isinstance(offload, dict) and offload.keys() <= {"device", "pin_memory"}
    if not is_section or offload.get("device") != "cpu" or type(offload.get("pin_memory", True)) is not bool:
        raise ConfigError(
            f'{path}: zero_optimization.offload_optimizer: {offload!r}; write {{"device": "cpu"}}, with '
            '"pin_memory" true or false if you like'
        )


def _read_json(path: Path) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"{path}: {twice}: is given twice; keep one")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_duplicates)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ConfigError(f"--deepspeed {path}: {reason}; configurations are in ds_configs/") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
        raise ConfigError(f"--deepspeed {path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {path}: holds {type(config).__name__}, not an object")
    return config
