"""Maps of compute: counts that add up, moments of the path that are what they are called, a picture that shows them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import ConfigError
from ecdit_ds.flow.objective import sample_noise
from ecdit_ds.inference.images import to_uint8
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.interpret.heatmaps import (
    ComputeMaps,
    compute_maps,
    maps_of,
    save_compute_maps,
    save_concentration,
    save_expert_maps,
)
from ecdit_ds.interpret.routing_trace import trace_routing
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.moe import ExpertChoiceRouter, Routing, experts_per_token
from tests.helpers.random_model import random_pipeline

MakePipeline = Callable[..., TextToImage]
MakeMaps = Callable[..., tuple[ComputeMaps, TextToImage]]


@pytest.fixture
def make_pipeline(make_recipe: Callable[..., Recipe]) -> MakePipeline:
    """Return `make_pipeline(*overrides)`: a random model that draws in eleven steps."""
    return lambda *overrides: random_pipeline(make_recipe("sample.num_steps=11", *overrides))


@pytest.fixture
def make_maps(make_pipeline: MakePipeline) -> MakeMaps:
    """Return `make_maps(*overrides)`: maps of a random model, and what drew them."""

    def make(*overrides: str) -> tuple[ComputeMaps, TextToImage]:
        pipeline = make_pipeline(*overrides)
        return compute_maps(pipeline, "a red seven", seed=5, sample=pipeline.recipe.sample), pipeline

    return make


@pytest.mark.parametrize("capacity_factor", [1.0, 1.5, 2.0])
def test_counts_are_whole_and_their_mean_is_the_capacity_factor(make_maps: MakeMaps, capacity_factor: float) -> None:
    maps, _ = make_maps(f"model.capacity_factor={capacity_factor}")
    assert maps.expected == capacity_factor
    assert maps.counts.shape == (3, 2, 4, 4)
    assert (maps.counts.mean(axis=(2, 3)) == capacity_factor).all()
    assert np.issubdtype(maps.counts.dtype, np.integer)
    assert maps.counts.min() >= 0
    assert maps.counts.max() <= 4


def test_rounding_up_is_part_of_what_is_expected(make_maps: MakeMaps) -> None:
    maps, _ = make_maps("model.num_experts=3", "model.capacity_factor=1.0")
    assert maps.expected == 3 * 6 / 16
    assert (maps.counts.mean(axis=(2, 3)) == maps.expected).all()


def test_maps_are_of_the_sparse_layers_early_in_the_middle_and_late(make_maps: MakeMaps) -> None:
    maps, _ = make_maps()
    assert maps.layers == ["1", "3"]
    assert [name for name, _ in maps.moments] == ["early", "middle", "late"]
    # Of 11 intervals those that start after a tenth, a half and nine tenths of the way.
    assert [time for _, time in maps.moments] == pytest.approx([10 / 11, 6 / 11, 2 / 11])


def test_the_counts_are_those_of_the_conditional_model_at_that_time(make_maps: MakeMaps) -> None:
    maps, pipeline = make_maps()
    model = pipeline.model
    assert isinstance(model, ECDiT)
    seen: list[np.ndarray] = []
    for module in model.modules():
        if isinstance(module, ExpertChoiceRouter):
            module.register_forward_hook(_keep_counts(seen))
    pipeline.draw(["a red seven"], seeds=[5], sample=pipeline.recipe.sample)
    # Eleven intervals, in each first the prompt and then the null text, each through two sparse layers.
    by_interval = np.stack(seen).reshape(11, 2, 2, 4, 4)
    assert (maps.counts == by_interval[[1, 5, 9], 0]).all()
    assert (maps.counts != by_interval[[1, 5, 9], 1]).any()


def _keep_counts(seen: list[np.ndarray]) -> Callable[[object, object, Routing], None]:
    def hook(_module: object, _inputs: object, routing: Routing) -> None:
        seen.append(experts_per_token(routing)[0].reshape(4, 4).numpy())

    return hook


def test_the_drawing_is_the_one_that_the_pipeline_draws(make_maps: MakeMaps) -> None:
    maps, pipeline = make_maps()
    drawn = pipeline.draw(["a red seven"], seeds=[5], sample=pipeline.recipe.sample)
    assert (maps.image_HWC == to_uint8(drawn)[0]).all()


def test_watching_leaves_nothing_in_the_model(make_maps: MakeMaps) -> None:
    _, pipeline = make_maps()
    assert isinstance(pipeline.model, ECDiT)
    assert all(not module._forward_hooks for module in pipeline.model.modules())


def test_an_image_of_a_shared_pool_gets_a_map_of_its_own_patches(make_maps: MakeMaps) -> None:
    maps, _ = make_maps("model.routing_pool=group", "model.routing_group=2")
    assert maps.counts.shape == (3, 2, 4, 4)
    assert maps.expected == 2.0


def test_a_trace_holds_what_each_router_chose_at_each_step(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    chosen: list[np.ndarray] = []

    def keep(_module: object, _inputs: object, routing: Routing) -> None:
        chosen.append(np.sort(routing.indices_BEC[0].numpy(), axis=-1))

    assert isinstance(pipeline.model, ECDiT)
    for module in pipeline.model.modules():
        if isinstance(module, ExpertChoiceRouter):
            module.register_forward_hook(keep)
    trace = trace_routing(pipeline, "a red seven", seed=5, sample=pipeline.recipe.sample)
    # The drawing asks with the text and without it, eleven times; then the trace asks with it, at the same latents.
    while_drawing = np.stack(chosen[:44]).reshape(11, 2, 2, 4, 8)[:, 0]
    assert trace.taken_TLEHW.shape == (11, 2, 4, 4, 4)
    for step, layer, expert in np.ndindex(11, 2, 4):
        taken = np.flatnonzero(trace.taken_TLEHW[step, layer, expert])
        assert taken.tolist() == while_drawing[step, layer, expert].tolist()


def test_every_expert_takes_its_capacity_at_every_step(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline("model.capacity_factor=1.3")
    trace = trace_routing(pipeline, "a red seven", seed=5, sample=pipeline.recipe.sample)
    capacity = 6  # 1.3 x 16 / 4 = 5.2
    assert (trace.taken_TLEHW.sum(axis=(3, 4)) == capacity).all()
    assert (trace.counts_TLHW.sum(axis=(2, 3)) == 4 * capacity).all()
    assert trace.expected == 4 * capacity / 16
    assert trace.steps == list(range(11))
    assert trace.layers == [1, 3]


def test_states_lead_from_noise_to_the_picture(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    trace = trace_routing(pipeline, "a red seven", seed=5, sample=pipeline.recipe.sample)
    noise = sample_noise((3, 16, 16), torch.tensor([0]), 5, "sample")
    assert trace.times == pytest.approx([(11 - i) / 11 for i in range(11)])
    assert (trace.states_THWC[0] == to_uint8(pipeline.image_encoder.decode(noise))[0]).all()
    way = [float(np.abs(state.astype(float) - trace.image_HWC).mean()) for state in trace.states_THWC]
    assert way[-1] < 0.5 * way[0]


def test_of_a_shared_pool_the_first_image_is_traced(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline("model.routing_pool=group", "model.routing_group=2", "sample.num_steps=2")
    found: list[np.ndarray] = []
    assert isinstance(pipeline.model, ECDiT)
    router = next(module for module in pipeline.model.modules() if isinstance(module, ExpertChoiceRouter))
    router.register_forward_hook(lambda _m, _i, routing: found.append(experts_per_token(routing)[0].numpy()))
    trace = trace_routing(pipeline, "a red seven", seed=5, sample=pipeline.recipe.sample)
    first, second = found[-1][:16], found[-1][16:]
    assert first.sum() + second.sum() == 2 * 32
    assert (trace.counts_TLHW[-1, 0].reshape(-1) == first).all()
    assert (first != second).any()


def test_maps_of_a_whole_trace_are_those_of_its_three_moments(make_maps: MakeMaps) -> None:
    maps, pipeline = make_maps()
    trace = trace_routing(pipeline, "a red seven", seed=5, sample=pipeline.recipe.sample)
    found = maps_of(trace, 11)
    assert (found.counts == maps.counts).all()
    assert (found.moments, found.layers) == (maps.moments, maps.layers)


def test_only_the_steps_asked_for_are_traced(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    whole = trace_routing(pipeline, "a red seven", seed=5, sample=pipeline.recipe.sample)
    part = trace_routing(pipeline, "a red seven", seed=5, sample=pipeline.recipe.sample, steps=[2, 7])
    assert (part.taken_TLEHW == whole.taken_TLEHW[[2, 7]]).all()
    assert (part.states_THWC == whole.states_THWC[[2, 7]]).all()
    assert (part.steps, part.times) == ([2, 7], [whole.times[2], whole.times[7]])


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_give_as_many_different_moments_as_there_are(make_maps: MakeMaps, num_steps: int) -> None:
    maps, _ = make_maps(f"sample.num_steps={num_steps}")
    assert len(maps.counts) == len(maps.moments) == len({time for _, time in maps.moments}) == num_steps


def test_a_dense_model_has_no_routing_to_show(make_maps: MakeMaps) -> None:
    with pytest.raises(ConfigError, match="dense"):
        make_maps("model.ffn=dense")


def test_the_picture_shows_where_the_experts_went(make_maps: MakeMaps, tmp_path: Path) -> None:
    maps, _ = make_maps()
    uniform = replace(maps, counts=np.full_like(maps.counts, 2))
    save_compute_maps(maps, "a red seven", tmp_path / "deep" / "routing.png")
    save_compute_maps(uniform, "a red seven", tmp_path / "uniform.png")
    shown, plain = (np.asarray(Image.open(tmp_path / name)) for name in ("deep/routing.png", "uniform.png"))
    assert shown.std() > 20
    assert (shown != plain).any()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["routing.png"]


def test_charts_change_with_what_they_show(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    trace = trace_routing(pipeline, "a red seven", seed=5, sample=pipeline.recipe.sample)
    turned = replace(trace, taken_TLEHW=trace.taken_TLEHW[::-1, ::-1, :, ::-1])
    for name, one in (("as_is", trace), ("turned", turned)):
        save_expert_maps(one, 9, r"$\foo$", tmp_path / f"{name}_experts.png")
        save_concentration(one, 11, r"$\foo$", tmp_path / f"{name}_concentration.png")
    for kind in ("experts", "concentration"):
        shown, other = (np.asarray(Image.open(tmp_path / f"{name}_{kind}.png")) for name in ("as_is", "turned"))
        assert shown.std() > 20
        assert shown.shape == other.shape and (shown != other).any()
