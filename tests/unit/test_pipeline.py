"""TextToImagePipeline as a user of diffusers would drive it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.checkpoint.manifest import encode_manifest, read_manifest
from ecdit_ds.checkpoint.naming import MANIFEST_NAME
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import CheckpointError
from ecdit_ds.flow.samplers import time_grid
from ecdit_ds.model.moe import ExpertChoiceRouter, Routing, with_capacity_factor
from ecdit_ds.pipeline import TextToImagePipeline
from tests.helpers.convert_tool import tool_runner

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]
RefusalOf = Callable[[Callable[[], object]], str]

PROMPTS = ["a red seven", "two green fives"]


@pytest.fixture
def checkpoint(tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel) -> Path:
    """Return a checkpoint of a random model, the only one of its run."""
    return save_model(tmp_path / "run" / "checkpoints", make_recipe())


def load(path: Path, **settings: Any) -> TextToImagePipeline:
    """Return a pipeline that draws no progress bar."""
    pipeline = TextToImagePipeline.from_pretrained(path, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(checkpoint: Path) -> TextToImagePipeline:
    """Return what draws with it."""
    return load(checkpoint)


def seeded(seed: int) -> torch.Generator:
    """Return a generator of that seed."""
    return torch.Generator().manual_seed(seed)


def draw(pipeline: TextToImagePipeline, prompt: Any = PROMPTS, **settings: Any) -> Tensor:
    """Return images_B3HW in [0, 1], by seed 0 unless told otherwise."""
    chosen: dict[str, Any] = {"generator": seeded(0), "output_type": "pt"} | settings
    images = pipeline(prompt, **chosen).images
    assert isinstance(images, Tensor)
    return images


def same(left: Tensor, right: Tensor, atol: float = 1e-5) -> None:
    """Check that two pictures differ by rounding at most: sums of batches of other sizes run in another order."""
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def test_a_run_a_checkpoint_and_exported_safetensors_draw_the_same_pictures(
    tmp_path: Path, checkpoint: Path, pipeline: TextToImagePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = tmp_path / "exported"
    flags = ("--to", "safetensors", "--only")
    assert tool_runner(capsys)("convert", checkpoint, exported, *flags, "ema")[0] == 0
    assert tool_runner(capsys)("convert", checkpoint, tmp_path / "last", *flags, "weights")[0] == 0
    own = draw(pipeline)
    for path in (checkpoint.parents[1], str(exported)):
        assert torch.equal(draw(load(Path(path))), own)
    last = draw(load(checkpoint, weights="weight"))
    assert torch.equal(draw(load(tmp_path / "last")), last)
    assert not torch.equal(last, own)
    with pytest.raises(CheckpointError, match="holds weight, not ema"):
        load(tmp_path / "last", weights="ema")


@pytest.mark.parametrize(("settings", "told"), [({"weights": "best"}, "choose from ema, weight"), ({}, "is neither")])
def test_what_is_no_model_is_refused(
    checkpoint: Path, refusal_of: RefusalOf, settings: dict[str, str], told: str
) -> None:
    path = checkpoint if settings else checkpoint.parent / "none"
    assert told in refusal_of(lambda: load(path, **settings))


@pytest.mark.parametrize("way", ["whole", "spread"])
def test_a_recipe_that_claims_more_than_there_is_takes_no_memory(
    checkpoint: Path, refusal_of: RefusalOf, way: str
) -> None:
    """A checkpoint of kilobytes, whose recipe asks for petabytes."""
    manifest = read_manifest(checkpoint)
    recipe = dict(manifest.meta["recipe"])
    recipe["model"] = recipe["model"] | {"hidden_size": 2**20, "ffn_hidden_size": 2**22}
    claimed = replace(manifest, meta=dict(manifest.meta) | {"recipe": recipe})
    (checkpoint / MANIFEST_NAME).write_bytes(encode_manifest(claimed))
    options = {"device_map": "auto"} if way == "spread" else {}
    assert "the model needs [1048576" in refusal_of(lambda: load(checkpoint, **options))


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}], ids=["whole", "spread"])
def test_numbers_that_a_type_cannot_hold_draw_nothing(
    checkpoint: Path, refusal_of: RefusalOf, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecdit_ds.inference.load.count_nonfinite", lambda values: values.dtype == torch.bfloat16)
    assert "are not finite as torch.bfloat16" in refusal_of(
        lambda: load(checkpoint, torch_dtype=torch.bfloat16, **options)
    )
    load(checkpoint, **options)


def test_output_types_are_the_same_pictures_in_other_clothes(pipeline: TextToImagePipeline) -> None:
    unit = draw(pipeline)
    assert unit.shape == (2, 3, 16, 16)
    assert float(unit.min()) >= 0.0 and float(unit.max()) <= 1.0
    arrays = pipeline(PROMPTS, generator=seeded(0), output_type="np").images
    assert arrays.shape == (2, 16, 16, 3)
    assert np.array_equal(arrays, unit.permute(0, 2, 3, 1).numpy())
    pictures = pipeline(PROMPTS, generator=seeded(0)).images
    for picture, array in zip(pictures, arrays, strict=True):
        assert picture.mode == "RGB" and picture.size == (16, 16)
        assert np.abs(np.asarray(picture) - array * 255).max() <= 0.5 + 1e-4
    latents = draw(pipeline, output_type="latent")
    assert torch.equal((pipeline.drawer.image_encoder.decode(latents) + 1) / 2, unit)


def test_a_tuple_comes_back_instead_of_an_output_where_asked(pipeline: TextToImagePipeline) -> None:
    (images,) = pipeline("a nine", generator=seeded(0), output_type="pt", return_dict=False)
    assert torch.equal(images, draw(pipeline, "a nine"))


def test_a_seed_is_a_picture_and_the_global_generator_serves_without_one(pipeline: TextToImagePipeline) -> None:
    assert torch.equal(draw(pipeline), draw(pipeline))
    assert not torch.allclose(draw(pipeline, generator=seeded(1)), draw(pipeline), atol=1e-2)
    torch.manual_seed(5)
    free = draw(pipeline, generator=None)
    assert not torch.equal(draw(pipeline, generator=None), free)
    assert torch.equal(draw(pipeline, generator=seeded(5)), free)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_generator_an_image_draws_as_if_each_were_alone(pipeline: TextToImagePipeline, sampler: str) -> None:
    both = draw(pipeline, generator=[seeded(3), seeded(4)], sampler=sampler, num_inference_steps=3)
    for prompt, seed, image in zip(PROMPTS, (3, 4), both, strict=True):
        same(draw(pipeline, prompt, generator=seeded(seed), sampler=sampler, num_inference_steps=3)[0], image)


def test_given_latents_are_where_the_path_starts(pipeline: TextToImagePipeline) -> None:
    noise = torch.randn((2, 3, 16, 16), generator=seeded(0))
    assert torch.equal(draw(pipeline, latents=noise, generator=None), draw(pipeline))
    # A stochastic rule goes on with the generator, from its first number.
    settings: dict[str, Any] = {"sampler": "euler_ancestral", "num_inference_steps": 2}
    from_generator = draw(pipeline, latents=noise, generator=seeded(7), **settings)
    assert torch.equal(draw(pipeline, latents=noise, generator=seeded(7), **settings), from_generator)
    assert not torch.equal(draw(pipeline, latents=noise, generator=seeded(8), **settings), from_generator)


def test_images_per_prompt_stand_beside_one_another(pipeline: TextToImagePipeline) -> None:
    images = draw(pipeline, num_images_per_prompt=2, negative_prompt=["a two", "a six"])
    repeated = [text for text in PROMPTS for _ in range(2)]
    assert torch.equal(draw(pipeline, repeated, negative_prompt=["a two", "a two", "a six", "a six"]), images)
    assert not torch.allclose(images[0], images[1], atol=1e-2)


def test_guidance_leads_away_from_the_negative_prompt(pipeline: TextToImagePipeline) -> None:
    drawer, (sample, noise) = pipeline.drawer, (pipeline.drawer.recipe.sample, torch.randn(1, 3, 16, 16))
    towards, away = (drawer.velocity(drawer.text_encoder.encode([text])) for text in ("a nine", "a blue two"))
    by_hand = noise
    for time, next_time in ((1.0, 0.5), (0.5, 0.0)):
        with torch.no_grad():
            pushed = away(by_hand, time) + 3.0 * (towards(by_hand, time) - away(by_hand, time))
        by_hand = by_hand + (next_time - time) * pushed
    assert sample.num_steps == 2
    settings: dict[str, Any] = {"latents": noise, "output_type": "latent", "guidance_scale": 3.0}
    same(draw(pipeline, "a nine", negative_prompt="a blue two", **settings), by_hand)
    assert not torch.allclose(draw(pipeline, "a nine", **settings), by_hand, atol=1e-2)


def test_an_empty_negative_prompt_is_none(pipeline: TextToImagePipeline) -> None:
    same(draw(pipeline, negative_prompt=""), draw(pipeline))
    same(draw(pipeline, negative_prompt=["", ""]), draw(pipeline))


def test_a_callback_sees_the_end_of_every_step_and_its_latents_go_on(pipeline: TextToImagePipeline) -> None:
    seen: list[tuple[int, float, Tensor]] = []

    def watch(pipe: TextToImagePipeline, step: int, time: float, given: dict[str, Tensor]) -> None:
        assert pipe is pipeline and list(given) == ["latents"]
        seen.append((step, time, given["latents"].clone()))

    latents = draw(pipeline, num_inference_steps=4, output_type="latent", callback_on_step_end=watch)
    assert [(step, time) for step, time, _ in seen] == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
    assert torch.equal(seen[-1][2], latents)
    assert torch.equal(draw(pipeline, num_inference_steps=4, output_type="latent"), latents)

    def send_back(_pipe: object, step: int, _time: float, _given: object) -> dict[str, Tensor]:
        return {"latents": seen[0][2]} if step < 3 else {}

    settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    returned = draw(pipeline, callback_on_step_end=send_back, generator=seeded(9), **settings)
    velocity = pipeline.drawer.velocity(pipeline.drawer.text_encoder.encode(PROMPTS))
    with torch.no_grad():
        null = pipeline.drawer.velocity(pipeline.drawer.text_encoder.null())(seen[0][2], 0.25)
        same(returned, seen[0][2] - 0.25 * (null + 2.0 * (velocity(seen[0][2], 0.25) - null)))
    final = torch.ones_like(latents)
    replaced = draw(pipeline, callback_on_step_end=lambda *_: {"latents": final}, **settings)
    assert torch.equal(replaced, final)


def test_a_callback_sees_no_image_that_only_fills_a_pool(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    recipe = make_recipe("model.routing_pool=group", "model.routing_group=4")
    pipeline, shapes = load(save_model(tmp_path / "pools", recipe)), []

    def watch(_pipe: object, _step: int, _time: float, given: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append(len(given["latents"]))
        return given

    assert torch.equal(draw(pipeline, callback_on_step_end=watch), draw(pipeline))
    assert shapes == [2, 2]


def test_a_drawing_within_a_callback_leaves_the_one_around_it_alone(pipeline: TextToImagePipeline) -> None:
    def preview(pipe: TextToImagePipeline, _step: int, _time: float, given: dict[str, Tensor]) -> dict[str, Tensor]:
        draw(pipe, "a six")
        return given

    alone = draw(pipeline, capacity_factor=1.0)
    assert torch.equal(draw(pipeline, capacity_factor=1.0, callback_on_step_end=preview), alone)


def test_the_progress_bar_counts_steps_and_can_be_silenced(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = TextToImagePipeline.from_pretrained(checkpoint)
    draw(pipeline, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline)
    assert capsys.readouterr().err == ""


def test_other_sizes_than_the_trained_one_shift_times_by_the_root_of_the_ratio_of_tokens(
    pipeline: TextToImagePipeline,
) -> None:
    times: list[float] = []

    def watch(_pipe: object, _step: int, time: float, given: dict[str, Tensor]) -> dict[str, Tensor]:
        times.append(time)
        return given

    # 8 x 6 patches instead of 4 x 4: the odds of noise grow by sqrt(48 / 16).
    image = draw(pipeline, "a nine", height=32, width=24, num_inference_steps=2, callback_on_step_end=watch)
    assert image.shape == (1, 3, 32, 24)
    assert times == pytest.approx([3**0.5 / (3**0.5 + 1), 0.0])
    assert [*time_grid(2, 3**0.5)][1:] == pytest.approx(times)
    assert pipeline("a nine", height=32, width=24, generator=seeded(0)).images[0].size == (24, 32)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"height": 30}, "height: 30 pixels is not a multiple of 4"),
        ({"width": 2}, "the nearest is 4"),
        ({"height": 0}, "height: 0"),
        ({"sampler": "ddim"}, "sample.sampler: 'ddim' is not known; choose from euler, heun, dpmpp_2m"),
        ({"num_inference_steps": 0}, "num_steps: 0"),
        ({"num_inference_steps": "four"}, "num_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval: [0.5, 0.2]"),
        ({"guidance_interval": (0.5, 0.6), "guidance_scale": 1.0}, "has no effect with sample.guidance_scale: 1.0"),
        ({"eta": 0.5}, "has no effect with sample.sampler: euler"),
        ({"capacity_factor": 4.5}, "capacity_factor: 4.5 is outside (0, num_experts=4]"),
        ({"capacity_factor": 0.0}, "capacity_factor: 0.0"),
        ({"num_images_per_prompt": 0}, "2 prompts x 0 images"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": "one " * 13}, "13 tokens"),
        ({"negative_prompt": "one " * 13}, "13 tokens"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt: 3 for 2 prompts"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, "latents: shape [1, 3, 16, 16]"),
        ({"output_type": "jpeg"}, "choose from pil, np, pt, latent"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    pipeline: TextToImagePipeline, refusal_of: RefusalOf, settings: dict[str, Any], told: str
) -> None:
    assert told in refusal_of(lambda: draw(pipeline, **({"prompt": PROMPTS} | settings)))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral"])
def test_every_sampler_draws_and_no_two_draw_the_same(pipeline: TextToImagePipeline, sampler: str) -> None:
    own = draw(pipeline, sampler=sampler, num_inference_steps=3)
    others = {"euler", "heun", "dpmpp_2m", "euler_ancestral"} - {sampler}
    for other in others:
        assert not torch.allclose(draw(pipeline, sampler=other, num_inference_steps=3), own, atol=1e-3)


def test_settings_left_out_are_the_recipes_and_what_only_its_sampler_reads_goes_with_it(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    own = ("sample.sampler=euler_ancestral", "sample.eta=0.5", "sample.guidance_interval=[0.2,0.8]")
    pipeline = load(save_model(tmp_path / "own", make_recipe(*own, "sample.capacity_factor=1.0")))
    spelled: dict[str, Any] = {
        "sampler": "euler_ancestral",
        "eta": 0.5,
        "guidance_interval": (0.2, 0.8),
        "capacity_factor": 1.0,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
    }
    assert torch.equal(draw(pipeline), draw(pipeline, **spelled))
    assert pipeline.drawer.settings(sampler="heun").eta == 1.0
    assert pipeline.drawer.settings(guidance_scale=1.0).guidance_interval == (0.0, 1.0)
    assert pipeline.drawer.settings(guidance_scale=3.0).guidance_interval == (0.2, 0.8)


def test_every_setting_that_is_given_reaches_the_picture(pipeline: TextToImagePipeline) -> None:
    renewing: dict[str, Any] = {"sampler": "euler_ancestral"}
    given: list[dict[str, Any]] = [
        {},
        {"num_inference_steps": 3},
        {"guidance_scale": 4.0},
        {"negative_prompt": "a two"},
        {"sampler": "heun"},
        renewing,
        renewing | {"eta": 0.5},
        {"guidance_interval": (0.6, 1.0)},
        {"guidance_interval": (0.0, 0.6)},
        {"capacity_factor": 0.5},
        {"height": 32},
        {"width": 32},
        {"height": 32, "capacity_factor": 0.5},
    ]
    drawn = [draw(pipeline, **settings).numpy() for settings in given]
    assert len({(images.shape, images.tobytes()) for images in drawn}) == len(given)


def test_bf16_weights_draw_about_the_same_picture(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    checkpoint = save_model(tmp_path / "dense", make_recipe("model.ffn=dense"))
    exact, rounded = load(checkpoint), load(checkpoint, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in rounded.drawer.model.parameters()} == {torch.bfloat16}
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    # 8 bits of mantissa are 0.4 %; four layers and two steps with guidance add up to a few of these.
    difference = (draw(rounded) - draw(exact)).abs()
    assert 0.0 < float(difference.mean()) < 0.01
    latents = draw(rounded, output_type="latent")
    assert latents.dtype == torch.float32


def tokens_taken(pipeline: TextToImagePipeline, **settings: Any) -> set[int]:
    """Return how many tokens of an image any expert took in any layer while drawing."""
    taken: set[int] = set()

    def watch(_module: nn.Module, _inputs: object, routing: Routing) -> None:
        taken.add(routing.indices_BEC.shape[-1])

    routers = [module for module in pipeline.drawer.model.modules() if isinstance(module, ExpertChoiceRouter)]
    handles = [router.register_forward_hook(watch) for router in routers]
    draw(pipeline, **settings)
    for handle in handles:
        handle.remove()
    return taken


def test_a_capacity_factor_changes_what_an_expert_takes_for_one_drawing(pipeline: TextToImagePipeline) -> None:
    # S = 16 tokens, E = 4 experts, C = f S / E; the recipe's own f is 2.
    assert tokens_taken(pipeline) == {8}
    assert tokens_taken(pipeline, capacity_factor=0.5) == {2}
    assert tokens_taken(pipeline, capacity_factor=4.0) == {16}
    assert tokens_taken(pipeline, capacity_factor=1.0, height=32) == {8}
    assert tokens_taken(pipeline) == {8}


def test_a_capacity_factor_goes_with_the_drawing_also_when_it_fails(pipeline: TextToImagePipeline) -> None:
    def fail(*_: object) -> dict[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, capacity_factor=0.5, callback_on_step_end=fail)
    assert tokens_taken(pipeline) == {8}


def test_capacity_factors_nest_and_none_changes_nothing(pipeline: TextToImagePipeline) -> None:
    model = pipeline.drawer.model
    with with_capacity_factor(model, 1.0):
        with with_capacity_factor(model, 3.0):
            pass
        with with_capacity_factor(model, None):
            factors = {m.capacity_factor for m in model.modules() if isinstance(m, ExpertChoiceRouter)}
    assert factors == {1.0}


def test_a_model_without_expert_choice_refuses_a_capacity_factor(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel, refusal_of: RefusalOf
) -> None:
    dense = load(save_model(tmp_path / "dense", make_recipe("model.ffn=dense")))
    assert "has no effect with model.ffn: dense" in refusal_of(lambda: draw(dense, capacity_factor=1.0))


def test_the_pipeline_moves_with_to_and_stays_itself(pipeline: TextToImagePipeline) -> None:
    before = draw(pipeline)
    assert pipeline.to("cpu") is pipeline
    assert pipeline.device == torch.device("cpu")
    assert torch.equal(draw(pipeline), before)
    assert pipeline.to("meta").device.type == "meta"
    assert {parameter.device.type for parameter in pipeline.drawer.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"offload_folder": "x"}, "without device_map"),
        ({"max_memory": {"cpu": "1GB"}}, "without device_map"),
        ({"device_map": "auto", "device": "cpu"}, "exclude one another"),
    ],
)
def test_settings_that_exclude_one_another_are_refused(
    checkpoint: Path, refusal_of: RefusalOf, settings: dict[str, Any], told: str
) -> None:
    assert told in refusal_of(lambda: load(checkpoint, **settings))
