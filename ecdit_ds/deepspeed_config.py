"""The DeepSpeed JSON: mechanics from the file, facts from the recipe.

A fact that both could state (batch sizes, clipping, precision) has its home in the recipe; the file says "auto" or
nothing. A literal that differs is an error that names both places.
"""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from ecdit_ds.config import Recipe
from ecdit_ds.errors import ConfigError

DEFAULT_PATH = Path(__file__).resolve().parents[1] / "ds_configs" / "zero2.json"
_STAGES = (1, 2, 3)
_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "zero_optimization", "zero_allow_untested_optimizer", "steps_per_print", "wall_clock_breakdown", "dump_state",
    "comms_logger", "flops_profiler",
})  # fmt: skip
_SWITCHES = ("zero_allow_untested_optimizer", "wall_clock_breakdown", "dump_state")
_SECTIONS = ("comms_logger", "flops_profiler")
_ZERO_FLAGS = ("contiguous_gradients", "reduce_scatter", "overlap_comm", "round_robin_gradients")
_FIXED_FLAGS = {
    "contiguous_gradients": (True, "DeepSpeed needs it for experts"),
    "reduce_scatter": (True, "DeepSpeed needs it for experts"),
    "round_robin_gradients": (False, "DeepSpeed 0.19.8 then tells wrong places, and checkpoints mix weights up"),
}
"""Flags with one value that works, and why."""
_ZERO_SIZES = ("reduce_bucket_size", "allgather_bucket_size")
_ZERO_3_SIZES = (
    "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size", "sub_group_size",
)  # fmt: skip


def load_deepspeed_config(path: Path, recipe: Recipe, dp_size: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, with the recipe's facts filled in.

    Raises:
        ConfigError: naming the file, the key and, where two places disagree, both values.
    """
    config = _read_json(path)
    for key in config:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{path}: {key}: is not used here; {hint}the recipe decides such things: delete it")
    _check_values(path, config)
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
        if given not in ("auto", value):
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


def _check_values(path: Path, config: dict[str, Any]) -> None:
    for key in _SWITCHES:
        if key in config and type(config[key]) is not bool:
            raise ConfigError(f"{path}: {key}: {config[key]!r} is neither true nor false")
    for key in _SECTIONS:
        if key in config and not isinstance(config[key], dict):
            raise ConfigError(f"{path}: {key}: {config[key]!r} is not a section; write {{...}}")
    steps = config.get("steps_per_print", 1)
    if type(steps) is not int or steps < 1:
        raise ConfigError(f"{path}: steps_per_print: {steps!r} is not a positive whole number")


def _check_zero(path: Path, zero: Any) -> None:
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in _STAGES:
        raise ConfigError(
            f"{path}: zero_optimization.stage: {stage!r}; choose 1, 2 or 3 (without ZeRO, DeepSpeed averages the "
            "gradient norms of different experts, and clipping goes wrong)"
        )
    sizes = _ZERO_SIZES + (_ZERO_3_SIZES if stage == 3 else ())
    for key, value in zero.items():
        if key in _ZERO_FLAGS and type(value) is not bool:
            raise ConfigError(f"{path}: zero_optimization.{key}: {value!r} is neither true nor false")
        if key in _FIXED_FLAGS and value is not _FIXED_FLAGS[key][0]:
            fixed, why = _FIXED_FLAGS[key]
            raise ConfigError(f"{path}: zero_optimization.{key}: {value!r}; write {str(fixed).lower()}: {why}")
        if key in sizes and not (type(value) in (int, float) and 1 <= value < math.inf):
            raise ConfigError(f"{path}: zero_optimization.{key}: {value!r} is not a positive number")
        if key not in ("stage", "offload_optimizer", *_ZERO_FLAGS, *sizes):
            raise ConfigError(
                f"{path}: zero_optimization.{key}: is not supported with stage {stage}; keys are stage, "
                f"offload_optimizer, {', '.join(_ZERO_FLAGS + sizes)}"
            )
    if "offload_optimizer" in zero:
        _check_offload(path, zero["offload_optimizer"])


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
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"--deepspeed {path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {path}: holds {type(config).__name__}, not an object")
    return config
