"""What the converter opens, and hands in besides files: facts of a recipe's model, how a dense one gets experts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ecdit_ds.checkpoint.convert.formats import deepspeed_folder, lacks_recipe, open_deepspeed
from ecdit_ds.checkpoint.convert.model_spec import ModelFacts
from ecdit_ds.checkpoint.convert.sources import INDEX_NAME, CheckpointSource, open_checkpoint_source
from ecdit_ds.checkpoint.convert.upcycle import UpcycledSource, UpcycleSpec
from ecdit_ds.checkpoint.file_ranges import reading
from ecdit_ds.checkpoint.naming import MANIFEST_NAME, list_checkpoints
from ecdit_ds.config.recipe import STATE_NAMES, Recipe
from ecdit_ds.config.yaml_loader import load_recipe, recipe_from_dict
from ecdit_ds.errors import CheckpointError, ConfigError
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.init import initialize_parameter
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.parallel.partition_rules import sharded_axes


def model_facts(name_or_path: str, overrides: Sequence[str]) -> ModelFacts:
    """Return what a folder of DeepSpeed's does not say, from the recipe that was trained."""
    recipe = load_recipe(name_or_path, overrides)
    return ModelFacts(recipe=recipe, shapes=parameter_shapes(recipe), cut_axes=sharded_axes)


def upcycled(source: CheckpointSource, name_or_path: str, overrides: Sequence[str]) -> UpcycledSource:
    """Return a dense checkpoint as one of the recipe's model of experts."""
    recipe = load_recipe(name_or_path, overrides)

    def initial(parameter: str, shape: tuple[int, ...]) -> Tensor:
        weight = torch.empty(shape)
        initialize_parameter(parameter, torch.nn.Parameter(weight), recipe.train.seed)
        return weight

    upcycling = UpcycleSpec(
        recipe=recipe, shapes=parameter_shapes(recipe), state_names=STATE_NAMES[recipe.optimizer.name], initial=initial
    )
    return UpcycledSource(source, upcycling)


def open_checkpoint(path: Path, facts: ModelFacts | None) -> tuple[Path, CheckpointSource]:
    """Open a checkpoint's folder, or the newest of a run's; return the folder with it."""
    if facts is not None and not lacks_recipe(path):
        raise ConfigError(f"--config: {path} is no folder of DeepSpeed's own and has its recipe; leave the flag away")
    if folder := deepspeed_folder(path):
        return folder, open_deepspeed(folder, facts)
    with reading(path):
        if (path / MANIFEST_NAME).exists() or (path / INDEX_NAME).exists():
            return path, open_checkpoint_source(path)
    for root in (path / "checkpoints", path):
        if found := list_checkpoints(root):
            return found[0], open_checkpoint_source(found[0])
    raise CheckpointError(f"{path}: is neither a checkpoint nor a run with checkpoints")


def recipe_of(source: CheckpointSource) -> Recipe:
    """Return the recipe that a checkpoint holds; whoever wrote it, of no more layers than it has tensors."""
    with _told_of_recipe():
        recipe = recipe_from_dict(source.meta["recipe"])
        if recipe.model.num_layers > len(source.tensors):
            raise ConfigError(f"model.num_layers: {recipe.model.num_layers}, with {len(source.tensors)} tensors")
        return recipe


def expected_of(source: CheckpointSource) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Return what a checkpoint must hold by its own recipe: parameters with shapes, and what the optimizer keeps."""
    recipe = recipe_of(source)
    with _told_of_recipe():
        return parameter_shapes(recipe), STATE_NAMES[recipe.optimizer.name]


@contextmanager
def _told_of_recipe() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, ConfigError) as error:
        raise CheckpointError(
            f"its recipe cannot be read, so its tensors cannot be compared with it: {error}"
        ) from None


def parameter_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return every parameter of the recipe's model with its global shape; makes no numbers."""
    with torch.device("meta"):
        model = ECDiT(recipe.model, serial_layers())
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
