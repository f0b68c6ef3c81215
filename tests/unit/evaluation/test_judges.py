"""The command that scores pictures, by judges that are models: FID, CLIP score and GenEval, with tiny random ones."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.sources.images import decode_image
from ecdit_ds.evaluation.geneval import models as geneval_models
from ecdit_ds.evaluation.geneval import prompts as geneval_prompts
from ecdit_ds.inference.image_folder import read_gallery
from tests.helpers.colour_profiles import rgb_profile
from tests.helpers.evaluate_tool import EvaluateTool
from tests.helpers.photographs import encoded
from tests.helpers.tiny_judges import pictures as noise
from tests.helpers.tiny_judges import save_clip, save_vit, save_yolos

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]

WANTED = ("a red seven", "two green fives")
METADATA = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": WANTED[0]},
    {"tag": "counting", "include": [{"class": "mouse", "count": 2}], "prompt": WANTED[1]},
]


@pytest.fixture
def tool(
    tmp_path: Path,
    make_recipe: MakeRecipe,
    save_model: SaveModel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> EvaluateTool:
    """Return the tool beside a checkpoint of a random model and, in `judges`, random judges."""
    save_vit(tmp_path / "judges" / "vit")
    save_clip(tmp_path / "judges" / "clip")
    save_yolos(tmp_path / "judges" / "yolos")
    write_metadata(tmp_path / "prompts.jsonl")
    capfd.readouterr()
    return EvaluateTool(tmp_path, save_model(tmp_path / "run" / "checkpoints", make_recipe()), monkeypatch, capfd)


def write_metadata(path: Path, **changes: object) -> None:
    """Write two prompts, the second one changed."""
    lines = [METADATA[0], {**METADATA[1], **changes}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


FID = ("--features", "judges/vit")
GENEVAL = ("--detector", "judges/yolos", "--clip", "judges/clip")


def test_the_distance_of_a_set_to_itself_is_zero_and_to_another_is_not(tool: EvaluateTool) -> None:
    folder = tool.draw(*WANTED, "a nine")
    same = tool.score("fid", "--pictures", folder, *FID, "--real", folder)["results"]
    assert (same["pictures"], same["real_pictures"]) == (3, 3)  # and not the grids that lie beside them
    assert same["fid"] == pytest.approx(0, abs=1e-4)
    (tool.folder / "real").mkdir()
    for i, picture in enumerate(noise(4)):
        picture.save(tool.folder / "real" / f"{i}.jpg")
    other = tool.score("fid", "--pictures", folder, *FID, "--real", "real", output="other")["results"]
    assert other["real_pictures"] == 4
    assert other["fid"] > 0.1


def test_scores_name_the_revision_of_judges_that_came_from_the_hub_and_none_of_folders(
    tool: EvaluateTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tool.folder / "hub"))
    commits = {"vit": "1" * 40, "clip": "2" * 40, "yolos": "3" * 40}
    for name, commit in commits.items():
        repository = tool.folder / "hub" / f"models--somebody--{name}"
        shutil.copytree(tool.folder / "judges" / name, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    folder = tool.draw(*WANTED)
    commands: dict[str, tuple[object, ...]] = {
        "clip": ("clip", "--pictures", folder, "--clip", "OWNER/clip"),
        "fid": ("fid", "--pictures", folder, "--features", "OWNER/vit", "--real", folder),
        "geneval": (
            "geneval",
            "--checkpoint",
            "run",
            "--detector",
            "OWNER/yolos",
            "--clip",
            "OWNER/clip",
            "--metadata",
            "prompts.jsonl",
            "--images-per-prompt",
            1,
            "--steps",
            1,
        ),
    }
    wanted = {
        "clip": {"clip_revision": "2" * 40},
        "fid": {"features_revision": "1" * 40},
        "geneval": {"detector_revision": "3" * 40, "clip_revision": "2" * 40},
    }
    for owner in ("somebody", "judges"):
        for metric, command in commands.items():
            named = [str(word).replace("OWNER", owner) for word in command]
            results = tool.score(*named, output=f"{owner}-{metric}")["results"]
            told = {name: value for name, value in results.items() if name.endswith("_revision")}
            assert told == (wanted[metric] if owner == "somebody" else {})


def test_kept_statistics_of_real_scenes_give_the_distance_that_the_scenes_give(tool: EvaluateTool) -> None:
    drawn = ("--limit", 3, "--steps", 1)
    real = tool.score("fid", *FID, *drawn, "--real", "heldout")["results"]
    assert real["real_pictures"] == 8
    again = ("fid", *FID, *drawn, "--real", "heldout", "--save-real", "kept/real.safetensors")
    assert tool.score(*again)["results"] == real
    kept = tool.score("fid", *FID, *drawn, "--real", "kept/real.safetensors", output="kept")["results"]
    assert kept == real
    (tool.folder / "file").write_text("mine", encoding="ascii")
    command = ("fid", "--checkpoint", tool.checkpoint, *FID, *drawn, "--real", "heldout", "--output", "p")
    assert "cannot be written" in tool.refusal(*command, "--save-real", "file/real.safetensors")


def test_real_pictures_are_read_as_training_reads_them(tool: EvaluateTool) -> None:
    folder = tool.draw(*WANTED)
    for name, options in (("plain", {}), ("of_phones", {"icc_profile": rgb_profile()})):
        (tool.folder / name).mkdir()
        for i, picture in enumerate(noise(3)):
            content = encoded(picture, "PNG", **options)
            if name == "plain":  # what training makes of them
                content = encoded(decode(encoded(picture, "PNG", icc_profile=rgb_profile())), "PNG")
            (tool.folder / name / f"{i}.png").write_bytes(content)
    (tool.folder / "of_phones" / "._0.png").write_bytes(b"left by a Mac")
    results = [
        tool.score("fid", "--pictures", folder, *FID, "--real", name, output=f"o_{name}")["results"]
        for name in ("plain", "of_phones")
    ]
    assert results[0] == results[1] and results[0]["real_pictures"] == 3


def decode(content: bytes) -> Image.Image:
    """Return the picture of a good file."""
    image = decode_image(content, "")
    assert isinstance(image, Image.Image)
    return image


def test_real_pictures_that_are_not_there_or_are_damaged_are_named(tool: EvaluateTool) -> None:
    command = ("fid", "--pictures", tool.draw(*WANTED), *FID, "--output", "o", "--real")
    assert "holds no pictures" in tool.refusal(*command, "nowhere")
    assert "needs the recipe of a --checkpoint" in tool.refusal(*command, "heldout")
    assert "real.safetensors: cannot be read" in tool.refusal(*command, "real.safetensors")
    (tool.folder / "real").mkdir()
    (tool.folder / "real" / "1.png").write_bytes(b"no picture")
    assert "1.png: is no picture" in tool.refusal(*command, "real")


def test_the_clip_score_is_the_mean_of_kept_scores_and_a_prompt_file_is_a_setting(tool: EvaluateTool) -> None:
    (tool.folder / "p.txt").write_text("a nine\na six\n", encoding="utf-8")
    flags = ("--clip", "judges/clip", "--prompts", "p.txt", "--steps", 1)
    told = tool.score("clip", *flags)
    rows = [json.loads(line) for line in (tool.folder / "o" / "verdicts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a nine", "a six"]
    assert told["results"] == {"clip_score": math.fsum(row["score"] for row in rows) / 2, "pictures": 2}
    given = tool.score("clip", "--clip", "judges/clip", "--pictures", tool.folder / "o" / "drawn", output="given")
    assert given["results"] == told["results"]
    (tool.folder / "p.txt").write_text("a nine\na two\n", encoding="utf-8")
    assert "prompts_digest" in tool.refusal("clip", "--checkpoint", tool.checkpoint, *flags, "--output", "o")


def test_another_judge_or_other_real_pictures_at_the_same_path_are_another_evaluation(tool: EvaluateTool) -> None:
    pictures = tool.draw(*WANTED)
    tool.score("clip", "--clip", "judges/clip", "--pictures", pictures, output="c")
    (weights,) = (tool.folder / "judges" / "clip").glob("*.safetensors")
    tensors = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    refused = tool.refusal("clip", "--clip", "judges/clip", "--pictures", pictures, "--output", "c")
    assert "with clip_identity" in refused
    command = ("fid", *FID, "--pictures", pictures, "--real", tool.folder / "real", "--output", "f")
    shutil.copytree(pictures / "pictures", tool.folder / "real")
    tool.score(*command[:-2], output="f")
    next((tool.folder / "real").iterdir()).unlink()
    assert "with real " in tool.refusal(*command)


def test_geneval_judges_each_prompts_pictures_once(tool: EvaluateTool, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*GENEVAL, "--metadata", "prompts.jsonl", "--images-per-prompt", 2, "--steps", 1)
    told = tool.score("geneval", *flags)
    folder = tool.folder / "o" / "drawn"
    assert [picture.prompt for picture in read_gallery(folder)] == [WANTED[0]] * 2 + [WANTED[1]] * 2
    assert {tag: score["pictures"] for tag, score in told["results"]["tasks"].items()} == {
        "single_object": 2,
        "counting": 2,
    }
    given = ("geneval", *GENEVAL, "--metadata", "prompts.jsonl", "--pictures", folder, "--images-per-prompt")
    assert tool.score(*given, 2, output="given")["results"] == told["results"]
    assert "holds 4 pictures, but the prompts ask for 2" in tool.refusal(*given, 1, "--output", "p")
    write_metadata(tool.folder / "prompts.jsonl", prompt="a six")
    assert "picture 2 is of 'two green fives', the prompts say 'a six'" in tool.refusal(*given, 2, "--output", "p")

    def fail(*_given: object, **_named: object) -> None:
        raise AssertionError("judged again")

    write_metadata(tool.folder / "prompts.jsonl")
    monkeypatch.setattr(geneval_models, "judge_pictures", fail)
    assert tool.score("geneval", *flags) == told


def test_geneval_interrupted_goes_on_with_what_is_missing(tool: EvaluateTool, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*GENEVAL, "--metadata", "prompts.jsonl", "--images-per-prompt", 2, "--steps", 1, "--batch-size", 1)
    whole = tool.score("geneval", *flags, output="whole")["results"]
    judge, calls = geneval_models.judge_pictures, iter(range(99))

    def die_at_third(*given: object, **named: object) -> object:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return judge(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(geneval_models, "judge_pictures", die_at_third)
    with pytest.raises(KeyboardInterrupt):
        tool.run("geneval", "--checkpoint", tool.checkpoint, *flags, "--output", "cut")
    assert tool.score("geneval", *flags, output="cut")["results"] == whole
    assert next(calls) == 5  # two verdicts, the interrupted one, and two more


def test_prompts_that_the_judge_or_the_model_does_not_know_are_named(tool: EvaluateTool) -> None:
    command = ("geneval", "--checkpoint", tool.checkpoint, *GENEVAL, "--output", "o")
    write_metadata(tool.folder / "prompts.jsonl", include=[{"class": "unicorn", "count": 1}])
    message = tool.refusal(*command, "--metadata", "prompts.jsonl")
    assert "prompts.jsonl line 2" in message and "'unicorn' is not one of the detector's" in message
    assert "cannot be drawn from" in tool.refusal(*command)  # 80 single objects, of four classes


def test_drawn_prompts_are_those_of_the_seed(tool: EvaluateTool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geneval_prompts, "NUM_PROMPTS", {"single_object": 2})  # the judge knows few classes
    flags = (*GENEVAL, "--limit", 1, "--images-per-prompt", 1, "--steps", 1, "--seed")
    prompts = {}
    for seed in (0, 1, 2):
        told = tool.score("geneval", *flags, seed, output=f"o{seed}")
        assert told["results"]["tasks"]["single_object"]["pictures"] == 1
        (picture,) = read_gallery(tool.folder / f"o{seed}" / "drawn")
        assert picture.seed == seed
        prompts[seed] = picture.prompt
    assert all(prompt.startswith("a photo of ") for prompt in prompts.values())
    assert len(set(prompts.values())) > 1
