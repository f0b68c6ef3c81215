"""The benchmark of drawing: FLOPs against torch's count of what ran, its dense peers, what it writes, how it refuses.

Times are not judged.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe, SampleConfig
from ecdit_ds.config.yaml_loader import find_recipe, load_recipe
from ecdit_ds.data.encoders.base import PixelVAE
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.layers import SerialLayers
from tools.bench import parse_arguments
from tools.benchmarks.report import rotated
from tools.benchmarks.sample import Contender, NumbersForText, RepeatingTextToImage, summarize, to_rows
from tools.benchmarks.twins import dense_twin, equal_flops_dense, image_flops, picture_flops

ROOT = Path(__file__).resolve().parents[3]
BATCH = 2
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a rest of places": {"num_experts": 3, "capacity_factor": 1.5},
    "swiglu": {"ffn_activation": "swiglu"},
    "shared": {"num_shared_experts": 2},
    "group": {"routing_pool": "group", "routing_group": 2, "num_experts": 3},
    "batch": {"routing_pool": "batch", "num_experts": 3},
    "odd layers": {"num_layers": 3},
}

Fill = Callable[[nn.Module], None]


def drawer_of(kind: type[TextToImage], recipe: Recipe, config: ModelConfig, fill: Fill) -> TextToImage:
    """Return a drawer of random weights."""
    model = ECDiT(config, SerialLayers())
    fill(model)
    return kind(
        model=model,
        recipe=replace(recipe, model=config),
        image_encoder=PixelVAE(),
        device=torch.device("cpu"),
        text_encoder=NumbersForText(embed_dim=config.text_embed_dim, max_tokens=config.max_text_tokens),
    )


def denoise(drawer: TextToImage, draw: Callable[..., Tensor], guidance: float, steps: int = 3) -> Tensor:
    noise = draw("noise", BATCH, *drawer.latent_shape())
    sample = SampleConfig(num_steps=steps, guidance_scale=guidance)
    return drawer.denoise([""] * BATCH, noise=lambda: noise, sample=sample)


@pytest.mark.parametrize(("name", "is_dense"), [("plain", False), ("group", False), ("plain", True)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", [TextToImage, RepeatingTextToImage])
def test_the_formula_of_a_picture_is_what_torch_counts_while_one_is_drawn(
    tiny_recipe: Recipe,
    randomize: Fill,
    draw: Callable[..., Tensor],
    name: str,
    guidance: float,
    kind: type[TextToImage],
    is_dense: bool,
) -> None:
    config = replace(tiny_recipe.model, **SWITCHES[name])
    config = dense_twin(config) if is_dense else config
    drawer = drawer_of(kind, tiny_recipe, config, randomize)
    # The fused attention of a CPU is not in torch's tables; written out it is two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoise(drawer, draw, guidance)
    flops = picture_flops(
        config, batch_size=BATCH, num_steps=3, is_guided=guidance != 1.0, reuses_text=kind is TextToImage
    )
    assert counter.get_total_flops() == BATCH * flops


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_reading_the_text_again_draws_the_same_pictures(
    tiny_recipe: Recipe, randomize: Fill, draw: Callable[..., Tensor], guidance: float
) -> None:
    once, again = (
        denoise(drawer_of(kind, tiny_recipe, tiny_recipe.model, randomize), draw, guidance)
        for kind in (TextToImage, RepeatingTextToImage)
    )
    torch.testing.assert_close(once, again, rtol=1e-5, atol=1e-5)  # products of other shapes round otherwise
    assert once.std() > 0.1


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
@pytest.mark.parametrize("recipe", ["tiny", "demo", "demo_long"])
def test_the_equal_dense_model_is_within_one_percent(
    tiny_config: ModelConfig, recipe: str, changes: dict[str, Any]
) -> None:
    config = replace(tiny_config if recipe == "tiny" else load_recipe(recipe).model, **changes)
    pool = config.pool_images(BATCH)
    equal = equal_flops_dense(config, pool)
    assert equal == replace(dense_twin(config), ffn_hidden_size=equal.ffn_hidden_size)
    assert image_flops(equal, 1) == pytest.approx(image_flops(config, pool), rel=0.01)


def test_half_the_layers_twice_as_wide_are_all_layers_half_again_as_wide() -> None:
    # Two experts a token in 3 of 6 layers; the router's 2 x 128 x 4 are less than a unit of width in each layer.
    assert equal_flops_dense(load_recipe("demo").model, 1).ffn_hidden_size == 512 * 3 // 2


def test_a_few_experts_fewer_than_one_make_the_equal_model_narrower(tiny_config: ModelConfig) -> None:
    config = replace(tiny_config, capacity_factor=0.5)
    assert equal_flops_dense(config, 1).ffn_hidden_size < tiny_config.ffn_hidden_size


def test_every_side_goes_first_in_turn() -> None:
    assert [rotated(["a", "b", "c"], turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]


def test_overhead_is_time_over_flops() -> None:
    flops, times = {"ec": 3.0, "twin": 2.0, "equal": 3.0}, {"ec": [6.0, 6.6], "twin": [2.0, 2.0], "equal": [4.0, 4.0]}
    sides = [
        Contender(
            model=name,
            reuses_text=reuses_text,
            drawer=None,  # type: ignore[arg-type]
            flops=flops[name] * (1 if reuses_text else 2),
            times_ms=[t * (1 if reuses_text else 4) for t in times[name]],
        )
        for name in flops
        for reuses_text in (True, False)
    ]
    rows = {(row["case"], row["peer"]): row for row in to_rows(sides)}
    assert rows["ec, reuse", "twin"]["overhead"] == pytest.approx(3.15 / 1.5)
    assert rows["ec, again", "equal"]["overhead"] == pytest.approx(6.3 / 4)
    assert rows["twin, reuse", "again"]["overhead"] == pytest.approx(0.25 / 0.5)
    said = summarize(list(rows.values()))
    assert "2.100 [2.050, 2.150] (aim 1.05): time x 3.150, FLOPs x 1.500" in said and "takes 0.250 of" in said


def test_the_command_writes_every_ratio(tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    sizes = ["--hidden-size", "64", "--layers", "2", "--experts", "8", "--tokens-side", "2", "--guidance", "2"]
    command = [sys.executable, "tools/bench.py", "sample", "--quick", "--device", "cpu", *sizes, "--json", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    meta, rows = report["meta"], {(row["case"], row["peer"]): row for row in report["rows"]}
    assert set(rows) == {(f"ec, {way}", peer) for way in ("reuse", "again") for peer in ("twin", "equal")} | {
        (f"{model}, reuse", "again") for model in ("ec", "twin", "equal")
    }
    assert (meta["batch_size"], meta["rounds"], meta["steps"], meta["guidance_scale"]) == (2, 3, 2, 2.0)
    assert meta["command"].startswith("python tools/bench.py sample --quick") and meta["clock"] == "process time"
    ec = ModelConfig(**meta["models"]["ec"])
    assert (ec.hidden_size, ec.num_heads, ec.num_kv_heads, ec.ffn_hidden_size) == (64, 2, 1, 256)
    assert (ec.num_layers, ec.num_experts, ec.num_tokens) == (2, 8, 4)
    assert ModelConfig(**meta["models"]["equal"]) == equal_flops_dense(ec, 1)
    for row in rows.values():
        assert row["ours_ms"] > 0 and row["peer_ms"] > 0
        assert row["flops_ratio"] == row["ours_flops"] / row["peer_flops"]
        assert row["overhead"] == row["ratio"] / row["flops_ratio"]
    assert rows["ec, reuse", "twin"]["flops_ratio"] > 1 > rows["ec, reuse", "again"]["flops_ratio"]
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(rows) + 1 and "equal" in lines[0] and "overhead beside the dense twin" in lines[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config", "nowhere"], "nowhere"),
        (["--hidden-size", "100"], "multiples of 64; the nearest is 128"),
        (["--layers", "1"], "model.num_layers: 1"),
        (["--experts", "1"], "model.num_experts: 1"),
    ],
)
def test_a_size_that_cannot_work_is_answered_with_one_line_that_names_it(
    refusal_of: Callable[[Callable[[], object]], str], flags: list[str], said: str
) -> None:
    assert said in refusal_of(lambda: parse_arguments(["sample", *flags]))


@pytest.mark.parametrize("flag", ["--guidance", "--steps", "--batch-size", "--tokens-side"])
def test_a_number_that_is_not_positive_is_answered_with_one_line(
    flag: str, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    assert f"{flag}: '0'" in refusal_of(lambda: parse_arguments(["sample", flag, "0"]))


@pytest.mark.parametrize(
    ("ffn", "flags", "said"),
    [
        ("  ffn: dense\n", [], "model.ffn: dense"),
        ("  routing_pool: group\n  routing_group: 4\n", ["--batch-size", "6"], "--batch-size 6"),
    ],
)
def test_a_recipe_that_cannot_be_drawn_with_is_answered_with_one_line(
    tmp_path: Path, refusal_of: Callable[[Callable[[], object]], str], ffn: str, flags: list[str], said: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(find_recipe("demo").read_text().replace("  ffn: expert_choice\n", ffn))
    assert said in refusal_of(lambda: parse_arguments(["sample", "--config", str(path), *flags]))
