"""The files that a plan is started with: recipe, DeepSpeed configuration, and the head of a Slurm script."""

import json
from pathlib import Path
from typing import Any

from ecdit_ds.config.deepspeed_json import load_deepspeed_config
from ecdit_ds.config.recipe import Recipe, changed_fields
from ecdit_ds.config.yaml_loader import dump_recipe, parse_yaml
from ecdit_ds.errors import ConfigError
from ecdit_ds.files.durable import make_folders, replace_durably
from ecdit_ds.planner.plan import Plan, with_micro_batch

FILES = ("recipe.yaml", "deepspeed.json", "header.sh", "overrides.txt")
SIGNAL_SECONDS_BEFORE_END = 300
"""Slurm may send it 60 s early; a synchronous save must fit."""
MOST_SIGNAL_SECONDS = 3600
"""Slurm takes no more than 65535, and a job that is warned hours before its end stops hours too early."""


def write_run_files(plan: Plan, named: Recipe, deepspeed_file: Path, folder: Path, *, overwrite: bool) -> None:
    """Write FILES into `folder`, so that `train.py --config recipe.yaml --deepspeed deepspeed.json` is the plan.

    A micro-batch that only the first phase has room for is told in comments: a life that goes on into the next phase
    would run out of memory with it.

    Args:
        named: the recipe that the plan began with, before flags and search; overrides.txt says what they changed.
        deepspeed_file: the configuration that the plan was made with, copied as it is.

    Raises:
        ConfigError: one of them is there and `overwrite` is false, `folder` cannot be one, or DeepSpeed's file and the
            recipe contradict each other; nothing is written then.
    """
    recipe, notes = recipe_for_all_phases(plan), "".join(f"# {note}\n" for note in phase_notes(plan))
    load_deepspeed_config(deepspeed_file, recipe, plan.topology.dp)
    texts = (
        notes + dump_recipe(recipe),
        deepspeed_file.read_text(encoding="utf-8"),
        slurm_header(plan),
        notes + overrides(named, recipe),
    )
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(f"--write {folder}: {there[0]} is there; choose another folder, or give --overwrite")
    try:
        make_folders(folder)
    except OSError as error:
        reason = "is a file" if folder.is_file() else f"cannot be made a folder ({error.strerror})"
        raise ConfigError(f"--write {folder}: {reason}; choose another name") from None
    for name, text in zip(FILES, texts, strict=True):
        replace_durably(folder / name, text.encode())


def recipe_for_all_phases(plan: Plan) -> Recipe:
    """Return the plan's recipe with the micro-batch that fits in every phase, the smallest of theirs."""
    sizes = {phase.micro_batch for phase in plan.phases}
    return plan.recipe if len(sizes) == 1 else with_micro_batch(plan.recipe, min(sizes))


def phase_notes(plan: Plan) -> list[str]:
    """Return, for each phase that has room for a larger micro-batch than the whole run, how to use it."""
    smallest, notes, at = min(phase.micro_batch for phase in plan.phases), [], 0
    for phase in plan.phases:
        if phase.micro_batch > smallest:
            notes.append(
                f"train.micro_batch_size is {smallest}, which fits in all phases; lives within steps {at} to "
                f"{at + phase.steps} ({phase.name}) may run, and resume, with --set "
                f"train.micro_batch_size={phase.micro_batch}"
            )
        at += phase.steps
    return notes


def slurm_header(plan: Plan) -> str:
    """Return the #SBATCH lines: one task a GPU, a warning signal in time for a save, and a second life after a loss."""
    machine = plan.machine
    signal_at = int(min(MOST_SIGNAL_SECONDS, SIGNAL_SECONDS_BEFORE_END + plan.checkpoint.save_seconds))
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --job-name={plan.recipe.name}",
            f"#SBATCH --nodes={machine.nodes}",
            f"#SBATCH --ntasks-per-node={machine.gpus_per_node}",
            f"#SBATCH --gpus-per-node={machine.gpus_per_node}",
            "#SBATCH --exclusive",
            f"#SBATCH --signal=USR1@{signal_at}",
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "",
        ]
    )


def overrides(named: Recipe, recipe: Recipe) -> str:
    """Return `--set key=value` lines that make `recipe` of `named`, one for each field that differs."""
    changes = changed_fields(named.to_dict(), recipe.to_dict())
    return "".join(f"--set {key}={_as_yaml(value)}\n" for key, (_, value) in changes.items())


def _as_yaml(value: Any) -> str:
    is_plain = isinstance(value, str) and value.isidentifier() and parse_yaml(value) == value
    return value if is_plain else json.dumps(value)
