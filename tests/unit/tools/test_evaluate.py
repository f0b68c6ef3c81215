"""The command that scores a checkpoint or pictures: its folder, what it refuses, and the metrics that need no judge."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.digit_scenes.dataset import open_digit_scenes
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE
from ecdit_ds.data.encoders.from_recipe import encoders_of
from ecdit_ds.data.encoders.spec import image_encoder_spec, null_text_facts, text_encoder_spec
from ecdit_ds.data.latents.index import read_index
from ecdit_ds.data.latents.shard_writer import write_index
from ecdit_ds.data.splits import open_split
from ecdit_ds.evaluation.heldout import heldout_loss, heldout_times
from ecdit_ds.inference.load import load_generator
from tests.helpers.evaluate_tool import EvaluateTool, content
from tests.helpers.made_sets import write_set
from tools import convert_ckpt

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]

SCENES = ("--per-kind", 2, "--steps", 1, "--batch-size", 5)
CAPTIONS = ("a red seven", "two green fives", "a nine")


@pytest.fixture
def tool(
    tmp_path: Path,
    make_recipe: MakeRecipe,
    save_model: SaveModel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> EvaluateTool:
    """Return the tool beside a checkpoint of a random model, the only one of its run."""
    return EvaluateTool(tmp_path, save_model(tmp_path / "run" / "checkpoints", make_recipe()), monkeypatch, capfd)


def test_results_tell_what_they_are_of_and_how_they_were_made(tool: EvaluateTool) -> None:
    told = tool.score("loss", "--times", 2)
    assert set(told) == {"metric", "results", "settings", "device", "versions", "commit", "command"}
    assert told["metric"] == "loss"
    name, identity = told["settings"].pop("checkpoint").split()
    assert (name, len(identity)) == (tool.checkpoint.name, 16)
    assert told["settings"] == {
        "metric": "loss",
        "recipe": "tiny",
        "step": 1,
        "weights": "ema",
        "dtype": "fp32",
        "times": 2,
        "samples": 8,
        "data_seed": 0,
    }
    assert {"python", "torch", "transformers"} <= set(told["versions"])
    assert told["command"].startswith("python ") and " loss --checkpoint " in told["command"]
    assert f"results in {Path('o') / 'results.json'}" in tool.printed


@pytest.mark.parametrize("times", [1, 3])
def test_the_loss_is_the_held_out_loss_of_the_averaged_weights(
    tool: EvaluateTool, make_recipe: MakeRecipe, times: int
) -> None:
    recipe, drawer = make_recipe(), load_generator(tool.checkpoint)
    held_out = open_digit_scenes(
        recipe.model,
        recipe.data,
        split="heldout",
        seed=0,
        image_encoder=drawer.image_encoder,
        text_encoder=drawer.text_encoder,
    )
    losses = heldout_loss(
        drawer.model,
        held_out,
        batch_size=4,
        dp_rank=0,
        dp_size=1,
        device=torch.device("cpu"),
        total=lambda values: values,
        num_times=times,
    )
    results = tool.score("loss", "--times", times, "--batch-size", 4)["results"]
    assert results["by_time"] == [list(pair) for pair in zip(heldout_times(times).tolist(), losses, strict=True)]
    assert results["mean"] == pytest.approx(np.mean(losses))
    last = tool.score("loss", "--times", times, "--weights", "weight", output="last")
    assert last["results"]["mean"] != pytest.approx(results["mean"])


def test_scenes_are_scored_by_kind_between_ceiling_and_chance(tool: EvaluateTool) -> None:
    told = tool.score("scenes", *SCENES)
    assert set(told["results"]) == {"model", "ceiling", "chance"}
    for scores in told["results"].values():
        assert [kind["count"] for kind in scores["kinds"].values()] == [2] * 6
    assert told["results"]["ceiling"]["overall"] == 1.0
    rows = [json.loads(line) for line in (tool.folder / "o" / "verdicts.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(12))
    assert all({"kind", "prompt", "file", "reason", "scores"} <= set(row) for row in rows)
    assert all((tool.folder / "o" / "drawn" / row["file"]).is_file() for row in rows)
    correct = sum(row["scores"]["model"][0] for row in rows)
    assert sum(kind["correct"] for kind in told["results"]["model"]["kinds"].values()) == correct
    assert np.asarray(Image.open(tool.folder / "o" / "scenes.png").convert("L")).std() > 5
    assert tool.printed.count(" of 2\n") == 6 and "ceiling" in tool.printed


def test_pictures_are_scored_by_their_captions_and_have_no_ceiling(tool: EvaluateTool) -> None:
    told = tool.score("scenes", "--pictures", tool.draw(*CAPTIONS))
    assert set(told["results"]) == {"model", "chance"}
    counts = {kind: score["count"] for kind, score in told["results"]["model"]["kinds"].items()}
    assert sum(counts.values()) == 3 and counts["counting"] == 1
    assert set(told["settings"]) == {"metric", "pictures"}
    assert "ceiling" not in tool.printed


def test_real_scenes_given_as_pictures_are_right(tool: EvaluateTool) -> None:
    from ecdit_ds.evaluation.digit_scenes.score import heldout_prompts

    scenes = heldout_prompts(seed=3, canvas_height=16, canvas_width=16, per_kind=1)
    scenes += heldout_prompts(seed=3, canvas_height=32, canvas_width=16, per_kind=1)  # of two sizes
    (tool.folder / "real" / "pictures").mkdir(parents=True)
    lines = []
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image_HWC).save(tool.folder / "real" / "pictures" / f"{i}.png")
        lines.append({"index": i, "file": f"pictures/{i}.png", "prompt": scene.caption, "seed": 0})
    (tool.folder / "real" / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = tool.score("scenes", "--pictures", "real")["results"]
    assert results["model"]["exact"] == 1.0
    assert results["chance"]["overall"] < 0.5


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the tool fail where it calls one of these."""

    def fail(*_given: object, **_named: object) -> None:
        raise AssertionError("called again")

    for name in names:
        monkeypatch.setattr(name, fail)


def test_run_again_it_tells_the_same_without_drawing_or_judging(
    tool: EvaluateTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tool.score("scenes", *SCENES)
    printed = tool.printed.removeprefix("drawing 12 pictures in o/drawn\n")
    before = content(tool.folder / "o")
    forbid(monkeypatch, "ecdit_ds.evaluation.metrics.find_objects", "ecdit_ds.evaluation.task.generate_to_folder")
    assert tool.score("scenes", *SCENES) == told
    assert (tool.printed, content(tool.folder / "o")) == (printed, before)


def test_interrupted_between_verdicts_it_judges_only_what_is_missing(
    tool: EvaluateTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ecdit_ds.evaluation import metrics

    whole = tool.score("scenes", *SCENES, output="whole")
    find = metrics.find_objects
    seen: list[int] = []

    def find_and_die(images: np.ndarray) -> Any:
        seen.append(len(images))
        if len(seen) == dies_at:
            raise KeyboardInterrupt
        return find(images)

    monkeypatch.setattr(metrics, "find_objects", find_and_die)
    dies_at = 4  # each batch of 5 looks twice: at what was drawn, and at real scenes
    with pytest.raises(KeyboardInterrupt):
        tool.run("scenes", "--checkpoint", tool.checkpoint, *SCENES, "--output", "cut")
    assert not (tool.folder / "cut" / "results.json").exists()
    seen.clear()
    dies_at = -1
    told = tool.score("scenes", *SCENES, output="cut")
    assert sum(seen) == 2 * 7
    assert told["results"] == whole["results"]
    kept = {name: data for name, data in content(tool.folder / "cut").items() if name != "results.json"}
    assert kept == {name: data for name, data in content(tool.folder / "whole").items() if name != "results.json"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--steps", 2), "steps 1, now it is 2"),
        (("--per-kind", 3), "per_kind 2, now it is 3"),
        (("--seed", 4), "seed 0, now it is 4"),
        (("--weights", "weight"), "weights 'ema', now it is 'weight'"),
        (("--guidance", 3), "guidance None, now it is 3.0"),
    ],
)
def test_other_settings_are_refused_with_both_values_and_nothing_is_lost(
    tool: EvaluateTool, flags: tuple[object, ...], told: str
) -> None:
    tool.score("scenes", *SCENES)
    before = content(tool.folder / "o")
    message = tool.refusal("scenes", "--checkpoint", tool.checkpoint, *SCENES, *flags, "--output", "o")
    assert told in message and "choose another --output" in message
    assert content(tool.folder / "o") == before


def test_another_metric_and_another_number_of_pictures_are_refused(tool: EvaluateTool) -> None:
    pictures = tool.draw(*CAPTIONS[:2])
    tool.score("scenes", "--pictures", pictures)
    metric = tool.refusal("loss", "--checkpoint", tool.checkpoint, "--output", "o")
    assert "metric 'scenes', now it is 'loss'" in metric
    tool.draw(*CAPTIONS)
    assert "holds an evaluation with pictures" in tool.refusal("scenes", "--pictures", pictures, "--output", "o")


def test_a_flag_that_cannot_work_does_not_bind_the_folder(tool: EvaluateTool) -> None:
    command = ("scenes", "--checkpoint", tool.checkpoint, *SCENES, "--output", "o")
    assert "30 pixels" in tool.refusal(*command, "--height", 30)
    assert tool.score("scenes", *SCENES)["settings"]["height"] is None


SCORE = ("scenes", "--checkpoint", "run")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "METRIC"),
        (("beauty",), "invalid choice: 'beauty'"),
        (("scenes",), "--checkpoint, --pictures: give one of them"),
        ((*SCORE, "--pictures", "run"), "--checkpoint, --pictures: give one of them"),
        (("loss",), "--checkpoint"),
        (("scenes", "--checkpoint", "nowhere"), "nowhere"),
        (("scenes", "--pictures", "nowhere"), "holds no pictures"),
        (("scenes", "--pictures", "run", "--steps", 2), "--steps: has no effect on --pictures"),
        (("scenes", "--pictures", "run", "--per-kind", 2), "--per-kind: has no effect on --pictures"),
        (("clip", "--clip", "c", "--pictures", "run", "--limit", 2), "--limit: has no effect on --pictures"),
        ((*SCORE, "--per-kind", 0), "--per-kind: 0"),
        ((*SCORE, "--batch-size", -1), "--batch-size: -1"),
        ((*SCORE, "--height", 8), "16"),
        ((*SCORE, "--height", -4), "-4"),
        ((*SCORE, "--steps", 0), "num_steps: 0"),
        ((*SCORE, "--tp", 2), "tp"),
        ((*SCORE, "--output", "taken"), "taken: "),
        ((*SCORE, "--output", "taken/below"), "taken"),
        (("loss", "--checkpoint", "run", "--times", 0), "--times: 0"),
        (("loss", "--checkpoint", "run", "--samples", 0), "--samples: 0"),
        (("loss", "--checkpoint", "run", "--batch-size", 0), "--batch-size: 0"),
        (("fid", "--checkpoint", "run", "--real", "heldout"), "--features"),
        (("fid", "--checkpoint", "run", "--real", "heldout", "--features", "nowhere"), "features model nowhere"),
        (("fid", "--checkpoint", "run", "--real", "heldout", "--features", "run"), "has no config.json"),
        (("clip", "--checkpoint", "run", "--clip", "nowhere"), "CLIP model nowhere"),
        (("clip", "--checkpoint", "run", "--clip", "nowhere", "--limit", 0), "--limit: 0"),
        (("clip", "--checkpoint", "run", "--clip", "nowhere", "--prompts", "nowhere.txt"), "nowhere.txt"),
        (("geneval", "--checkpoint", "run", "--clip", "c", "--detector", "nowhere"), "object detector nowhere"),
        (("geneval", "--checkpoint", "run", "--clip", "c", "--detector", "d", "--images-per-prompt", 0), "prompt: 0"),
    ],
)
def test_the_command_refuses_in_one_line(tool: EvaluateTool, flags: tuple[object, ...], told: str) -> None:
    (tool.folder / "taken").write_text("mine", encoding="ascii")
    assert told in tool.refusal(*flags)
    assert (tool.folder / "taken").read_text(encoding="ascii") == "mine"
    assert not list(tool.folder.rglob("results.json"))


ENCODED = ("data.dataset=encoded", "data.path=made/set")
OTHER_DATA = (
    (ENCODED, "evaluate.py", ("scenes", *SCENES)),
    (ENCODED, "evaluate.py", ("clip", "--clip", "nowhere")),
    (ENCODED, "evaluate.py", ("fid", "--features", "nowhere", "--real", "DIR")),
    (ENCODED, "heatmaps.py", ("--scenes", 2, "--prompt", "a nine")),
    (("data.dataset=encoded", "data.path=gone"), "evaluate.py", ("scenes", *SCENES)),
    (("data.dataset=encoded", "data.encode=online", "data.path=made"), "evaluate.py", ("scenes", *SCENES)),
)


@pytest.mark.parametrize(
    ("data", "script", "flags", "is_export"),
    [(*case, False) for case in OTHER_DATA] + [(*case, True) for case in OTHER_DATA if "scenes" in str(case[2][0])],
)
def test_digit_scenes_do_not_judge_a_model_of_other_data(
    tool: EvaluateTool,
    make_recipe: MakeRecipe,
    save_model: SaveModel,
    data: tuple[str, ...],
    script: str,
    flags: tuple[object, ...],
    is_export: bool,
) -> None:
    encoders: dict[str, Any] = {
        "image_encoder": image_encoder_spec(PixelVAE()),
        "text_encoder": text_encoder_spec(HashedWordEncoder(embed_dim=24, max_tokens=12)),
    }
    folder = write_set(tool.folder / "made" / "set", [((3, 16, 16), 2)], tokens=12, width=24)
    write_index(folder, dataclasses.replace(read_index(folder), **encoders))
    model = save_model(tool.folder / "other" / "checkpoints", make_recipe(*data))
    if is_export:
        assert convert_ckpt.main(["convert", str(model), str(tool.folder / "new"), "--to", "safetensors"]) == 0
        model = tool.folder / "new"
    metric = flags[:1] if script == "evaluate.py" else ()
    code, lines = tool.run(*metric, "--checkpoint", model, *flags[len(metric) :], tool=script)
    assert code == 2 and len(lines) == 1, lines
    assert "only models of digit scenes" in lines[0] and "data.dataset: encoded" in lines[0]
    assert "--prompt" in lines[0]
    assert not list(tool.folder.rglob("results.json")) and not list(tool.folder.rglob("*.png"))


def test_a_model_of_digit_scenes_that_were_encoded_before_is_still_judged_by_them(
    tool: EvaluateTool, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    recipe = make_recipe("data.num_train=4")
    open_split(recipe, "train", encoders_of(recipe))
    (encoded,) = Path(recipe.data.cache_dir).iterdir()
    tool.checkpoint = save_model(tool.folder / "other", make_recipe("data.dataset=encoded", f"data.path={encoded}"))
    assert tool.score("scenes", *SCENES)["results"]["model"]["kinds"]["single"]["count"] == 2


def encoders_of_scenes(**image: Any) -> dict[str, Any]:
    """Return what a checkpoint of digit scenes says of its encoders; or of the codec of other pictures."""
    words = HashedWordEncoder(embed_dim=24, max_tokens=12)
    return {
        "image": image_encoder_spec(PixelVAE(**image)),
        "text": text_encoder_spec(words),
        "null_text": null_text_facts(words.null()),
    }


@pytest.mark.parametrize(("script", "flags"), [("evaluate.py", SCENES), ("heatmaps.py", ("--scenes", 1))])
def test_an_upcycled_model_of_other_pictures_is_not_judged_by_digit_scenes(
    tool: EvaluateTool,
    make_recipe: MakeRecipe,
    save_model: SaveModel,
    tiny_recipe_file: Path,
    script: str,
    flags: tuple[object, ...],
) -> None:
    dense = make_recipe("model.ffn=dense", *ENCODED)
    meta = {"recipe": dense.to_dict(), "encoders": encoders_of_scenes(shift_factor=(0.1, 0.2, 0.3))}
    command = ["convert", save_model(tool.folder / "dense", dense, 1, meta), tool.folder / "up"]
    command += ["--to", "ecdit", "--upcycle", tiny_recipe_file]
    assert convert_ckpt.main([str(part) for part in command]) == 0
    metric = ("scenes",) if script == "evaluate.py" else ()
    code, lines = tool.run(*metric, "--checkpoint", tool.folder / "up", *flags, tool=script)
    assert code == 2 and len(lines) == 1, lines
    assert "only models of digit scenes" in lines[0] and "through encoders of others" in lines[0]


def test_a_model_of_digit_scenes_whose_set_has_moved_is_judged_if_its_checkpoint_tells_its_encoders(
    tool: EvaluateTool, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    recipe = make_recipe("data.dataset=encoded", "data.path=gone")
    tool.checkpoint = save_model(tool.folder / "old", recipe)
    assert "what is not there cannot be looked at" in tool.refusal("scenes", "--checkpoint", tool.checkpoint, *SCENES)
    usual = {"recipe": recipe.to_dict(), "encoders": encoders_of_scenes()}
    tool.checkpoint = save_model(tool.folder / "new", recipe, 1, usual)
    assert tool.score("scenes", *SCENES)["results"]["model"]["kinds"]["single"]["count"] == 2


def test_pictures_by_a_model_of_other_pictures_are_not_judged_by_digit_scenes(
    tool: EvaluateTool, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    of_others = encoders_of_scenes(shift_factor=(0.1, 0.2, 0.3), scaling_factor=(1.0, 1.0, 1.0))
    meta = {"recipe": make_recipe(*ENCODED).to_dict(), "encoders": of_others}
    tool.checkpoint = save_model(tool.folder / "other", make_recipe(*ENCODED), 1, meta)
    folder = tool.draw(*CAPTIONS)
    said = tool.refusal("scenes", "--pictures", folder)
    assert "only models of digit scenes draw them" in said and "settings.json" in said
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    del settings["trained_on_digit_scenes"]
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    tool.draw(*CAPTIONS)  # a folder of an earlier release is gone on with
    assert tool.score("scenes", "--pictures", folder)["results"]["model"]["kinds"]["counting"]["count"] == 1


def test_captions_that_are_of_no_digit_scene_are_named(tool: EvaluateTool) -> None:
    folder = tool.draw("a nine", "red red red")
    assert "picture 1 is of no digit scene" in tool.refusal("scenes", "--pictures", folder)


def test_a_damaged_picture_is_named_and_verdicts_so_far_are_kept(tool: EvaluateTool) -> None:
    folder = tool.draw(*CAPTIONS)
    picture = next(folder.rglob("000002_*.png"))
    whole = picture.read_bytes()
    picture.write_bytes(whole[:40])
    command = ("scenes", "--pictures", folder, "--batch-size", 1, "--output", "o")
    assert picture.name in tool.refusal(*command)
    assert (tool.folder / "o" / "verdicts.rank_0.jsonl").read_text().count("\n") == 2
    picture.write_bytes(whole)
    assert tool.score(*command[:-2])["results"]["model"]["kinds"]["counting"]["count"] == 1


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"results": 5}', b"{}"])
@pytest.mark.parametrize("name", ["results.json", "evaluation.json"])
def test_a_damaged_file_of_the_folder_is_named(tool: EvaluateTool, name: str, damaged: bytes) -> None:
    folder = tool.draw("a nine")
    tool.score("scenes", "--pictures", folder)
    (tool.folder / "o" / name).write_bytes(damaged)
    before = content(tool.folder / "o")
    message = tool.refusal("scenes", "--pictures", folder, "--output", "o")
    assert str(Path("o")) in message and ("delete it" in message or "choose another --output" in message)
    assert content(tool.folder / "o") == before


@pytest.mark.parametrize(
    "change", [{"kind": "beauty"}, {"scores": []}, {"scores": {"model": [True, True]}}, {"index": "0"}]
)
def test_a_verdict_that_nobody_gave_is_refused_by_its_line(tool: EvaluateTool, change: dict[str, Any]) -> None:
    folder = tool.draw("a nine")
    tool.score("scenes", "--pictures", folder)
    (tool.folder / "o" / "results.json").unlink()
    path = tool.folder / "o" / "verdicts.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    assert "verdicts.jsonl line 1: " in tool.refusal("scenes", "--pictures", folder, "--output", "o")


def test_a_full_disk_is_told_in_one_line_and_keeps_the_verdicts(
    tool: EvaluateTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_given: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tool.draw("a nine")
    with monkeypatch.context() as patch:
        patch.setattr("ecdit_ds.evaluation.metrics.save_grid", full)
        message = tool.refusal("scenes", "--pictures", folder, "--output", "o")
    assert "scenes.png: cannot be written: No space left" in message
    forbid(monkeypatch, "ecdit_ds.evaluation.metrics.find_objects")
    assert tool.score("scenes", "--pictures", folder)["results"]["model"]["kinds"]
