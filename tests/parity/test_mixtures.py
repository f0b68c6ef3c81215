"""Photographs of several sizes in two sets, mixed by weights: the same run on any ranks and after a stop."""

import json
from pathlib import Path

import numpy as np
import pytest

from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.training.setup import _Flops
from tests.helpers.launch import Planned, metrics_of, train_many
from tests.helpers.photographs import crops, encoded, photographs
from tests.helpers.recipes import SMALL_MODEL, arguments
from tools import encode_data

STEPS, HALFWAY = 8, 3
WEIGHTS = (1.0, 3.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encode two training sets and one held out, each of squares and of wide pictures; train, stop and go on, judge."""
    root = tmp_path_factory.mktemp("mixtures")
    wide = photographs()[0]
    for name, dtype, count in (("a", "fp32", 6), ("b", "bf16", 9), ("heldout", "fp32", 5)):
        pictures = root / f"{name}_pictures"
        pictures.mkdir()
        for i, image in enumerate([*crops(count), *[wide.rotate(10 * i) for i in range(count // 2)]]):
            (pictures / f"{i}.jpg").write_bytes(encoded(image))
            (pictures / f"{i}.txt").write_text(f"{name} {i}")
        tools = ["--size", "16", "--patch", "4", "--buckets", "--text-tokens", "12", "--shard-samples", "4"]
        assert encode_data.main(["encode", str(pictures), str(root / name), *tools, "--dtype", dtype]) == 0
    width = json.loads((root / "a" / "index.json").read_text())["text_shape"][1]
    common = (
        *SMALL_MODEL,
        "data.num_train=16384",
        "data.num_heldout=256",
        "data.dataset=encoded",
        f"data.path=[{root / 'a'}, {root / 'b'}]",
        f"data.weights={list(WEIGHTS)}",
        f"data.heldout_path={root / 'heldout'}",
        "model.patch_size=4",
        f"model.text_embed_dim={width}",
        "model.max_text_tokens=12",
        "model.capacity_factor=2.0",
        f"train.checkpoint_every={HALFWAY}",
        f"train.max_steps={STEPS}",
    )
    masked = ("model.decoder_layers=1", "train.mask_ratio=0.5", "train.unmasked_from_step=6")

    def planned(name: str, ranks: int, *overrides: str) -> tuple[int, list[str]]:
        return ranks, arguments(root / name, root / "unused", *common, *overrides)

    train_many(
        root,
        [
            planned("one", 1),
            planned("two", 2, "parallel.ep=2", "data.num_workers=2"),
            planned("lives", 1, f"train.max_steps={HALFWAY}", "data.num_workers=1"),
            planned("masked", 1, *masked),
            planned("masked_two", 2, *masked),
        ],
        [
            planned("lives", 1, "data.num_workers=2"),
            Planned(
                1, ["loss", "--checkpoint", str(root / "one"), "--output", str(root / "judged")], tool="evaluate.py"
            ),
        ],
    )
    return root


@pytest.mark.parametrize(("one", "two"), [("one", "two"), ("masked", "masked_two")])
def test_a_mixture_trains_the_same_on_one_rank_and_on_two(runs: Path, one: str, two: str) -> None:
    first, second = metrics_of(runs / one), metrics_of(runs / two)
    assert len(first) == STEPS
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in second] == pytest.approx([m[key] for m in first], rel=1e-5), key
    by_time = [
        json.loads((runs / name / "evaluations.jsonl").read_text().splitlines()[-1])["heldout_loss_by_time"]
        for name in (one, two)
    ]
    assert by_time[1] == pytest.approx(by_time[0], rel=1e-4)


def test_a_mixture_goes_on_after_a_stop_as_if_there_had_been_none(runs: Path) -> None:
    whole, lives = metrics_of(runs / "one"), metrics_of(runs / "lives")
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in lives] == [m[key] for m in whole]
    last = [json.loads((runs / run / "evaluations.jsonl").read_text().splitlines()[-1]) for run in ("one", "lives")]
    assert last[0]["heldout_loss"] == last[1]["heldout_loss"]
    assert last[0]["heldout_loss_ema"] == last[1]["heldout_loss_ema"]


@pytest.mark.parametrize("name", ["one", "masked"])
def test_steps_had_several_sizes_both_sets_in_their_shares_and_work_counted_by_size(runs: Path, name: str) -> None:
    recipe = load_recipe(str(runs / name / "recipe.yaml"))
    mixture = Mixture(
        [LatentDataset(Path(path)) for path in recipe.data.paths],
        weights=WEIGHTS,
        seed=recipe.train.seed,
        global_batch_size=8,
    )
    sizes = [mixture.bucket_at(step) for step in range(STEPS)]
    assert set(sizes) == {(3, 16, 16), (3, 12, 20)}
    flops = _Flops(recipe, mixture, 8)
    for step, metrics in enumerate(metrics_of(runs / name)):
        told = metrics["model_flops_per_second"] / metrics["images_per_second"]
        assert told == pytest.approx(flops(step))
    assert len({(size, flops(step)) for step, size in enumerate(sizes)}) >= 2
    places = [mixture.ids_at(np.arange(8 * step, 8 * step + 8)) for step in range(400)]
    of_set = np.bincount(np.concatenate([found.sets_B for found in places]))
    assert of_set[1] == pytest.approx(3 * of_set[0], rel=0.03)


def test_the_held_out_loss_of_all_sizes_can_be_had_again(runs: Path) -> None:
    during = json.loads((runs / "one" / "evaluations.jsonl").read_text().splitlines()[-1])
    after = json.loads((runs / "judged" / "results.json").read_text())
    assert after["results"]["mean"] == pytest.approx(during["heldout_loss_ema"], rel=1e-4)
    assert after["settings"]["samples"] == 7
