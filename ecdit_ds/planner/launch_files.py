"""The files that a plan is started with: recipe, DeepSpeed configuration, and the head of a Slurm script."""

from pathlib import Path

from ecdit_ds.deepspeed_config import load_deepspeed_config
from ecdit_ds.errors import ConfigError
from ecdit_ds.planner.plan import Plan
from ecdit_ds.recipe_file import dump_recipe

FILES = ("recipe.yaml", "deepspeed.json", "header.sh", "overrides.txt")
SIGNAL_SECONDS_BEFORE_END = 300
"""Slurm may send it 60 s early; a synchronous save must fit."""


def write_launch_files(plan: Plan, deepspeed_file: Path, folder: Path, *, overwrite: bool) -> None:
    """Write FILES into `folder`, so that `train.py --config recipe.yaml --deepspeed deepspeed.json` is the plan.

    Args:
        deepspeed_file: the configuration that the plan was made with, copied as it is.

    Raises:
        ConfigError: one of them is there and `overwrite` is false.
    """
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(f"--write {folder}: {there[0]} is there; choose another folder, or give --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    texts = (dump_recipe(plan.recipe), deepspeed_file.read_text(encoding="utf-8"), slurm_header(plan), overrides(plan))
    for name, text in zip(FILES, texts, strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    load_deepspeed_config(folder / "deepspeed.json", plan.recipe, plan.topology.dp)


def slurm_header(plan: Plan) -> str:
    """Return the #SBATCH lines: one task a GPU, a warning signal in time for a save, and a second life after a loss."""
    machine = plan.machine
    signal_at = int(SIGNAL_SECONDS_BEFORE_END + plan.checkpoint.save_seconds)
    return "\n".join([
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
    ])  # fmt: skip


def overrides(plan: Plan) -> str:
    """Return the plan as `--set` lines for the recipe's own name, and what changes between phases."""
    train, parallel = plan.recipe.train, plan.recipe.parallel
    lines = [
        f"--set parallel.tp={parallel.tp}",
        f"--set parallel.ep={parallel.ep}",
        f"--set train.micro_batch_size={train.micro_batch_size}",
        f"--set train.recompute={train.recompute}",
        f"--set train.recompute_every={train.recompute_every}",
    ]
    at = 0
    for phase in plan.phases:
        if phase.micro_batch != plan.phases[0].micro_batch:
            lines.append(f"# from step {at} on, resume with: --set train.micro_batch_size={phase.micro_batch}")
        at += phase.steps
    return "\n".join([*lines, ""])
