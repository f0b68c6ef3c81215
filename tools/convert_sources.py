"""What the converter hands in besides files: facts of a recipe's model, and how a dense one gets experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecdit_ds.checkpoint.derived import UpcycledSource, Upcycling
from ecdit_ds.checkpoint.model_facts import ModelFacts
from ecdit_ds.checkpoint.sources import Source
from ecdit_ds.config import Recipe
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.init import initialize_parameter
from ecdit_ds.optim import STATE_NAMES
from ecdit_ds.parallel.layers import SerialLayers
from ecdit_ds.parallel.sharding import cut_axes
from ecdit_ds.recipe_file import load_recipe


def model_facts(name_or_path: str, overrides: Sequence[str]) -> ModelFacts:
    """Return what a folder of DeepSpeed's does not say, from the recipe that was trained."""
    recipe = load_recipe(name_or_path, overrides)
    return ModelFacts(recipe=recipe, shapes=parameter_shapes(recipe), cut_axes=cut_axes)


def upcycled(source: Source, name_or_path: str, overrides: Sequence[str]) -> UpcycledSource:
    """Return a dense checkpoint as one of the recipe's model of experts."""
    recipe = load_recipe(name_or_path, overrides)

    def initial(parameter: str, shape: tuple[int, ...]) -> Tensor:
        weight = torch.empty(shape)
        initialize_parameter(parameter, torch.nn.Parameter(weight), recipe.train.seed)
        return weight

    upcycling = Upcycling(
        recipe=recipe, shapes=parameter_shapes(recipe), state_names=STATE_NAMES[recipe.optimizer.name], initial=initial
    )
    return UpcycledSource(source, upcycling)


def parameter_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return every parameter of the recipe's model with its global shape; makes no numbers."""
    with torch.device("meta"):
        model = ECDiT(recipe.model, SerialLayers())
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
