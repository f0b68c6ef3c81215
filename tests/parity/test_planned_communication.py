"""What the planner says a step sends, against the collectives that a real training step calls."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ecdit_ds.config.deepspeed_json import load_deepspeed_config
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.communication import group_placement, traffic_of_step
from ecdit_ds.planner.zero import zero_settings
from tests.helpers.launch import ROOT
from tests.helpers.recipes import SMALL_MODEL

SECONDS_AT_MOST = 240


@dataclass(frozen=True)
class Case:
    """A layout of ranks, of which one is counted."""

    ranks: int
    zero: int
    overrides: tuple[str, ...]


CASES = {
    "TP 2 x EP 2, ZeRO-2, bf16, 2 micro-batches": Case(
        8, 2, ("parallel.tp=2", "parallel.ep=2", "train.precision=bf16", "train.micro_batch_size=1")
    ),
    "EP 2, ZeRO-1, masked, selective, 2 micro-batches": Case(
        4,
        1,
        (
            "parallel.ep=2",
            "train.recompute=selective",
            "model.decoder_layers=1",
            "train.mask_ratio=0.5",
            "train.micro_batch_size=1",
        ),
    ),
    "TP 2, ZeRO-2, block, shared expert": Case(
        4, 2, ("parallel.tp=2", "train.recompute=block", "model.num_shared_experts=1")
    ),
    "EP 2, ZeRO-2, block, chunks": Case(
        4, 2, ("parallel.ep=2", "train.recompute=block", "train.recompute_every=2", "parallel.dispatch_chunks=2")
    ),
    "EP 2, ZeRO-3, bf16, 2 micro-batches": Case(
        8, 3, ("parallel.ep=2", "train.precision=bf16", "train.global_batch_size=16", "train.micro_batch_size=1")
    ),
    "TP 2 x EP 2, ZeRO-3, block": Case(8, 3, ("parallel.tp=2", "parallel.ep=2", "train.recompute=block")),
    "token choice, EP 2, ZeRO-2": Case(4, 2, ("model.ffn=token_choice", "parallel.ep=2")),
}


def _deepspeed(case: Case, folder: Path) -> Path:
    config = json.loads((ROOT / "ds_configs" / f"zero{case.zero}.json").read_text())
    if case.zero == 3:  # else all of so small a model stays whole
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    path = folder / f"zero{case.zero}.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Return, for each case, bytes by `kind ranks stride`."""
    folder = tmp_path_factory.mktemp("counted")
    plan = folder / "plan.json"
    cases = [
        {"ranks": case.ranks, "deepspeed": str(_deepspeed(case, folder)), "overrides": [*SMALL_MODEL, *case.overrides]}
        for case in CASES.values()
    ]
    plan.write_text(json.dumps(cases))
    script = ROOT / "tests" / "helpers" / "count_collectives.py"
    done = subprocess.run(
        [sys.executable, str(script), str(plan)], capture_output=True, text=True, timeout=SECONDS_AT_MOST, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / f"{index}.json").read_text()) for index, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_a_real_step_calls_the_collectives_that_were_planned_with_as_many_bytes(
    counted: dict[str, dict[str, int]], name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    recipe = load_recipe("demo", [*SMALL_MODEL, *case.overrides])
    topology = Topology(world_size=case.ranks, tp=recipe.parallel.tp, ep=recipe.parallel.ep)
    zero = zero_settings(load_deepspeed_config(_deepspeed(case, tmp_path), recipe, topology.dp))
    strides = {"tp": 1, "dp": topology.tp, "ep": topology.tp, "edp": topology.tp * topology.ep}
    planned: dict[str, float] = {}
    for traffic in traffic_of_step(recipe, topology, zero, recipe.train.mask_ratio):
        ranks = group_placement(topology, traffic.axis, case.ranks).ranks
        key = f"{traffic.collective} {ranks} {strides[traffic.axis]}"
        planned[key] = planned.get(key, 0) + traffic.payload_bytes
    assert counted[name] == pytest.approx(planned, rel=0.01)
