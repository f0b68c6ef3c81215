"""Which rank holds what, as text: for `--dry-run`, for docs/parallelism.md, and for the test that compares both."""

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.parallel.topology import Axis, Topology

MAX_RANKS = 64
"""A larger table would not be read."""

_GROUPS: tuple[tuple[str, Axis], ...] = (
    ("sums inside layers", "tp"),
    ("all-to-all of tokens", "ep"),
    ("gradients, all but experts", "dp"),
    ("gradients of experts", "edp"),
)


def draw_layout(recipe: Recipe, topology: Topology) -> str:
    """Return a table of slices, a row a rank, and the groups that talk; for at most MAX_RANKS ranks.

    `images` are those of a step's first micro-batch.
    """
    header = ["rank", "tp", "dp", "ep", "edp", "heads", "kv heads", "inner width", "experts", "images"]
    rows = [header] + [_row(recipe, topology, rank) for rank in range(topology.world_size)]
    if not recipe.model.is_sparse:
        rows = [[cell for cell, name in zip(row, header, strict=True) if name != "experts"] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    for what, axis in _GROUPS:
        if axis in ("ep", "edp") and not recipe.model.is_sparse:
            continue
        groups = " ".join(str(group).replace(",", "") for group in topology.rank_lists(axis))
        lines.append(f"{what:<27} {axis:<4} {groups}")
    return "\n".join(lines)


def _row(recipe: Recipe, topology: Topology, rank: int) -> list[str]:
    at, model = topology.coordinates(rank), recipe.model
    together = recipe.micro_batch_size(topology.dp) * topology.dp
    return [
        *map(str, (rank, at.tp, at.dp, at.ep, at.edp)),
        _slice(model.num_heads, at.tp, topology.tp),
        _slice(model.num_kv_heads, at.tp, topology.tp),
        _slice(model.ffn_hidden_size, at.tp, topology.tp),
        _slice(model.num_experts, at.ep, topology.ep),
        _slice(together, at.dp, topology.dp),
    ]


def _slice(size: int, index: int, count: int) -> str:
    width = size // count
    first, last = index * width, (index + 1) * width - 1
    return str(first) if first == last else f"{first}-{last}"
