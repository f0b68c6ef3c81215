"""What the drawing says is what a rank really holds, and what the documentation shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.parallel.layout_table import draw_layout
from ecdit_ds.parallel.partition_rules import sharded_axes
from ecdit_ds.parallel.topology import Topology

ROOT = Path(__file__).resolve().parents[3]
WORLD, TP, EP = 8, 2, 2
FLAGS = [f"parallel.tp={TP}", f"parallel.ep={EP}"]

# The real groups and the real layers of each of eight ranks, on torch's fake process group and without memory.
REAL_SHARDS = f"""
import json, sys
sys.path[0] = "."
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from ecdit_ds.parallel.setup import init_process_groups, initialize_distributed
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.sharding import shard_of
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.config.yaml_loader import load_recipe

rank = int(sys.argv[1])
dist.init_process_group("fake", rank=rank, world_size={WORLD}, store=FakeStore())
initialize_distributed()
recipe = load_recipe("demo", {FLAGS})
grid = init_process_groups(Topology(world_size={WORLD}, tp={TP}, ep={EP}), 1)
with torch.device("meta"):
    model = ECDiT(recipe.model, grid.layers)
boxes, cut = {{}}, {{}}
for name, parameter in model.named_parameters():
    offset, whole = shard_of(parameter).offset, shard_of(parameter).global_shape
    cut[name] = [axis for axis, size in enumerate(parameter.shape) if size < whole[axis]]
    boxes[name] = [[start, start + length] for start, length in zip(offset, parameter.shape)]
print("BOXES " + json.dumps([boxes, cut]))
"""


@pytest.fixture(scope="module")
def drawing() -> str:
    return draw_layout(load_recipe("demo", FLAGS), Topology(world_size=WORLD, tp=TP, ep=EP))


def test_the_documentation_shows_this_drawing(drawing: str) -> None:
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    shown = text.split("<!-- drawing -->")[1].split("<!-- end of drawing -->")[0]
    assert shown.strip().strip("`").strip("\n") == drawing


@pytest.mark.parametrize("rank", [0, 3, 6])
def test_a_row_of_the_drawing_is_what_the_real_layers_of_that_rank_hold(drawing: str, rank: int) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", REAL_SHARDS, str(rank)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    boxes, cut = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("BOXES "))[6:])
    for name, axes in cut.items():
        assert sorted(sharded_axes(name).values()) == axes, name
    header, *rows = (line.split("  ") for line in drawing.split("\n\n")[0].splitlines())
    row = dict(zip(*([cell.strip() for cell in cells if cell.strip()] for cells in (header, rows[rank])), strict=True))
    head_dim = 32
    block = "blocks.1."
    assert boxes[f"{block}self_attention.query.weight"][0] == _scaled(row["heads"], head_dim)
    assert boxes[f"{block}self_attention.key.weight"][0] == _scaled(row["kv heads"], head_dim)
    assert boxes[f"{block}self_attention.out.weight"][1] == _scaled(row["heads"], head_dim)
    assert boxes["blocks.0.ffn.up.weight"][0] == _scaled(row["inner width"])
    assert boxes["blocks.0.ffn.down.weight"][1] == _scaled(row["inner width"])
    for name, axis in (("w1", 2), ("w2", 1)):
        assert boxes[f"{block}ffn.experts.{name}"][0] == _scaled(row["experts"])
        assert boxes[f"{block}ffn.experts.{name}"][axis] == _scaled(row["inner width"])
    assert boxes["modulation.weight"] == [[0, 768], [0, 128]]


def _scaled(cell: str, factor: int = 1) -> list[int]:
    """Return `first-last` as [start, stop), in units of `factor`."""
    first, _, last = cell.partition("-")
    return [int(first) * factor, (int(last or first) + 1) * factor]
