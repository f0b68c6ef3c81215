"""The recipes beside one another: how large each model is, and what an image costs."""

from collections.abc import Iterable

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.planner.flops import training_flops
from ecdit_ds.planner.parameters import count_parameters

_HEADER = ("recipe", "layers", "width", "experts", "DiT", "with encoders", "active", "GFLOP masked", "unmasked")


def describe_models(recipes: Iterable[Recipe]) -> str:
    """Return a table: parameters in billions, and FLOPs of an image's forward and backward.

    `active` is a token's mean, with the encoders, as the paper counts; `masked` is empty where a recipe masks nothing.
    """
    rows = [_HEADER, *(_row(recipe) for recipe in recipes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _row(recipe: Recipe) -> tuple[str, ...]:
    model, count, ratio = recipe.model, count_parameters(recipe.model), recipe.train.mask_ratio
    images = model.pool_images(model.routing_group)
    masked, unmasked = (
        training_flops(model, model.num_kept_tokens(share), images).total / 1e9 for share in (ratio, 0.0)
    )
    return (
        recipe.name,
        str(model.num_layers),
        str(model.hidden_size),
        str(model.num_experts) if model.is_sparse else "-",
        *(f"{number / 1e9:.2f}" for number in (count.dit, count.with_encoders, count.activated)),
        f"{masked:,.4g}" if ratio else "-",
        f"{unmasked:,.4g}",
    )
