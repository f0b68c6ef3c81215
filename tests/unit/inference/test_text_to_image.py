"""From a checkpoint and prompts to pictures, and the command that does it for a person."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ecdit_ds.checkpoint.manifest import encode_manifest, read_manifest
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import CheckpointError, DataError
from ecdit_ds.inference.load import load_generator, open_model
from ecdit_ds.inference.text_to_image import TextToImage, noise_from_seeds
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.sharding import ShardIndex
from ecdit_ds.parallel.expert_parallel import ExpertParallelLayers
from ecdit_ds.seeding import parameter_generator, sample_rng
from tests.helpers.random_model import damage_average

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]
Run = Callable[..., tuple[int, list[str]]]

TOOL = Path(__file__).resolve().parents[3] / "tools" / "sample.py"
PROMPTS = ["a red seven", "two green fives", "a blue three"]


@pytest.fixture
def checkpoint(tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel) -> Path:
    """Return a checkpoint of a random model, the only one of its run."""
    return save_model(tmp_path / "run" / "checkpoints", make_recipe())


@pytest.fixture
def pipeline(checkpoint: Path) -> TextToImage:
    """Return what samples from it."""
    return load_generator(checkpoint)


def draw(pipeline: TextToImage, prompts: list[str], *, seed: int = 0, guidance_scale: float = 2.0) -> Tensor:
    """Return pictures drawn as the recipe says."""
    sample = replace(pipeline.recipe.sample, guidance_scale=guidance_scale)
    return pipeline.draw(prompts, seeds=range(seed, seed + len(prompts)), sample=sample)


@pytest.mark.parametrize("weights", ["ema", "weight"])
def test_a_loaded_model_holds_the_saved_numbers_bit_for_bit(checkpoint: Path, weights: str) -> None:
    model = load_generator(checkpoint, kind=weights).model
    assert isinstance(model, ECDiT)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=parameter_generator(0, f"{weights}/{name}"))
        assert torch.equal(parameter, ("norm" in name) + 0.2 * noise), name
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_as_the_type_that_is_asked_for(checkpoint: Path, dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in load_generator(checkpoint, dtype=dtype).model.parameters()} == {dtype}


def test_a_stored_model_says_its_kind_and_its_step_and_is_itself_wherever_it_lies(
    checkpoint: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    found = {kind: open_model(moved, kind) for kind in (None, "ema", "weight")}
    assert [stored.kind for stored in found.values()] == ["ema", "ema", "weight"]
    assert {(stored.folder, stored.step) for stored in found.values()} == {(moved, read_manifest(moved).step)}
    assert found[None].identity == open_model(checkpoint).identity
    said = read_manifest(moved)
    name, tensor = next(iter(said.tensors.items()))
    other = replace(tensor, slices=tuple(replace(cut, xxh3="0" * 16) for cut in tensor.slices))
    for changed in (
        replace(said, step=said.step + 1),
        replace(said, meta=said.meta | {"samples_seen": 1}),  # type: ignore[operator]
        replace(said, tensors=said.tensors | {name: other}),  # type: ignore[operator]
    ):
        (moved / "manifest.json").write_bytes(encode_manifest(changed))
        assert open_model(moved).identity != found[None].identity


@pytest.mark.parametrize("index", [0, 1])
def test_a_rank_of_a_layout_loads_the_experts_that_it_holds(checkpoint: Path, index: int) -> None:
    group: Any = None  # nothing is exchanged here
    layers = ExpertParallelLayers(ep=ShardIndex(index=index, count=2), ep_group=group)
    whole = dict(load_generator(checkpoint).model.named_parameters())
    part = dict(load_generator(checkpoint, layers=layers).model.named_parameters())
    for name, parameter in part.items():
        wanted = whole[name].chunk(2)[index] if ".experts." in name else whole[name]
        assert torch.equal(parameter, wanted), name
    assert any(".experts." in name for name in part)


def test_loading_twice_gives_the_same_pictures_bit_for_bit(checkpoint: Path, pipeline: TextToImage) -> None:
    run = load_generator(checkpoint.parents[1])
    assert run.recipe == pipeline.recipe
    assert torch.equal(draw(run, PROMPTS), draw(pipeline, PROMPTS))


def test_the_average_and_the_last_weights_draw_differently(checkpoint: Path, pipeline: TextToImage) -> None:
    last = load_generator(checkpoint, kind="weight")
    assert not torch.equal(draw(last, PROMPTS), draw(pipeline, PROMPTS))


def test_the_newest_checkpoint_of_a_run_is_taken(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    for step, name in ((5, "old"), (10, "new"), (9, "middle")):
        save_model(tmp_path / "checkpoints", replace(make_recipe(), name=name), step)
    assert load_generator(tmp_path).recipe.name == "new"
    assert load_generator(tmp_path / "checkpoints").recipe.name == "new"
    assert load_generator(tmp_path / "checkpoints" / "step_9").recipe.name == "middle"


def test_pictures_have_the_canvas_of_the_recipe_and_are_not_blank(pipeline: TextToImage) -> None:
    pictures = draw(pipeline, PROMPTS)
    assert pictures.shape == (3, 3, 16, 16)
    assert float(pictures.abs().max()) <= 1.0
    assert float(pictures.std()) > 0.1


def test_pictures_have_the_height_and_the_width_that_are_asked_for(pipeline: TextToImage) -> None:
    sample = pipeline.recipe.sample
    assert pipeline.draw(PROMPTS[:1], seeds=[0], sample=sample, height=32, width=24).shape == (1, 3, 32, 24)
    assert pipeline.draw(PROMPTS[:1], seeds=[0], sample=sample, width=24).shape == (1, 3, 16, 24)
    wide = replace(pipeline.recipe, model=replace(pipeline.recipe.model, latent_height=8, latent_width=12))
    assert replace(pipeline, recipe=wide).latent_shape() == (3, 8, 12)
    assert replace(pipeline, recipe=wide).latent_shape(height=16) == (3, 16, 12)


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


def test_a_prompt_and_a_seed_make_a_picture_wherever_they_stand(pipeline: TextToImage) -> None:
    sample = pipeline.recipe.sample
    first, second, third = pipeline.draw(["a nine", "a six", "a nine"], seeds=[4, 5, 4], sample=sample)
    assert torch.equal(first, third)
    same, other = pipeline.draw(["a nine", "a nine"], seeds=[4, 5], sample=sample)
    assert not torch.allclose(same, other, atol=1e-2)
    assert not torch.allclose(first, second, atol=1e-2)


def test_a_pool_of_several_images_is_filled_by_repeating_the_last_prompt(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    recipe = make_recipe("model.routing_pool=group", "model.routing_group=4")
    pipeline = load_generator(save_model(tmp_path / "pools", recipe))
    prompts = [*PROMPTS, "a six", "a white nine"]
    pictures = draw(pipeline, prompts)
    assert len(pictures) == 5
    seeds, sample = [0, 1, 2, 3, 4, 4, 4, 4], pipeline.recipe.sample
    assert torch.equal(pipeline.draw([*prompts, *["a white nine"] * 3], seeds=seeds, sample=sample)[:5], pictures)
    in_company = pipeline.draw([*prompts, *["four pink ones"] * 3], seeds=seeds, sample=sample)
    assert torch.equal(in_company[:4], pictures[:4])
    assert not torch.equal(in_company[4], pictures[4])


def test_what_a_full_pool_leads_away_from_is_repeated_with_it(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    recipe = make_recipe("model.routing_pool=group", "model.routing_group=4")
    pipeline = load_generator(save_model(tmp_path / "pools", recipe))
    prompts, away, sample = PROMPTS[:2], ["a six", "a white nine"], recipe.sample
    pictures = pipeline.draw(prompts, negative_prompts=away, seeds=[0, 1], sample=sample)
    spelled = pipeline.draw(
        [*prompts, *prompts[1:] * 2], negative_prompts=[*away, *away[1:] * 2], seeds=[0, 1, 1, 1], sample=sample
    )
    assert torch.equal(spelled[:2], pictures)
    assert not torch.equal(pipeline.draw(prompts, seeds=[0, 1], sample=sample), pictures)


@torch.no_grad()
def test_guidance_acts_within_its_interval_alone(pipeline: TextToImage) -> None:
    sample = replace(pipeline.recipe.sample, num_steps=4, guidance_scale=3.0, guidance_interval=(0.4, 0.8))
    noise = noise_from_seeds([7], (3, 16, 16))()
    text, none = (
        pipeline.velocity(texts) for texts in (pipeline.text_encoder.encode(PROMPTS[:1]), pipeline.text_encoder.null())
    )
    by_hand = noise
    for time in (1.0, 0.75, 0.5, 0.25):
        velocity = text(by_hand, time)
        if time in (0.75, 0.5):
            null = none(by_hand, time)
            velocity = null + 3.0 * (velocity - null)
        by_hand = by_hand - 0.25 * velocity
    drawn = pipeline.denoise(PROMPTS[:1], noise=lambda: noise, sample=sample)
    torch.testing.assert_close(drawn, by_hand, rtol=0, atol=1e-5)


def test_a_seed_has_the_noise_that_it_always_had() -> None:
    draw_noise = noise_from_seeds([3, 4], (2, 2))
    three, four = (sample_rng(seed, 0, "sample") for seed in (3, 4))
    for _ in range(2):
        wanted = [rng.standard_normal((2, 2), dtype=np.float32) for rng in (three, four)]
        assert torch.equal(draw_noise(), torch.from_numpy(np.stack(wanted)))


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

    def watch(step: int, time: float, latents: Tensor, /) -> None:
        seen.append((step, time, float(latents.std())))

    sample = replace(pipeline.recipe.sample, num_steps=4, sampler="heun")
    pipeline.draw(PROMPTS, seeds=[0, 1, 2], sample=sample, callback=watch)
    assert [(i, t) for i, t, _ in seen] == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]
    assert seen[0][2] == pytest.approx(1.0, abs=0.05)


def test_a_prompt_longer_than_the_encoder_takes_is_refused(pipeline: TextToImage) -> None:
    with pytest.raises(DataError, match="13 tokens"):
        draw(pipeline, ["one " * 13])


def test_a_damaged_checkpoint_is_named(checkpoint: Path) -> None:
    shard = damage_average(checkpoint)
    with pytest.raises(CheckpointError, match="damaged") as refused:
        load_generator(checkpoint)
    assert str(shard) in str(refused.value)


@pytest.mark.parametrize("meta", [{}, {"recipe": None}, {"recipe": {"name": "other"}}])
def test_a_checkpoint_without_a_usable_recipe_is_named(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel, meta: dict[str, object]
) -> None:
    checkpoint = save_model(tmp_path / "odd", make_recipe(), 1, meta)
    with pytest.raises(CheckpointError, match="its recipe cannot be used") as refused:
        load_generator(checkpoint)
    assert str(checkpoint) in str(refused.value)


def test_the_texts_keys_and_values_are_computed_once_a_prompt_whatever_the_steps(pipeline: TextToImage) -> None:
    calls: list[str] = []
    parts = [
        (name, module)
        for name, module in pipeline.model.named_modules()
        if name.endswith(("cross_attention.key", "cross_attention.value"))
    ]
    for name, part in parts:
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert len(parts) == 2 * pipeline.recipe.model.num_layers
    for steps in (1, 5):
        calls.clear()
        pipeline.draw(PROMPTS, seeds=[0, 1, 2], sample=pipeline.settings(num_steps=steps, sampler="heun"))
        assert sorted(calls) == sorted(2 * [name for name, _ in parts])  # for the prompts, and for no text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_remembered_keys_and_values_predict_bit_for_bit_what_the_text_does(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    drawer = load_generator(checkpoint, dtype=dtype)
    texts, latents = drawer.text_encoder.encode(PROMPTS), torch.randn(3, 3, 16, 16)
    times = torch.tensor([0.3, 0.8, 1.0])
    anew = drawer.model(latents, times, texts.embeds_BTD, texts.mask_BT, texts.pooled_BD)
    for _ in range(2):
        text_kvs = drawer.model.text_kv(texts.embeds_BTD)
        remembered = drawer.model(latents, times, text_kvs, texts.mask_BT, texts.pooled_BD)
        assert torch.equal(remembered.velocity_BCHW, anew.velocity_BCHW)
    assert torch.equal(drawer.velocity(texts)(latents, 0.3)[0], anew.velocity_BCHW[0])
    one, null = drawer.velocity(drawer.text_encoder.null()), drawer.velocity(drawer.text_encoder.encode(["", "", ""]))
    torch.testing.assert_close(one(latents, 0.3), null(latents, 0.3), rtol=0, atol=1e-5 if dtype.itemsize == 4 else 0.1)
    assert not torch.allclose(one(latents, 0.3)[0], anew.velocity_BCHW[0], atol=1e-2)
