"""A checkpoint and what is made of it draw without the training set and the run: they say what their encoders were."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ecdit_ds.config.recipe import STATE_NAMES, Recipe
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE, TextEmbeddings
from ecdit_ds.data.encoders.from_recipe import describe_encoders
from ecdit_ds.data.encoders.pretrained import load_text_encoder
from ecdit_ds.data.encoders.spec import null_text_facts, null_text_of
from ecdit_ds.data.splits import open_split
from ecdit_ds.errors import CheckpointError
from ecdit_ds.inference.load import EncoderFolders, load_generator, open_encoders, open_model
from ecdit_ds.pipeline import TextToImagePipeline
from ecdit_ds.training.train_state import (
    TrainProgress,
    check_same_data,
    check_same_encoders,
    check_same_recipe,
    checkpoint_metadata,
)
from tests.helpers.evaluate_tool import EvaluateTool
from tests.helpers.own_pictures import encode, write_pictures
from tests.helpers.random_model import save_random_model
from tests.helpers.tiny_encoders import save_clip_text, save_t5, save_vae
from tools import convert_ckpt

MakeRecipe = Callable[..., Recipe]
Refusal = Callable[[Callable[[], object]], str]
PROMPT = "a square on white"
KINDS = ("weight", "ema", *STATE_NAMES["adamw"])


def save_run(folder: Path, recipe: Recipe, **changes: Any) -> Path:
    """Write a run's folder with a random model whose checkpoint says what a run's says of its encoders."""
    (train,) = open_split(recipe, "train", None)
    described = describe_encoders(recipe, train.null_text) | changes
    meta = checkpoint_metadata(TrainProgress(step=1, samples_seen=8, num_updates=1), recipe, {}, described)
    save_random_model(folder / "checkpoints", recipe, meta=meta, kinds=KINDS)
    return folder


@pytest.fixture
def pixels(make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """Return a recipe of own pictures without an autoencoder."""
    train = encode(write_pictures(tmp_path / "pictures", 6), tmp_path / "train")
    return make_recipe("data.dataset=encoded", f"data.path={train}", f"data.heldout_path={train}")


@pytest.fixture
def autoencoded(make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """Return a recipe of own pictures through an autoencoder and two text models, in `encoders`."""
    vae = save_vae(tmp_path / "encoders" / "vae")
    texts = save_t5(tmp_path / "encoders" / "t5"), save_clip_text(tmp_path / "encoders" / "clip")
    pictures = write_pictures(tmp_path / "more_pictures", 6)
    flags = ("--vae", vae, "--text", *texts, "--text-tokens", 20, "--dtype", "bf16")
    train = encode(pictures, tmp_path / "latents", "--size", 64, *flags)
    return make_recipe(
        "data.dataset=encoded",
        f"data.path={train}",
        f"data.heldout_path={train}",
        "model.in_channels=5",
        "model.text_embed_dim=28",
        "model.max_text_tokens=20",
    )


def convert(source: Path, destination: Path, *flags: str) -> Path:
    """Convert as tools/convert_ckpt.py does, and return the new folder."""
    assert convert_ckpt.main(["convert", str(source), str(destination), *flags]) == 0
    return destination


def pictures_of(pipeline: TextToImagePipeline) -> np.ndarray:
    """Return pixels of two pictures."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return np.stack(pipeline([PROMPT, "nothing"], generator=generator, output_type="np").images)


@pytest.fixture
def tool(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> EvaluateTool:
    """Run the tools in a folder of their own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return EvaluateTool(folder, folder / "model", monkeypatch, capsys)


def test_an_export_draws_where_neither_the_set_nor_the_run_is(
    pixels: Recipe, tmp_path: Path, tool: EvaluateTool
) -> None:
    run = save_run(tmp_path / "run", pixels)
    at_home = pictures_of(TextToImagePipeline.from_pretrained(run))
    shutil.copytree(convert(run, tmp_path / "exported", "--to", "safetensors"), tool.checkpoint)
    for name in ("train", "pictures", "exported"):
        (tmp_path / name).rename(tmp_path / f"{name} is away")
    assert np.array_equal(pictures_of(TextToImagePipeline.from_pretrained(run)), at_home), "a run whose set has moved"
    run.rename(tmp_path / "run is away")
    assert np.array_equal(pictures_of(TextToImagePipeline.from_pretrained(tool.checkpoint)), at_home)
    assert at_home.std() > 0.05, "it draws something"

    folder = tool.draw(PROMPT)
    (path,) = (folder / "pictures").iterdir()
    with Image.open(path) as picture:
        assert picture.size == (16, 16)
    flags = ("--checkpoint", tool.checkpoint, "--prompt", PROMPT, "--steps", "1", "--output", "maps")
    assert tool.run(*flags, tool="heatmaps.py") == (0, [])
    (tmp_path / "train is away").rename(tmp_path / "train")  # the held-out loss is of a held-out set
    assert tool.score("loss", "--times", 2)["results"]["mean"] > 0


def test_encoders_that_have_moved_are_named_by_hand_and_others_are_refused(
    autoencoded: Recipe, tmp_path: Path, refusal_of: Refusal, tool: EvaluateTool
) -> None:
    run, home, away = save_run(tmp_path / "run", autoencoded), tmp_path / "encoders", tool.folder / "away"
    exported = convert(run, tool.checkpoint, "--to", "safetensors")
    at_home = pictures_of(TextToImagePipeline.from_pretrained(exported))
    other = save_vae(tmp_path / "other", seed=1)
    (tmp_path / "latents").rename(tmp_path / "latents are away")
    home.rename(away)
    message = refusal_of(lambda: TextToImagePipeline.from_pretrained(exported))
    assert str(home / "vae") in message and message.endswith("say where: --vae DIR (in Python, vae=DIR)")
    vae, texts = away / "vae", [away / "t5", away / "clip"]
    message = refusal_of(lambda: TextToImagePipeline.from_pretrained(exported, vae=vae))
    assert str(home / "t5") in message and message.endswith("say where: --text DIR (in Python, text=DIR)")
    assert np.array_equal(pictures_of(TextToImagePipeline.from_pretrained(exported, vae=vae, text=texts)), at_home)
    for folders in (
        EncoderFolders(vae=str(other), text=[str(t) for t in texts]),
        EncoderFolders(vae=str(vae), text=[str(texts[0])]),
        EncoderFolders(vae=str(vae), text=[str(t) for t in reversed(texts)]),
    ):
        message = refusal_of(lambda: load_generator(exported, folders=folders))  # noqa: B023
        assert "was encoded with" in message and "but this is" in message
    flags = ("--checkpoint", exported, "--prompt", PROMPT, "--steps", "1")
    code, lines = tool.run(*flags, tool="sample.py")
    assert code == 2 and len(lines) == 1 and "--vae DIR" in lines[0]
    for name in ("sample.py", "heatmaps.py"):
        assert tool.run(*flags, "--output", name, "--vae", vae, "--text", *texts, tool=name) == (0, [])
    spread = TextToImagePipeline.from_pretrained(exported, device_map={"": "cpu"}, vae=vae, text=texts)
    assert np.allclose(pictures_of(spread), at_home, atol=1e-5)


def test_folders_of_encoders_that_need_none_are_refused(
    pixels: Recipe, tmp_path: Path, refusal_of: Refusal, tool: EvaluateTool
) -> None:
    run = save_run(tmp_path / "run", pixels)
    assert "--vae: has no effect" in refusal_of(lambda: TextToImagePipeline.from_pretrained(run, vae=tmp_path))
    assert "--text: has no effect" in refusal_of(lambda: TextToImagePipeline.from_pretrained(run, text=tmp_path))
    shutil.copytree(run, tool.checkpoint)
    drawn = tool.draw("a red seven")
    for flag in ("--vae", "--text"):
        line = tool.refusal("scenes", "--pictures", drawn, flag, tmp_path, "--output", "o")
        assert f"{flag}: has no effect on --pictures" in line


@pytest.mark.parametrize(
    "flags",
    [
        ("--to", "ecdit"),
        ("--to", "ecdit", "--only", "ema"),
        ("--to", "ecdit", "--only", "ema", "--dtype", "bf16"),
        ("--to", "ecdit", "--files", "2"),
        ("--to", "safetensors"),
        ("--to", "safetensors", "--only", "weights", "--dtype", "fp16"),
        ("--to", "universal"),
    ],
)
def test_every_conversion_keeps_what_the_encoders_were(pixels: Recipe, tmp_path: Path, flags: tuple[str, ...]) -> None:
    run = save_run(tmp_path / "run", pixels)
    described = json.loads(json.dumps(open_model(run).encoders))
    made = convert(run, tmp_path / "made", *flags)
    if "universal" in flags:
        made = convert(made, tmp_path / "back", "--to", "ecdit")
    kind = "weight" if "weights" in flags else "ema"
    assert described and open_model(made, kind).encoders == described


def test_upcycling_keeps_what_the_encoders_were(
    pixels: Recipe, tmp_path: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = replace(pixels, model=replace(pixels.model, ffn="dense", num_experts=1))
    run = save_run(tmp_path / "run", dense)
    made = convert(run, tmp_path / "made", "--to", "ecdit", "--upcycle", str(tiny_recipe_file))
    assert open_model(made).encoders == open_model(run).encoders
    assert open_model(made).recipe.model.ffn == "expert_choice"
    capsys.readouterr()
    assert convert_ckpt.main(["inspect", str(made)]) == 0
    shown = capsys.readouterr().out
    assert f"encoders     images {PixelVAE(shift_factor=0.0).identity[:9]}" in shown and "texts words-3-24x12" in shown


def test_a_difference_of_encoders_is_told_in_short_lines(
    pixels: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = null_text_facts(HashedWordEncoder(embed_dim=2000, max_tokens=12).null())
    one, other = save_run(tmp_path / "one", pixels), save_run(tmp_path / "other", pixels, null_text=long)
    capsys.readouterr()
    assert convert_ckpt.main(["diff", str(one), str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("meta.encoders.null_text.embeds: ") for line in lines)
    assert max(map(len, lines)) < 2500


def test_the_text_of_no_text_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    names = [str(save_t5(tmp_path / "t5")), str(save_clip_text(tmp_path / "clip"))]
    for encoder in (HashedWordEncoder(embed_dim=6, max_tokens=4), load_text_encoder(names, max_tokens=24)):
        null = encoder.null()
        again = null_text_of(json.loads(json.dumps(null_text_facts(null))))
        assert torch.equal(again.embeds_BTD, null.embeds_BTD) and torch.equal(again.pooled_BD, null.pooled_BD)
        assert torch.equal(again.mask_BT, null.mask_BT) and again.mask_BT.dtype == torch.bool


def test_guidance_leads_away_from_the_text_that_training_dropped_texts_to(autoencoded: Recipe, tmp_path: Path) -> None:
    (train,) = open_split(autoencoded, "train", None)
    drawer = load_generator(save_run(tmp_path / "run", autoencoded))
    assert drawer.null_text is not None
    own = drawer.text_encoder.null()
    assert torch.equal(drawer.null_text.embeds_BTD, train.null_text.embeds_BTD)
    assert not torch.equal(drawer.null_text.embeds_BTD, own.embeds_BTD), "the set's is rounded, as its captions are"
    noise: dict[str, Any] = {"seeds": [0], "sample": drawer.settings(guidance_scale=3.0)}
    other = TextEmbeddings(embeds_BTD=own.embeds_BTD + 1, mask_BT=own.mask_BT, pooled_BD=own.pooled_BD + 1)
    drawn = drawer.draw([PROMPT], **noise)
    assert not torch.allclose(replace(drawer, null_text=other).draw([PROMPT], **noise), drawn, atol=1e-3)
    assert torch.equal(
        replace(drawer, null_text=own).draw([PROMPT], **noise), replace(drawer, null_text=None).draw([PROMPT], **noise)
    )


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("image", None),
        ("text", "words"),
        ("null_text", {}),
        ("null_text", {"tokens": 12, "places": [0]}),
        ("null_text", {"tokens": 12, "places": [12], "embeds": "AAAAAA==", "pooled": "AAAAAA=="}),
        ("null_text", {"tokens": 12, "places": [0], "embeds": "AAAAAA==", "pooled": "AAAAAA=="}),
        ("null_text", {"tokens": 12, "places": [0], "embeds": "?", "pooled": "AAAAAA=="}),
    ],
)
def test_a_damaged_description_is_one_line(
    pixels: Recipe, tmp_path: Path, refusal_of: Refusal, part: str, value: object
) -> None:
    run = save_run(tmp_path / "run", pixels, **{part: value})
    assert str(run / "checkpoints" / "step_1") in refusal_of(lambda: load_generator(run))


@pytest.mark.parametrize(
    "facts",
    [
        {"kind": "pixels", "identity": "x", "shift_factor": [0.0]},
        {"kind": "pixels", "identity": "x", "shift_factor": "a", "scaling_factor": 1.0},
        {"kind": "pixels", "identity": "x", "shift_factor": [0.0], "scaling_factor": [1.0]},
        {"kind": "unknown", "identity": "x"},
    ],
)
def test_an_encoder_that_cannot_be_opened_by_its_description_is_one_line(
    pixels: Recipe, tmp_path: Path, refusal_of: Refusal, facts: dict[str, object]
) -> None:
    run = save_run(tmp_path / "run", pixels, image=facts)
    assert "image encoder" in refusal_of(lambda: load_generator(run))


def test_a_checkpoint_of_an_earlier_release_draws_by_its_set_and_pixels_by_the_factors_of_then(
    pixels: Recipe, autoencoded: Recipe, tmp_path: Path, refusal_of: Refusal
) -> None:
    old, other = save_random_model(tmp_path / "old", pixels), save_random_model(tmp_path / "other", autoencoded)
    drawer = load_generator(old)
    assert drawer.image_encoder == PixelVAE() and drawer.null_text is None
    assert load_generator(other).image_encoder.identity.startswith("AutoencoderKL-")
    online = replace(pixels, data=replace(pixels.data, encode="online", path=str(tmp_path / "pictures")))
    save_random_model(tmp_path / "online", online)
    assert load_generator(tmp_path / "online").image_encoder == PixelVAE()
    (tmp_path / "latents").rename(tmp_path / "latents are away")
    assert f"{tmp_path / 'latents'}: is not there" in refusal_of(lambda: load_generator(other))


def test_a_run_that_encodes_beside_training_says_by_what(
    pixels: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, t5 = save_vae(tmp_path / "vae", channels=3), save_t5(tmp_path / "t5")
    data = replace(pixels.data, encode="online", path=str(tmp_path / "pictures"), vae=str(vae), text=(str(t5),))
    online = replace(pixels, data=data, model=replace(pixels.model, text_embed_dim=12, max_text_tokens=40))
    null = load_text_encoder([str(t5)], max_tokens=40).null()
    described = describe_encoders(online, null)
    assert (described["image"]["name"], described["text"]["names"]) == (str(vae), [str(t5)])
    monkeypatch.chdir(tmp_path)
    near = replace(online, data=replace(data, vae="vae", text=("t5",)))
    assert describe_encoders(near, null) == described, "named from here, it is found from everywhere"
    save_random_model(tmp_path / "run", online, meta={"recipe": online.to_dict(), "encoders": described})
    (tmp_path / "pictures").rename(tmp_path / "pictures are away")
    images, texts, kept = open_encoders(open_model(tmp_path / "run"))
    assert (images.downsampling, texts.max_tokens) == (4, 40)
    assert kept is not None and torch.equal(kept.pooled_BD, null.pooled_BD)


def test_factors_of_pixels_may_be_written_down_to_go_on_with_a_run_that_had_them(
    pixels: Recipe, tmp_path: Path
) -> None:
    asked = replace(pixels, data=replace(pixels.data, shift_factor=(-0.83,), scaling_factor=(2.2,)))
    check_same_recipe(pixels.to_dict(), asked, tmp_path)
    beside = [
        describe_encoders(recipe, HashedWordEncoder(embed_dim=24, max_tokens=12).null())["image"]["identity"]
        for recipe in (asked, pixels)
    ]
    assert beside[0] == "pixels-2--0.83-2.2", "what raw files went through in earlier releases"
    before, now = ({"sets": ["a"], "encoders_beside": [name, "words"]} for name in beside)
    check_same_data(before, before, tmp_path)
    with pytest.raises(CheckpointError, match=r"were \['pixels-2--0\.83-2\.2', .* now \['pixels-2-0\."):
        check_same_data(before, now, tmp_path)


def test_a_run_does_not_go_on_through_other_encoders(pixels: Recipe, tmp_path: Path) -> None:
    now = describe_encoders(pixels, HashedWordEncoder(embed_dim=24, max_tokens=12).null())
    check_same_encoders(None, now, tmp_path)
    check_same_encoders(json.loads(json.dumps(now)), now, tmp_path)
    shift = json.loads(json.dumps(now["image"]["shift_factor"]))
    before = now | {"image": now["image"] | {"identity": "pixels-2-x", "shift_factor": shift, "scaling_factor": 2.0}}
    with pytest.raises(CheckpointError) as refused:
        check_same_encoders(before, now, tmp_path)
    flags = f"--set data.shift_factor=[{','.join(map(str, shift))}] --set data.scaling_factor=[2.0], or"
    assert "was trained through the image encoder pixels-2-x, now it is pixels-2-" in str(refused.value)
    assert flags in str(refused.value)
    with pytest.raises(CheckpointError, match="the text encoder other, now it is words-3-24x12; bring the former back"):
        check_same_encoders(now | {"text": {"identity": "other"}}, now, tmp_path)
