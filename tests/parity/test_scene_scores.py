"""The digit-scenes score that a run writes down while it trains does not depend on its ranks, also under ZeRO-3."""

import json
from typing import Any

import pytest

from ecdit_ds.config.yaml_loader import load_recipe
from tests.helpers.launch import train_many
from tests.helpers.random_model import save_random_model
from tests.helpers.recipes import SMALL_MODEL, arguments

PER_KIND = 3
RUNS = {
    "one": (1, 2),
    "dp2": (2, 2),
    "dp2_zero3": (2, 3),
}
"""Name -> (ranks, ZeRO stage)."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train one step of every layout from one random model, and return what its evaluations say of scenes."""
    root = tmp_path_factory.mktemp("scenes")
    common = (
        *SMALL_MODEL,
        "model.latent_height=16",
        "model.latent_width=16",
        "train.max_steps=2",
        "train.evaluate_every=1",
        f"sample.scenes_per_kind={PER_KIND}",
        "sample.num_steps=2",
        "optimizer.learning_rate=1e-6",
    )
    recipe = load_recipe("demo", common)
    start = save_random_model(root / "start", recipe, kinds=("weight", "ema", "exp_avg", "exp_avg_sq"))
    train_many(
        root,
        [
            (ranks, arguments(root / name, root / "cache", *common, zero=zero, resume=str(start)))
            for name, (ranks, zero) in RUNS.items()
        ],
    )
    return {name: [json.loads(line) for line in (root / name / "evaluations.jsonl").open()] for name in RUNS}


def test_every_kind_is_scored_with_ceiling_and_chance(scenes: dict[str, Any]) -> None:
    last = scenes["one"][-1]["scenes"]
    assert set(last) == {"model", "ceiling", "chance"}
    assert [kind["count"] for kind in last["model"]["kinds"].values()] == [PER_KIND] * 6
    assert last["ceiling"]["overall"] > 0.9


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one"])
def test_scores_of_scenes_do_not_depend_on_the_layout(scenes: dict[str, Any], name: str) -> None:
    assert [line["scenes"] for line in scenes[name]] == [line["scenes"] for line in scenes["one"]]
    assert len(scenes[name]) >= 1
