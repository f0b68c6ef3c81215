"""What a folder of DeepSpeed's own does not say about the model in it, and a recipe does."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A recipe and its model's parameters."""

    recipe: Recipe
    shapes: Mapping[str, tuple[int, ...]]
    """Parameter -> global shape."""
    cut_axes: Callable[[str], dict[str, int]]
    """Parameter -> which axis tensor and expert parallelism cut: {"tp": axis, "ep": axis}."""

    def progress(self, num_updates: int, skipped_steps: int) -> tuple[int, dict[str, Any]]:
        """Return step and meta of a checkpoint after so many updates; every step took a global batch."""
        step = num_updates + skipped_steps
        samples_seen = step * self.recipe.train.global_batch_size
        return step, {
            "recipe": self.recipe.to_dict(),
            "samples_seen": samples_seen,
            "num_updates": num_updates,
        }

    def check_complete(self, parameters: Iterable[str], where: Path) -> None:
        """Refuse a checkpoint that lacks a parameter of the model."""
        if lacking := sorted(self.shapes.keys() - set(parameters)):
            raise CheckpointError(
                f"{where}: has no {lacking[0]}, which the recipe's model has; give --config the right recipe"
            )

    def shape(self, name: str, numel: int, where: Path) -> tuple[int, ...]:
        """Return the shape of tensor `kind/parameter`, of which `numel` numbers were found.

        Raises:
            CheckpointError: the model has no such parameter, or one of another size.
        """
        parameter = name.split("/", 1)[1]
        shape = self.shapes.get(parameter)
        if shape is None:
            raise CheckpointError(f"{where}: {parameter} is not in the recipe's model; give --config the right recipe")
        if torch.Size(shape).numel() != numel:
            raise CheckpointError(
                f"{where}: {parameter} has {numel} numbers, the recipe's model {list(shape)}; give --config the right "
                "recipe"
            )
        return shape
