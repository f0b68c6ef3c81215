"""From a checkpoint and prompts to pictures, and the command that does it for a person."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ecdit_ds.config import Recipe
from ecdit_ds.errors import CheckpointError, DataError
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.pipeline import TextToImage, load_pipeline
from ecdit_ds.seeding import parameter_generator

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]
Run = Callable[..., tuple[int, list[str]]]

TOOL = Path(__file__).resolve().parents[2] / "tools" / "sample.py"
PROMPTS = ["a red seven", "two green fives", "a blue three"]


@pytest.fixture
def checkpoint(tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel) -> Path:
    """Return a checkpoint of a random model, the only one of its run."""
    return save_model(tmp_path / "run" / "checkpoints", make_recipe())


@pytest.fixture
def pipeline(checkpoint: Path) -> TextToImage:
    """Return what samples from it."""
    return load_pipeline(checkpoint)


def draw(pipeline: TextToImage, prompts: list[str], *, seed: int = 0, guidance_scale: float = 2.0) -> Tensor:
    """Return pictures drawn as the recipe says."""
    sample = replace(pipeline.recipe.sample, guidance_scale=guidance_scale)
    return pipeline.draw(prompts, seed=seed, sample=sample)


def damage(checkpoint: Path) -> Path:
    """Flip one bit of the averaged weights and return the file."""
    (shard,) = checkpoint.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # the last tensor's last byte; `ema/` comes after `weight/`
    shard.write_bytes(bytes(data))
    return shard


@pytest.mark.parametrize("weights", ["ema", "weight"])
def test_a_loaded_model_holds_the_saved_numbers_bit_for_bit(checkpoint: Path, weights: str) -> None:
    model = load_pipeline(checkpoint, weights=weights).model
    assert isinstance(model, ECDiT)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=parameter_generator(0, f"{weights}/{name}"))
        assert torch.equal(parameter, ("norm" in name) + 0.2 * noise), name
    assert not model.training


def test_loading_twice_gives_the_same_pictures_bit_for_bit(checkpoint: Path, pipeline: TextToImage) -> None:
    run = load_pipeline(checkpoint.parents[1])
    assert run.recipe == pipeline.recipe
    assert torch.equal(draw(run, PROMPTS), draw(pipeline, PROMPTS))


def test_the_average_and_the_last_weights_draw_differently(checkpoint: Path, pipeline: TextToImage) -> None:
    last = load_pipeline(checkpoint, weights="weight")
    assert not torch.equal(draw(last, PROMPTS), draw(pipeline, PROMPTS))


def test_the_newest_checkpoint_of_a_run_is_taken(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    for step, name in ((5, "old"), (10, "new"), (9, "middle")):
        save_model(tmp_path / "checkpoints", replace(make_recipe(), name=name), step)
    assert load_pipeline(tmp_path).recipe.name == "new"
    assert load_pipeline(tmp_path / "checkpoints").recipe.name == "new"
    assert load_pipeline(tmp_path / "checkpoints" / "step_9").recipe.name == "middle"


def test_pictures_have_the_canvas_of_the_recipe_and_are_not_blank(pipeline: TextToImage) -> None:
    pictures = draw(pipeline, PROMPTS)
    assert pictures.shape == (3, 3, 16, 16)
    assert float(pictures.abs().max()) <= 1.0
    assert float(pictures.std()) > 0.1


def test_pictures_depend_on_the_seed_and_on_nothing_else(pipeline: TextToImage) -> None:
    torch.manual_seed(1)
    first = draw(pipeline, PROMPTS, seed=3)
    torch.manual_seed(2)
    assert torch.equal(draw(pipeline, PROMPTS, seed=3), first)
    assert not torch.equal(draw(pipeline, PROMPTS, seed=4), first)


def test_a_prompts_picture_does_not_depend_on_its_neighbours(pipeline: TextToImage) -> None:
    pictures = draw(pipeline, PROMPTS)
    assert torch.equal(draw(pipeline, [PROMPTS[0], "a nine", "a four"])[0], pictures[0])
    torch.testing.assert_close(draw(pipeline, PROMPTS[:1])[0], pictures[0], rtol=0, atol=1e-5)


def test_the_same_prompt_is_drawn_from_other_noise_at_each_place(pipeline: TextToImage) -> None:
    first, second = draw(pipeline, ["a nine", "a nine"])
    assert not torch.allclose(first, second, atol=1e-2)


def test_a_pool_of_several_images_is_filled_by_repeating_the_last_prompt(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    recipe = make_recipe("model.routing_pool=group", "model.routing_group=4")
    pipeline = load_pipeline(save_model(tmp_path / "pools", recipe))
    prompts = [*PROMPTS, "a six", "a white nine"]
    pictures = draw(pipeline, prompts)
    assert len(pictures) == 5
    assert torch.equal(draw(pipeline, [*prompts, *["a white nine"] * 3])[:5], pictures)
    in_company = draw(pipeline, [*prompts, *["four pink ones"] * 3])
    assert torch.equal(in_company[:4], pictures[:4])
    assert not torch.equal(in_company[4], pictures[4])


def test_guidance_and_the_prompt_change_the_picture(pipeline: TextToImage) -> None:
    plain = draw(pipeline, PROMPTS, guidance_scale=1.0)
    assert not torch.allclose(draw(pipeline, PROMPTS, guidance_scale=3.0), plain, atol=1e-3)
    assert not torch.allclose(
        draw(pipeline, ["a white nine", *PROMPTS[1:]], guidance_scale=1.0)[0], plain[0], atol=1e-3
    )


def test_without_the_text_guidance_nothing_of_the_prompt_is_seen(pipeline: TextToImage) -> None:
    blind = draw(pipeline, PROMPTS, guidance_scale=0.0)
    torch.testing.assert_close(draw(pipeline, ["", "", ""], guidance_scale=1.0), blind, rtol=0, atol=1e-6)


def test_a_callback_sees_every_interval_from_noise_on(pipeline: TextToImage) -> None:
    seen: list[tuple[int, float, float]] = []
    sample = replace(pipeline.recipe.sample, num_steps=4, sampler="heun")
    pipeline.draw(PROMPTS, seed=0, sample=sample, callback=lambda i, t, x: seen.append((i, t, float(x.std()))))
    assert [(i, t) for i, t, _ in seen] == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]
    assert seen[0][2] == pytest.approx(1.0, abs=0.05)


def test_a_prompt_longer_than_the_encoder_takes_is_refused(pipeline: TextToImage) -> None:
    with pytest.raises(DataError, match="13 tokens"):
        draw(pipeline, ["one " * 13])


def test_a_damaged_checkpoint_is_named(checkpoint: Path) -> None:
    shard = damage(checkpoint)
    with pytest.raises(CheckpointError, match="damaged") as refused:
        load_pipeline(checkpoint)
    assert str(shard) in str(refused.value)


@pytest.mark.parametrize("meta", [{}, {"recipe": None}, {"recipe": {"name": "other"}}])
def test_a_checkpoint_without_a_usable_recipe_is_named(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel, meta: dict[str, object]
) -> None:
    checkpoint = save_model(tmp_path / "odd", make_recipe(), 1, meta)
    with pytest.raises(CheckpointError, match="its recipe cannot be used") as refused:
        load_pipeline(checkpoint)
    assert str(checkpoint) in str(refused.value)


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return `run(*flags)`: tools/sample.py as `__main__` in this process; gives its exit code and stderr's lines."""

    def run_main(*flags: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--checkpoint", str(checkpoint), *flags])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return int(ended.value.code or 0), capfd.readouterr().err.splitlines()

    return run_main


def is_blank(path: Path) -> bool:
    """Return whether a picture hardly varies."""
    return bool(np.asarray(Image.open(path).convert("RGB")).std() < 5)


def test_the_command_leaves_a_grid_single_pictures_and_a_routing_map(tmp_path: Path, checkpoint: Path) -> None:
    flags = f"--checkpoint {checkpoint.parents[1]} --output o --prompt a_nine two/../ones --prompt".split()
    command = [sys.executable, str(TOOL), *flags, r"$\foo$"]  # a formula to some plotting libraries
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    names = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    assert names == {"samples.png", "routing.png", "pictures/000_a_nine.png", "pictures/001_two_ones.png",
                     "pictures/002_foo.png"}  # fmt: skip
    assert [name for name in names if is_blank(tmp_path / "o" / name)] == []
    assert Image.open(tmp_path / "o" / "pictures" / "000_a_nine.png").size == (256, 256)


def test_the_command_draws_the_recipes_prompts_by_default_and_a_dense_model_has_no_routing_map(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel, run: Run
) -> None:
    dense = save_model(tmp_path / "dense", make_recipe("model.ffn=dense"))
    assert run("--checkpoint", str(dense), "--steps", "1", "--sampler", "heun", "--guidance", "1")[0] == 0
    pictures = sorted(path.name for path in (tmp_path / "samples").rglob("*.png"))
    assert pictures == ["000_a_red_seven.png", "001_two_green_fives.png", "samples.png"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", "run"], None),
        (["--sampler", "dpm"], "euler, heun"),
        (["--prompt", "one " * 13], "13 tokens"),
        (["--steps", "0"], "num_steps: 0"),
        (["--steps", "-3"], "num_steps: -3"),
        (["--guidance", "-1"], "guidance_scale: -1.0"),
        (["--guidance", "nan"], "guidance_scale: nan"),
        (["--guidance", "inf"], "guidance_scale: inf"),
        (["--output", "taken", "--steps", "1"], "taken"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, run: Run, checkpoint: Path, flags: list[str], told: str
) -> None:
    (tmp_path / "taken").write_text("mine", encoding="ascii")
    if flags == ["--checkpoint", "run"]:
        told = str(damage(checkpoint).relative_to(tmp_path))
    code, lines = run(*flags)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert told in lines[0]
    assert not (tmp_path / "samples").exists()
    assert (tmp_path / "taken").read_text(encoding="ascii") == "mine"


def test_the_command_refuses_to_draw_nothing(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel, run: Run
) -> None:
    silent = save_model(tmp_path / "silent", make_recipe("sample.prompts=[]"))
    code, lines = run("--checkpoint", str(silent))
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: --prompt: ")
