"""What a run is built of: each part gets the numbers of the recipe, of the layout and of the rank that it is for."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from ecdit_ds.checkpoint.manifest import encode_manifest, read_manifest
from ecdit_ds.checkpoint.naming import MANIFEST_NAME
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.latents.index import VerifyOptions
from ecdit_ds.errors import CheckpointError
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.parallel.activation_checkpoint import Recompute
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.flops import training_flops
from ecdit_ds.training import setup as build
from ecdit_ds.training.callbacks import Console, TensorBoard
from ecdit_ds.training.engine import DeepSpeedEngine
from ecdit_ds.training.evaluator import Evaluator
from ecdit_ds.training.run_dir import RunDir
from ecdit_ds.training.setup import (
    _callbacks,
    _check_same,
    _data_facts,
    _Flops,
    _open_data,
    _restore,
    _work,
    build_model,
)
from ecdit_ds.training.train_state import TrainProgress, progress_of

CPU = torch.device("cpu")
LAYOUT = Topology(world_size=8, tp=2, ep=2)


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Return a recipe whose seeds differ."""
    train = replace(tiny_recipe.train, seed=3, global_batch_size=16, mask_ratio=0.5, unmasked_from_step=2)
    model = replace(tiny_recipe.model, decoder_layers=1)
    return replace(tiny_recipe, model=model, train=train, data=replace(tiny_recipe.data, seed=5))


def told(**of: Any) -> Any:
    """Return something that has these attributes."""
    return SimpleNamespace(**of)


def noted(seen: dict[str, Any], answer: Any = None) -> Callable[..., Any]:
    """Return a function that notes the keywords of its last call."""

    def note(*arguments: Any, **keywords: Any) -> Any:
        seen.clear()
        seen.update(keywords, arguments=arguments)
        return answer

    return note


def test_callbacks_of_a_later_life_begin_at_its_step_with_the_steps_skipped_so_far(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: dict[str, Any] = {}
    monkeypatch.setattr("ecdit_ds.training.callbacks.tqdm", noted(bars, told(disable=True)))
    callbacks = _callbacks(RunDir(path=tmp_path), recipe, TrainProgress(step=9, samples_seen=144, num_updates=7))
    assert any(isinstance(callback, Console) for callback in callbacks)
    assert (bars["initial"], bars["total"]) == (9, recipe.train.max_steps)
    (board,) = (callback for callback in callbacks if isinstance(callback, TensorBoard))
    board.on_report([{"step": 10, "is_skipped": True}])
    board.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/skipped_steps")] == [(10, 3.0)]


def test_a_run_whose_tensorboard_cannot_be_written_goes_on_without(
    tmp_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("no folder")
    callbacks = _callbacks(RunDir(path=tmp_path), recipe, TrainProgress(step=9, samples_seen=144, num_updates=7))
    assert [type(callback).__name__ for callback in callbacks] == [
        "Console",
        "JsonLines",
        "BadSampleLines",
        "_SampleFiles",
    ]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert str(tmp_path / "tensorboard") in line and "goes on without" in line


@pytest.mark.parametrize("rank", range(8))
def test_each_rank_loads_counts_and_looks_at_what_its_place_says(
    rank: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: dict[str, Any] = {}
    monkeypatch.setattr(build, "training_batches", noted(loaded, "steps"))
    monkeypatch.setattr(build, "peak_flops_per_s", lambda device: 10.0)
    mixture, world = told(null_text=None, is_whole=True), told(rank=rank, size=8)
    work = _work(recipe, LAYOUT, CPU, world, mixture, told(), None)
    assert work["batches"](48) == "steps"
    assert (loaded["dp_rank"], loaded["dp_size"]) == (rank // 2, 4)
    assert (loaded["micro_batch_size"], loaded["start_sample"]) == (4, 48)
    assert loaded["end_sample"] == 16 * recipe.train.max_steps
    assert work["is_tp_leader"] == (rank % 2 == 0), "ranks of one tensor-parallel group train on the same samples"
    assert work["peak_flops_per_s"] == 80.0


@pytest.mark.parametrize("rank", [0, 3, 6])
def test_a_monitor_shares_out_held_out_samples_and_prompts_by_data_parallel_rank(
    rank: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out: dict[str, Any] = {}
    scored: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    drawers: dict[str, Any] = {}
    monkeypatch.setattr("ecdit_ds.training.evaluator.heldout_loss", noted(held_out))
    monkeypatch.setattr("ecdit_ds.training.evaluator.drawn_alignment", noted(scored, told(summary=dict)))
    monkeypatch.setattr("ecdit_ds.training.evaluator.heldout_prompts", noted(asked, []))
    monkeypatch.setattr("ecdit_ds.training.evaluator.encoders_of", lambda *_: (told(downsampling=2), None))
    monkeypatch.setattr(
        "ecdit_ds.training.evaluator.TextToImage", noted(drawers, told(draw=noted(drawn, torch.zeros(1, 3, 2, 2))))
    )
    model = replace(recipe.model, latent_height=4, latent_width=8)
    sample = replace(recipe.sample, prompts=("a", "b", "c"), scenes_per_kind=7)
    world: Any = told(rank=rank, size=8, sum=lambda counts: counts)
    null_text: Any = told()
    monitor = Evaluator(
        recipe=replace(recipe, model=model, sample=sample),
        topology=LAYOUT,
        world=world,
        device=CPU,
        heldout_set=told(),
        null_text=null_text,
    )
    monitor.heldout_losses(told())
    assert (held_out["dp_rank"], held_out["dp_size"], held_out["batch_size"]) == (rank // 2, 4, 4)
    assert held_out["total"](torch.tensor(5)) == 5
    monitor.draw(told())
    assert drawn["arguments"][0] == ("a", "b", "c") and list(drawn["seeds"]) == [3, 4, 5]
    assert drawers["null_text"] is null_text, "what training drops texts to, not what encoders make of an empty one"
    monitor.scene_scores(told())
    assert (scored["dp"].index, scored["dp"].count, scored["batch_size"]) == (rank // 2, 4, 4)
    assert scored["total"](torch.tensor(5)) == (5 if rank % 2 == 0 else 0), "one of a tensor-parallel group counts"
    assert asked == {"seed": 5, "per_kind": 7, "canvas_height": 8, "canvas_width": 16, "arguments": ()}


def test_a_mixture_is_of_the_recipes_weights_and_of_the_training_seed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed: dict[str, Any] = {}
    opened: list[tuple[str, VerifyOptions]] = []

    def open_split(recipe: Recipe, split: str, encoders: Any, *, check: VerifyOptions) -> tuple[str]:
        opened.append((split, check))
        return (split,)

    monkeypatch.setattr(build, "open_split", open_split)
    monkeypatch.setattr(build, "Mixture", noted(mixed, "mixture"))
    data = told(weights=(0.25, 0.75), dataset="encoded", verify="checksums", seed=5)
    world: Any = told(rank=1, size=3, on_rank0=lambda work: work(), run_on_all=lambda work: work())
    assert _open_data(told(data=data, train=recipe.train), world, None) == ("mixture", "heldout")
    assert mixed == {"arguments": (("train",),), "weights": (0.25, 0.75), "seed": 3, "global_batch_size": 16}
    assert [split for split, _ in opened] == ["train", "heldout"] * 2
    assert [list(range(9))[check.shards] for _, check in opened] == [[]] * 2 + [[1, 4, 7]] * 2, "ranks share them out"
    assert opened[-1][1].checksums


def test_checkpoints_say_of_encoded_sets_their_fingerprints_and_the_encoders_that_run_beside(recipe: Recipe) -> None:
    mixture = told(sets=[told(fingerprint="f0"), told(fingerprint="f1")])
    encoders = told(image_encoder=told(identity="vae"), text_encoder=told(identity="t5"))
    assert _data_facts(recipe, mixture, encoders) == {}, "digit scenes are a function of the recipe"
    encoded = replace(recipe, data=replace(recipe.data, dataset="encoded"))
    assert _data_facts(encoded, mixture, encoders) == {"sets": ["f0", "f1"], "encoders_beside": ["vae", "t5"]}
    assert _data_facts(encoded, mixture, None) == {"sets": ["f0", "f1"], "encoders_beside": []}


def test_flops_are_those_of_the_mask_and_the_bucket_of_a_step(recipe: Recipe) -> None:
    buckets = [(3, 8, 8), (3, 4, 8), (3, 8, 8), (3, 4, 8)]
    flops = _Flops(recipe, told(bucket_at=lambda step: buckets[step]), 4)
    pool = recipe.model.pool_images(4)
    expected = [
        training_flops(recipe.model.resized(*bucket[1:]), num_kept, pool).total
        for bucket, num_kept in zip(buckets, (8, 4, 16, 8), strict=True)
    ]
    assert len(set(expected)) >= 3
    assert [flops(step) for step in (0, 1, 2, 3, 0)] == [*expected, expected[0]]


def test_a_model_is_of_the_training_seed_and_recomputes_what_the_recipe_says(recipe: Recipe) -> None:
    train = replace(recipe.train, recompute="block", recompute_every=2)
    model = build_model(replace(recipe, train=train), SerialLayers(), CPU)
    assert model.run_block == Recompute(mode="block", every=2)
    weights = [
        build_model(replace(recipe, train=replace(recipe.train, seed=seed)), SerialLayers(), CPU).state_dict()
        for seed in (3, 4)
    ]
    name = "patches.linear.weight"
    assert torch.equal(model.state_dict()[name], weights[0][name])
    assert not torch.equal(weights[0][name], weights[1][name])


class Restored:
    """An engine that notes what it is told; checkpoints of some steps it cannot load."""

    def __init__(self, *unreadable: int) -> None:
        self.updates: list[int] = []
        self.unreadable = unreadable

    def restored(self, num_updates: int) -> None:
        """Note it."""
        self.updates.append(num_updates)


def encoders_named(vae: str) -> dict[str, Any]:
    """Return what a checkpoint says of its encoders."""
    return {"image": {"identity": vae}, "text": {"identity": "t5"}}


@pytest.fixture
def restore(
    recipe: Recipe, save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Return `restore(engine, own, ...)`: go on from step 6 (4 updates) or 3 (2 updates) of a run in a folder."""
    root = tmp_path / "run" / "checkpoints"
    for step, num_updates in ((3, 2), (6, 4)):
        meta = {
            "recipe": recipe.to_dict(),
            "samples_seen": 16 * step,
            "num_updates": num_updates,
            "data": {"sets": []},
            "encoders": encoders_named("vae"),
        }
        save_model(root, recipe, step, meta)

    def load(reader: Reader, engine: Any) -> TrainProgress:
        if reader.manifest.step in engine.unreadable:
            raise CheckpointError(f"step {reader.manifest.step} is damaged")
        return progress_of(reader)

    monkeypatch.setattr(build, "load_snapshot", load)

    def go_on(
        engine: Restored,
        own: Path = root,
        recipe: Recipe = recipe,
        sets: tuple[str, ...] = (),
        vae: str = "vae",
        **says: Any,
    ) -> Any:
        world = told(
            on_rank0=lambda work: work(),
            broadcast=lambda value: value,
            gather=lambda value: [value, None],
            all_true=lambda ok: ok,
        )
        world = told(**{**vars(world), **says})
        check_same = partial(_check_same, recipe, {"sets": list(sets)}, encoders_named(vae))
        return _restore(
            [root / "step_6", root / "step_3"], own, cast(DeepSpeedEngine, engine), recipe, world, check_same
        )

    return go_on


def test_an_engine_goes_on_from_the_newest_with_its_updates_which_skipped_steps_are_not(restore: Any) -> None:
    engine = Restored()
    progress, folder = restore(engine)
    assert (folder.name, progress.step, progress.samples_seen, progress.num_updates) == ("step_6", 6, 96, 4)
    assert engine.updates == [4]


@pytest.mark.parametrize("is_own", [True, False])
def test_a_damaged_checkpoint_is_passed_over_and_set_aside_only_in_the_runs_own_folder(
    restore: Any, tmp_path: Path, is_own: bool
) -> None:
    engine, root = Restored(6), tmp_path / "run" / "checkpoints"
    progress, folder = restore(engine, root if is_own else tmp_path / "another" / "checkpoints")
    assert (folder.name, progress.num_updates, engine.updates) == ("step_3", 2, [2])
    assert (root / "step_6").exists() != is_own
    assert len(list(root.glob("step_6.damaged-*"))) == is_own, "kept, and not swept up as an interrupted save is"


def test_what_says_that_it_is_not_finite_is_passed_over_before_anything_of_it_is_read(
    restore: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = tmp_path / "run" / "checkpoints" / "step_6"
    said = read_manifest(newest)
    name = next(iter(said.tensors))
    (newest / MANIFEST_NAME).write_bytes(encode_manifest(replace(said, nonfinite={name: 3})))
    engine = Restored()
    _, folder = restore(engine)
    assert (folder.name, engine.updates) == ("step_3", [2])
    assert f"3 numbers of 1 tensors are not finite ({name})" in capsys.readouterr().out


def test_what_one_rank_cannot_load_no_rank_goes_on_from(restore: Any) -> None:
    answers = iter([False, True])  # another rank found damage in step 6, and none in step 3
    engine = Restored()
    _, folder = restore(
        engine, all_true=lambda ok: next(answers), gather=lambda value: [value, None if value else "a flipped bit"]
    )
    assert (folder.name, engine.updates) == ("step_3", [2])


def test_no_run_goes_on_with_another_recipe_other_data_or_other_encoders(
    restore: Any, recipe: Recipe, refusal_of: Any
) -> None:
    other = replace(recipe, optimizer=replace(recipe.optimizer, ema_decay=0.5))
    assert "optimizer.ema_decay" in refusal_of(lambda: restore(Restored(), recipe=other))
    assert "data" in refusal_of(lambda: restore(Restored(), sets=("another",)))
    assert "through the image encoder vae, now it is another" in refusal_of(lambda: restore(Restored(), vae="another"))


def test_checkpoints_of_which_none_loads_are_no_fresh_start(restore: Any, refusal_of: Any) -> None:
    said = refusal_of(lambda: restore(Restored(3, 6)))
    assert "none of 2 checkpoints" in said and "step 6 is damaged" in said and "step 3 is damaged" in said
