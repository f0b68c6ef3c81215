"""Training starts from a dense checkpoint that was made into experts, with the loss that the formula says."""

from pathlib import Path

import pytest

from ecdit_ds.config.yaml_loader import load_recipe
from tests.helpers.launch import metrics_of, train_many
from tests.helpers.random_model import save_random_model
from tests.helpers.recipes import SMALL_MODEL, arguments
from tools import convert_ckpt

COMMON = (*SMALL_MODEL, "train.max_steps=3", "train.evaluate_every=3")
DENSE = (*COMMON, "model.ffn=dense")
SPARSE = (*COMMON, "model.num_experts=4", "model.capacity_factor=4")
NORMALIZED = (*SPARSE, "model.gate_normalization=token")
RELATIVE = 1e-5
"""Of losses: an expert's sums are in another order, and its gates add up to one but for rounding."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Go on from a random dense checkpoint, and from what was made of it."""
    root = tmp_path_factory.mktemp("upcycled")
    kinds = ("weight", "ema", "exp_avg", "exp_avg_sq")
    start = save_random_model(root / "start", load_recipe("demo", DENSE), step=0, kinds=kinds)
    runs = [(1, arguments(root / "dense", root / "cache", *DENSE, resume=str(start)))]
    for name, overrides, layout in (("whole", NORMALIZED, ()), ("raw", SPARSE, ("parallel.ep=2",))):
        sets = [part for override in overrides for part in ("--set", override)]
        command = ["convert", str(start), str(root / f"made_{name}"), "--to", "ecdit", "--upcycle", "demo", *sets]
        assert convert_ckpt.main(command) == 0
        output, ranks = root / name, 2 if layout else 1
        # The cache is the machine's business and may differ.
        made = str(root / f"made_{name}")
        runs.append((ranks, arguments(output, root / "cache", *overrides, *layout, resume=made)))
    train_many(root, runs)
    return root


def test_the_first_loss_is_the_dense_models_where_gates_sum_to_one(runs: Path) -> None:
    dense, whole = metrics_of(runs / "dense"), metrics_of(runs / "whole")
    assert [line["step"] for line in whole] == [1, 2, 3]
    assert whole[0]["samples_seen"] == 8 and whole[0]["experts_per_token"] == 4.0
    assert whole[0]["loss"] == pytest.approx(dense[0]["loss"], rel=RELATIVE)
    assert whole[0]["loss"] > 0.5


def test_so_it_is_with_raw_scores_which_sum_to_one_over_all_experts(runs: Path) -> None:
    dense, raw = metrics_of(runs / "dense"), metrics_of(runs / "raw")
    assert raw[0]["loss"] == pytest.approx(dense[0]["loss"], rel=RELATIVE)
    assert len({line["loss"] for line in raw}) == 3


def test_experts_part_ways_as_they_train(runs: Path) -> None:
    dense, whole = metrics_of(runs / "dense"), metrics_of(runs / "whole")
    assert whole[2]["loss"] != pytest.approx(dense[2]["loss"], rel=RELATIVE)
