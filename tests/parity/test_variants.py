"""Small recipes of every kind on one and two ranks: accumulation, precision, optimizer, pool, baselines, resumption."""

import json
import math
from pathlib import Path

import pytest

from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.config.recipe import STATE_NAMES, Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.data.digit_scenes.scenes import Split
from ecdit_ds.data.encoders.from_recipe import encoders_of
from ecdit_ds.data.splits import open_split
from ecdit_ds.errors import ExitCode
from tests.helpers.launch import metrics_of, train, train_many
from tests.helpers.random_model import save_random_model
from tests.helpers.recipes import SMALL_MODEL, arguments

STEPS = 10
RELATIVE = 1e-5
VARIANTS = {
    "base": (),
    "accumulated": ("train.micro_batch_size=2",),
    "bf16": ("train.precision=bf16",),
    "rmsprop": ("optimizer.name=rmsprop", "optimizer.learning_rate=1e-3", "optimizer.weight_decay=0.01"),
    "group": ("model.routing_pool=group", "model.routing_group=2"),
    "dense": ("model.ffn=dense",),
    "token_choice": ("model.ffn=token_choice",),
    # A pool is a micro-batch here, so layouts agree where micro-batches do.
    "batch": ("model.routing_pool=batch", "train.micro_batch_size=4"),
}
SAME_AS_BASE: dict[str, tuple[str, tuple[str, ...]]] = {
    "chunks": ("2", ("parallel.dispatch_chunks=2",)),
    "chunks_zero3": ("3", ("parallel.dispatch_chunks=4",)),
    "recompute": ("2", ("train.recompute=block",)),
    "selective": ("2", ("train.recompute=selective", "train.recompute_every=2")),
    "selective_zero3": ("3", ("train.recompute=selective", "parallel.dispatch_chunks=2")),
    "accumulated_zero3": ("3", ("train.micro_batch_size=2",)),
    "offload": ("2_offload", ()),
    "overlap": ("2_overlap", ("train.micro_batch_size=2",)),
}
"""Name -> (DeepSpeed configuration, overrides); trained on two ranks, experts spread over both."""
TENSOR_PARALLEL = {
    "rmsprop": VARIANTS["rmsprop"],
    "group": VARIANTS["group"],
    "dense": VARIANTS["dense"],
    "switches": (
        "model.ffn_activation=swiglu",
        "model.num_shared_experts=2",
        "model.gate_normalization=token",
        "model.router_input=unmodulated",
        "model.router_scores=sigmoid",
    ),
}
"""Trained on one rank, and on two that share each layer."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every variant on one rank and on two (experts spread over both), and go on from another layout."""
    root = tmp_path_factory.mktemp("variants")
    common = (*SMALL_MODEL, f"train.max_steps={STEPS}", "train.checkpoint_every=5", "optimizer.warmup_steps=5")
    runs = [
        (world, arguments(root / f"{name}_{world}", root / "cache", *common, *_layout(name, world), *overrides))
        for world in (1, 2)
        for name, overrides in VARIANTS.items()
    ]
    runs += [
        (2, arguments(root / name, root / "cache", *common, "parallel.ep=2", *overrides, zero=zero))
        for name, (zero, overrides) in SAME_AS_BASE.items()
    ]
    for name, overrides in TENSOR_PARALLEL.items():
        # A fresh model's gates are zero, so what is cut would hardly matter: start from a random one.
        recipe = load_recipe("demo", [*common, *overrides])
        start = str(save_random_model(root / f"{name}_start", recipe, kinds=("weight", "ema", *_states(recipe))))
        for ranks, run, more in ((1, "whole", ()), (2, "cut", ("parallel.tp=2",))):
            output = root / f"{name}_{run}"
            runs.append((ranks, arguments(output, root / "cache", *common, *overrides, *more, zero=3, resume=start)))
    sets = [
        f"data.path={_encoded(root, 'train', common)}",
        f"data.heldout_path={_encoded(root, 'heldout', common)}",
    ]
    encoded = (*common, "data.dataset=encoded", *sets)
    runs.append((1, arguments(root / "encoded", root / "elsewhere", *encoded)))
    halfway = str(root / "base_1" / "checkpoints" / "step_5")
    moved = (2, arguments(root / "moved", root / "cache", *common, "parallel.ep=2", resume=halfway))
    train_many(root, runs, [moved])
    return root


def _encoded(root: Path, split: Split, common: tuple[str, ...]) -> Path:
    """Encode a set of digit scenes and return its folder."""
    recipe = load_recipe("demo", [*common, f"data.cache_dir={root / split}"])
    open_split(recipe, split, encoders_of(recipe))
    (folder,) = (root / split).iterdir()
    return folder


def _states(recipe: Recipe) -> tuple[str, ...]:
    return STATE_NAMES[recipe.optimizer.name]


def _layout(name: str, world: int) -> tuple[str, ...]:
    return (f"parallel.ep={1 if name == 'dense' else world}",)


@pytest.mark.parametrize("name", ["base", "accumulated", "rmsprop", "group", "dense", "batch"])
def test_a_variant_trains_the_same_on_one_rank_and_on_two(runs: Path, name: str) -> None:
    one, two = metrics_of(runs / f"{name}_1"), metrics_of(runs / f"{name}_2")
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in two] == pytest.approx([m[key] for m in one], rel=RELATIVE), key


@pytest.mark.parametrize("name", SAME_AS_BASE)
def test_what_changes_only_when_things_are_computed_does_not_change_the_losses(runs: Path, name: str) -> None:
    base, other = metrics_of(runs / "base_1"), metrics_of(runs / name)
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in other] == pytest.approx([m[key] for m in base], rel=RELATIVE), key


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_a_variant_trains_the_same_on_one_rank_and_cut_over_two(runs: Path, name: str) -> None:
    whole, cut = metrics_of(runs / f"{name}_whole"), metrics_of(runs / f"{name}_cut")
    assert len(cut) == STEPS - 1
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in cut] == pytest.approx([m[key] for m in whole], rel=RELATIVE), key


def test_accumulated_micro_batches_equal_one_large_one(runs: Path) -> None:
    whole, parts = metrics_of(runs / "base_1"), metrics_of(runs / "accumulated_1")
    assert [m["loss"] for m in parts] == pytest.approx([m["loss"] for m in whole], rel=RELATIVE)
    assert [m["grad_norm"] for m in parts] == pytest.approx([m["grad_norm"] for m in whole], rel=RELATIVE)


def test_a_checkpoint_of_one_rank_goes_on_under_expert_parallelism_with_the_same_losses(runs: Path) -> None:
    straight, moved = metrics_of(runs / "base_1"), metrics_of(runs / "moved")
    assert [m["step"] for m in moved] == [6, 7, 8, 9, 10]
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in moved] == pytest.approx([m[key] for m in straight[5:]], rel=RELATIVE), key


def test_folders_of_encoded_samples_train_like_the_set_they_hold(runs: Path) -> None:
    named, found = metrics_of(runs / "base_1"), metrics_of(runs / "encoded")
    assert [m["loss"] for m in found] == [m["loss"] for m in named]
    assert (runs / "encoded" / "evaluations.jsonl").read_text() == (runs / "base_1" / "evaluations.jsonl").read_text()
    assert not (runs / "elsewhere").exists()


def test_bf16_stays_close_to_fp32_and_is_not_fp32(runs: Path) -> None:
    fp32, bf16 = ([m["loss"] for m in metrics_of(runs / f"{name}_1")] for name in ("base", "bf16"))
    assert bf16 == pytest.approx(fp32, rel=0.03)
    assert bf16 != fp32
    manifest = Reader(runs / "bf16_1" / "checkpoints" / f"step_{STEPS}").manifest
    assert {tensor.dtype for tensor in manifest.tensors.values()} == {"float32"}


@pytest.mark.parametrize("name", ["bf16", "rmsprop", "group", "dense", "token_choice"])
def test_each_variant_changes_the_losses(runs: Path, name: str) -> None:
    base, other = ([m["loss"] for m in metrics_of(runs / f"{kind}_1")] for kind in ("base", name))
    assert all(math.isfinite(loss) for loss in other)
    assert other[1:] != pytest.approx(base[1:], rel=RELATIVE)


def test_only_token_choice_has_an_auxiliary_loss_and_drops_tokens_over_capacity(runs: Path) -> None:
    for world in (1, 2):
        last = metrics_of(runs / f"token_choice_{world}")[-1]
        assert last["auxiliary_loss"] > 0
        assert 1.0 < last["experts_per_token"] <= 2.0
    assert metrics_of(runs / "base_2")[-1]["auxiliary_loss"] == 0
    assert metrics_of(runs / "dense_1")[-1]["experts_per_token"] is None


def test_the_run_folder_holds_everything_the_readme_names(runs: Path) -> None:
    run = runs / "base_2"
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step_5", "step_10", "latest"}
    assert (run / "recipe.yaml").is_file()
    assert list((run / "tensorboard").glob("events.*"))
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluations] == [0, STEPS]
    assert evaluations[-1]["heldout_loss"] < evaluations[0]["heldout_loss"]
    assert len(evaluations[0]["heldout_loss_by_time"]) == 8
    assert {"step", "loss", "grad_norm", "samples_seen", "experts_per_token", "seconds"} <= metrics_of(run)[0].keys()


def test_held_out_losses_do_not_depend_on_the_layout(runs: Path) -> None:
    one, two = (
        [json.loads(line) for line in (runs / f"base_{world}" / "evaluations.jsonl").read_text().splitlines()]
        for world in (1, 2)
    )
    for key in ("heldout_loss", "heldout_loss_ema", "heldout_loss_by_time"):
        for first, second in zip(one, two, strict=True):
            assert second[key] == pytest.approx(first[key], rel=RELATIVE), key


def test_gradients_that_stay_non_finite_skip_every_step_on_every_rank_and_end_the_run(tmp_path: Path) -> None:
    # After one step at this rate the weights are so large that every later gradient overflows.
    code, text = train(
        2,
        arguments(
            tmp_path / "run",
            tmp_path / "cache",
            *SMALL_MODEL,
            "parallel.ep=2",
            "optimizer.learning_rate=9e29",
            "optimizer.warmup_steps=0",
            "train.max_steps=20",
            "train.max_skipped_steps=3",
        ),
    )
    assert code == ExitCode.UNRECOVERABLE
    steps = metrics_of(tmp_path / "run")
    assert [m["is_skipped"] for m in steps] == [False, True, True, True]
    assert steps[-1]["loss"] is None
    assert text.count("skipped on every rank") == 3
    assert text.count("error:") == 1
    assert "train.max_skipped_steps" in text
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
