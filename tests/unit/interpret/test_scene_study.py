"""Held-out scenes: routed as the held-out loss has them, compared fairly, beside models of random weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.digit_scenes.scenes import draw_scene
from ecdit_ds.errors import ConfigError
from ecdit_ds.flow.objective import sample_noise
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.interpret.scene_report import report_scenes, save_scene_chart, scene_numbers, scene_summary
from ecdit_ds.interpret.scene_study import SceneCounts, count_scenes, estimates, with_random_weights
from ecdit_ds.model.moe import ExpertChoiceRouter
from tests.helpers.random_model import random_pipeline

MakePipeline = Callable[..., TextToImage]


@pytest.fixture
def make_pipeline(make_recipe: Callable[..., Recipe]) -> MakePipeline:
    """Return `make_pipeline(*overrides)`: a random model."""
    return lambda *overrides: random_pipeline(make_recipe(*overrides))


def hand_made(counts: list[list[int]], in_cell: list[list[bool]]) -> SceneCounts:
    """Return counts (N, 1, 1, P)."""
    mask = np.array(in_cell)
    return SceneCounts(
        times=[0.5],
        layers=[1],
        num_experts=4,
        counts_NTLP=np.array(counts)[:, None, None],
        in_cell_NP=mask,
        on_ink_NP=~mask,
    )


@pytest.mark.parametrize(("pool", "forwards"), [("image", 8), ("batch", 24)])
def test_scenes_are_noised_as_for_the_held_out_loss(make_pipeline: MakePipeline, pool: str, forwards: int) -> None:
    pipeline = make_pipeline(f"model.routing_pool={pool}")
    seen: list[tuple[Tensor, ...]] = []
    pipeline.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    count_scenes(pipeline, 3)
    assert [float(inputs[1][0]) for inputs in seen] == [(i % 8 + 0.5) / 8 for i in range(forwards)]
    scene = draw_scene(seed=0, split="heldout", index=2, canvas_height=16, canvas_width=16)
    image = rearrange(torch.from_numpy(scene.image_HWC), "h w c -> 1 c h w") / 127.5 - 1.0
    noise = sample_noise((3, 16, 16), torch.tensor([2]), 0, "heldout noise")
    noisy = 0.8125 * pipeline.image_encoder.encode(image) + 0.1875 * noise
    torch.testing.assert_close(seen[-7][0][-1:], noisy)
    assert torch.equal(seen[-7][4][-1:], pipeline.text_encoder.encode([scene.caption]).pooled_BD)


@pytest.mark.parametrize(
    "overrides", [(), ("model.routing_pool=group", "model.routing_group=4"), ("model.routing_pool=batch",)]
)
def test_a_scene_counts_alike_however_many_others_do(make_pipeline: MakePipeline, overrides: tuple[str, ...]) -> None:
    pipeline = make_pipeline(*overrides)
    few, many = count_scenes(pipeline, 3), count_scenes(pipeline, 6)
    assert many.counts_NTLP.shape == (6, 8, 2, 16)
    assert many.in_cell_NP.shape == many.on_ink_NP.shape == (6, 16)
    assert (few.counts_NTLP == many.counts_NTLP[:3]).all()
    if pipeline.recipe.model.routing_pool != "group":
        assert (many.counts_NTLP.mean(axis=-1) == 2).all()


def test_ratios_are_of_means_and_scenes_without_background_do_not_count() -> None:
    found = estimates(
        hand_made(
            [[4, 4, 1, 0], [2, 0, 1, 3], [9, 9, 9, 9]],
            [[True, True, False, False], [True, False, False, False], [True] * 4],
        )
    )
    assert found["cell_experts"].mean_TL.item() == (4 + 2) / 2
    assert found["cell_background"].mean_TL.item() == pytest.approx((1 / 2 + 4 / 3) / 2)
    assert found["cell_ratio"].mean_TL.item() == pytest.approx(6 / (1 / 2 + 4 / 3))
    assert found["cell_ratio"].number_TL.item() == found["cell_experts"].number_TL.item() == 2
    assert found["gini"].number_TL.item() == 3
    assert found["top_share"].mean_TL.item() == pytest.approx((1 + 0.75 + 9 / 4) / 3)
    assert found["ink_experts"].mean_TL.item() == found["cell_background"].mean_TL.item()


def test_a_scene_whose_background_gets_nothing_does_not_make_the_ratio_infinite() -> None:
    found = estimates(hand_made([[4, 0], [2, 1], [3, 1]], [[True, False]] * 3))
    assert found["cell_ratio"].mean_TL.item() == 9 / 2
    # Without each in turn: 5 / 2, 7 / 1, 6 / 1; so the pseudo-values 13.5 - 2 x (2.5, 7, 6) are 8.5, -0.5, 1.5.
    assert found["cell_ratio"].deviation_TL.item() == pytest.approx(np.std([8.5, -0.5, 1.5], ddof=1))
    assert found["cell_ratio"].error_TL.item() == pytest.approx(np.std([8.5, -0.5, 1.5], ddof=1) / np.sqrt(3))


def test_random_weights_are_those_that_training_would_begin_with(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    first, again, other = (dict(with_random_weights(pipeline, seed).model.named_parameters()) for seed in (0, 0, 1))
    routers = [name for name in first if "router" in name]
    assert routers
    for name in routers:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert float(first[name].detach().std()) == pytest.approx(0.02, rel=0.3)
    assert float(first["final.linear.weight"].detach().abs().max()) == 0.0


def test_a_router_that_likes_ink_is_told_from_chance(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """Experts of one taste take the same patches; a sigmoid lets them, and on bright tokens they are of one mind."""
    pipeline = make_pipeline("model.router_scores=sigmoid", "model.router_input=unmodulated")
    fond = with_random_weights(pipeline, 0)
    with torch.no_grad():
        embedding = dict(fond.model.named_parameters())["patches.linear.weight"]
        for module in fond.model.modules():
            if isinstance(module, ExpertChoiceRouter):
                module.weight.copy_(embedding.flatten(1).sum(dim=1).expand_as(module.weight))
    report = report_scenes(fond, 24)
    ratio, chance = report.measured["cell_ratio"], report.control["cell_ratio"]
    assert ratio.mean_TL[0].min() > 1.3  # at t = 1 / 16 hardly any noise
    assert ratio.mean_TL[-1].max() < ratio.mean_TL[0].min()  # at t = 15 / 16 hardly any object
    assert report.measured["cell_rank_correlation"].mean_TL[0].min() > 0.3
    assert abs(float(chance.mean_TL.mean()) - 1) < 0.15
    assert report.measured["gini"].mean_TL.min() > report.control["gini"].mean_TL.max()

    numbers = scene_numbers(report)
    assert numbers["measured"]["cell_ratio"]["mean"] == ratio.mean_TL.tolist()
    assert numbers["layers"] == [1, 3]
    lines = scene_summary(report)
    by_layer = " ".join(f"{value:.2f}" for value in ratio.mean_TL.mean(axis=0))
    by_time = " ".join(f"{value:.2f}" for value in ratio.mean_TL.mean(axis=1)[::-1])
    assert f"by layer {by_layer}; by time {by_time}; random weights {chance.mean_TL.mean():.2f}" in lines[2]
    save_scene_chart(report, tmp_path / "scenes.png")
    assert np.asarray(Image.open(tmp_path / "scenes.png")).std() > 20


def test_a_single_scene_has_means_and_no_spread(make_pipeline: MakePipeline) -> None:
    numbers = scene_numbers(report_scenes(make_pipeline(), 1))
    assert None not in numbers["measured"]["gini"]["mean"][0]
    assert numbers["measured"]["gini"]["standard_deviation"] == [[None, None]] * 8
    assert numbers["measured"]["gini"]["number"] == [[1, 1]] * 8


def test_nothing_to_study_is_refused(make_pipeline: MakePipeline) -> None:
    with pytest.raises(ConfigError, match="--scenes 0"):
        count_scenes(make_pipeline(), 0)
    with pytest.raises(ConfigError, match="dense"):
        count_scenes(make_pipeline("model.ffn=dense"), 1)
