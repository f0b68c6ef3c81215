"""Models larger than one device, spread by accelerate; here over host memory and a folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.pipeline import TextToImagePipeline

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]
RefusalOf = Callable[[Callable[[], object]], str]


@pytest.fixture
def checkpoint(tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel) -> Path:
    """Return a checkpoint of a random model of 81,360 parameters."""
    return save_model(tmp_path / "run" / "checkpoints", make_recipe())


def draw(checkpoint: Path, **settings: Any) -> tuple[TextToImagePipeline, Tensor]:
    """Return the loaded pipeline and what it draws."""
    pipeline = TextToImagePipeline.from_pretrained(checkpoint, **settings)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a red seven", "a nine"], generator=torch.Generator().manual_seed(0), output_type="pt", capacity_factor=1.0
    ).images
    return pipeline, images


def places(pipeline: TextToImagePipeline) -> set[str]:
    """Return where the parameters are while nothing is drawn; meta is the folder."""
    return {parameter.device.type for parameter in pipeline.drawer.model.parameters()}


@pytest.mark.parametrize(
    ("memory", "where"),
    [("10GB", {"cpu"}), ("150KB", {"cpu", "meta"}), ("100KB", {"cpu", "meta"}), ("1KB", {"meta"})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_do_not_fit_wait_on_the_disk_and_the_pictures_are_bit_for_bit_the_same(
    tmp_path: Path, checkpoint: Path, memory: str, where: set[str], dtype: torch.dtype
) -> None:
    _, plain = draw(checkpoint, torch_dtype=dtype)
    folder = tmp_path / "waiting" / "here"
    pipeline, images = draw(
        checkpoint, torch_dtype=dtype, device_map="auto", max_memory={"cpu": memory}, offload_folder=folder
    )
    assert torch.equal(images, plain)
    assert (places(pipeline), pipeline.device, pipeline.dtype) == (where, torch.device("cpu"), dtype)
    waiting = {path.name.removesuffix(".dat") for path in folder.glob("*")} if folder.exists() else set()
    on_disk = {name for name, parameter in pipeline.drawer.model.named_parameters() if parameter.is_meta}
    assert waiting == on_disk


def test_a_folder_of_another_models_leftovers_does_no_harm(
    tmp_path: Path, checkpoint: Path, make_recipe: MakeRecipe, save_model: SaveModel
) -> None:
    other = save_model(tmp_path / "other", make_recipe("model.ffn_hidden_size=64"))
    spread: dict[str, Any] = {
        "device_map": "auto",
        "max_memory": {"cpu": "1KB"},
        "offload_folder": tmp_path / "waiting",
    }
    draw(other, **spread)
    (tmp_path / "waiting" / "index.json").write_text("{", encoding="utf-8")
    assert torch.equal(draw(checkpoint, **spread)[1], draw(checkpoint)[1])


def blocks(*on_disk: int) -> dict[str, str]:
    """Return a map of every module, with some blocks on the disk."""
    rest = dict.fromkeys(("patches", "condition", "modulation", "final"), "cpu")
    return rest | {f"blocks.{i}": "disk" if i in on_disk else "cpu" for i in range(4)}


@pytest.mark.parametrize(
    "device_map",
    [{"": "cpu"}, {"": torch.device("cpu")}, {"": "disk"}, blocks(), blocks(1, 3), blocks(0) | {"patches": "disk"}],
)
def test_a_map_of_ones_own_draws_the_same_pictures(
    tmp_path: Path, checkpoint: Path, device_map: Mapping[str, Any]
) -> None:
    pipeline, images = draw(checkpoint, device_map=device_map, offload_folder=tmp_path / "waiting")
    assert torch.equal(images, draw(checkpoint)[1])
    for name, parameter in pipeline.drawer.model.named_parameters():
        module = max((module for module in device_map if name.startswith(module)), key=len)
        assert parameter.is_meta == (device_map[module] == "disk"), name


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"device_map": "auto", "max_memory": {"cpu": "100KB"}}, "give an offload_folder"),
        ({"device_map": blocks(2)}, "give an offload_folder"),
        ({"device_map": {"blocks": "cpu"}}, "no device for patches.linear.weight; it has blocks"),
        ({"device_map": {**blocks(), "blocks.3": "tpu"}}, "blocks.3 cannot be on 'tpu'"),
        ({"device_map": {"": "meta"}}, "the model cannot be on 'meta'"),
        ({"device_map": {"": None}}, "the model cannot be on None"),
        ({"device_map": {"": 99}}, "the model cannot be on 99"),
        ({"device_map": {"": "cpu", "patches": "disk"}, "offload_folder": "waiting"}, "cannot be used"),
        ({"device_map": "balanced"}, "'balanced' is not known; give auto"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "max_memory: {'cpu': 'much'}"),
        ({"device_map": "auto", "max_memory": {"gpu": "1GB"}}, "max_memory: {'gpu': '1GB'}"),
        ({"device_map": "auto", "max_memory": {99: "1GB"}}, "cannot be on 99"),
        ({"device_map": {"": "disk"}, "offload_folder": "taken"}, "taken cannot be written"),
    ],
)
def test_a_map_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, refusal_of: RefusalOf, settings: Any, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine", encoding="utf-8")
    assert told in refusal_of(lambda: draw(checkpoint, **settings))


def test_a_spread_model_is_not_moved(checkpoint: Path, refusal_of: RefusalOf) -> None:
    pipeline, _ = draw(checkpoint, device_map={"": "cpu"})
    assert "load it without one" in refusal_of(lambda: pipeline.to("cpu"))
