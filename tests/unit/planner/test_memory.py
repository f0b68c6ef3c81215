"""The planner's bytes are those of real engines and of real forwards and backwards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.flow.objective import FlowBatch, flow_losses, sample_visible_tokens
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner import zero_groups
from ecdit_ds.planner.activations import (
    block_bytes,
    ends_bytes,
    last_bytes,
    live_activations,
    peak_activations,
    shapes_of,
)
from ecdit_ds.planner.memory import (
    Memory,
    checkpoint_bytes,
    fullest_in_backward,
    memory_of_rank,
    shares_after,
)
from ecdit_ds.planner.parameters import parameters
from ecdit_ds.planner.zero import ZeroSettings, zero_settings
from ecdit_ds.planner.zero_groups import Group
from ecdit_ds.training.memory_tracker import MemoryTracker
from ecdit_ds.training.setup import build_model
from tests.helpers.launch import Planned, run_plan
from tests.helpers.recipes import SMALL_MODEL

WIDE = ModelConfig(
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    cross_num_heads=4,
    cross_head_dim=32,
    ffn_hidden_size=512,
    patch_size=2,
    in_channels=4,
    latent_height=32,
    latent_width=32,
    text_embed_dim=64,
    max_text_tokens=24,
    num_experts=4,
)
"""Of 256 tokens, so that activations dominate."""

Changes = dict[str, Any]
ACTIVATIONS: dict[str, tuple[Changes, Changes]] = {
    "experts": ({}, {}),
    "experts, bf16": ({}, {"precision": "bf16"}),
    "dense": ({"ffn": "dense"}, {}),
    "wide": ({"hidden_size": 256, "ffn_hidden_size": 1024}, {}),
    "swiglu and shared": ({"ffn_activation": "swiglu", "num_shared_experts": 1}, {}),
    "dense swiglu": ({"ffn": "dense", "ffn_activation": "swiglu"}, {"precision": "bf16"}),
    "normalised gates": ({"gate_normalization": "token", "num_experts": 16}, {}),
    "token choice": ({"ffn": "token_choice"}, {}),
    "masked": ({"decoder_layers": 2, "routing_pool": "group", "routing_group": 4}, {"mask_ratio": 0.5}),
    "masked, bf16": ({"decoder_layers": 1}, {"mask_ratio": 0.75, "precision": "bf16"}),
    "block": ({}, {"recompute": "block"}),
    "block, bf16": ({}, {"recompute": "block", "precision": "bf16"}),
    "every second": ({"num_layers": 4}, {"recompute": "block", "recompute_every": 2}),
    "every third": ({"num_layers": 4}, {"recompute": "block", "recompute_every": 3}),
    "masked block": ({"decoder_layers": 2}, {"recompute": "block", "mask_ratio": 0.5}),
}


def recipe_of(base: Recipe, model: Changes, train: Changes, images: int = 8) -> Recipe:
    changes: Changes = {"global_batch_size": images} | train
    return replace(base, model=replace(WIDE, **model), train=replace(base.train, **changes))


def measured(recipe: Recipe, *, with_gradients: bool = False) -> tuple[int, int]:
    """Return the bytes that live after a forward, and the most until backward's end.

    The weights and the batch are not counted, nor are gradients, unless asked for.
    """
    model_config, images = recipe.model, recipe.micro_batch_size(1)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    model = build_model(recipe, serial_layers(), torch.device("cpu")).to(dtype)
    for parameter in model.parameters():
        parameter.grad = None if with_gradients else torch.zeros_like(parameter)
    size = (images, model_config.in_channels, model_config.latent_height, model_config.latent_width)
    kept = model_config.num_kept_tokens(recipe.train.mask_ratio)
    batch = FlowBatch(
        latents_BCHW=torch.randn(size),
        noise_BCHW=torch.randn(size),
        timesteps_B=torch.rand(images),
        text_embeds_BTD=torch.randn(images, model_config.max_text_tokens, model_config.text_embed_dim),
        text_mask_BT=torch.ones(images, model_config.max_text_tokens, dtype=torch.bool),
        text_pooled_BD=torch.randn(images, model_config.text_embed_dim),
        visible_BN=sample_visible_tokens(torch.arange(images), 0, model_config.num_tokens, kept),
    )
    live = MemoryTracker()
    live.ignore(
        *model.parameters(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    )
    with live:
        losses = flow_losses(model, batch, model_config.patch_size)
        kept_bytes = live.now
        (losses.flow_B.mean() + losses.load_balance).backward()
    return kept_bytes, live.peak


@pytest.mark.parametrize(("model", "train"), ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_activations_are_within_a_twentieth_of_what_a_real_step_holds(
    tiny_recipe: Recipe, model: Changes, train: Changes
) -> None:
    recipe = recipe_of(tiny_recipe, model, train)
    shapes = shapes_of(recipe, Topology(world_size=1), recipe.train.mask_ratio, is_gpu=False)
    after_forward, peak = measured(recipe)
    assert peak_activations(recipe, shapes) == pytest.approx(peak, rel=0.05)
    layers = range(recipe.model.num_layers + recipe.model.decoder_layers)
    if recipe.train.recompute == "none":
        kept = ends_bytes(shapes) + sum(block_bytes(shapes, layer) for layer in layers) + last_bytes(shapes, layers[-1])
        assert kept == pytest.approx(after_forward, rel=0.02)


@pytest.mark.parametrize(("recompute", "images"), [("none", 2), ("block", 2), ("block", 1)])
def test_gradients_gather_while_activations_go(tiny_recipe: Recipe, recompute: str, images: int) -> None:
    recipe = recipe_of(tiny_recipe, {"num_layers": 8}, {"recompute": recompute}, images)
    topology = Topology(world_size=1)
    gradients = 4 * sum(parameter.size for parameter in parameters(recipe.model))
    live = live_activations(recipe, shapes_of(recipe, topology, 0.0, is_gpu=False))
    planned = fullest_in_backward(live, shares_after(recipe.model, topology), gradients)
    assert planned == pytest.approx(measured(recipe, with_gradients=True)[1], rel=0.05)
    if recompute == "block":
        assert planned > 1.05 * max(max(live), gradients)


def test_backward_is_through_with_the_last_blocks_first(tiny_recipe: Recipe) -> None:
    shares = shares_after(replace(tiny_recipe.model, decoder_layers=1), Topology(world_size=1))
    assert len(shares) == 6 and shares[-1] == 0.0
    assert list(shares) == sorted(shares, reverse=True) and 0.6 < shares[0] < 1.0
    block = replace(tiny_recipe.model, num_layers=2, ffn="dense")
    two = shares_after(block, Topology(world_size=1))
    whole = sum(parameter.size for parameter in parameters(block))
    last = sum(parameter.size for parameter in parameters(block) if parameter.name.startswith("final"))
    a_block = sum(parameter.size for parameter in parameters(block) if parameter.name.startswith("blocks.1."))
    assert two[1:] == pytest.approx((last / whole, 0.0)) and two[0] == pytest.approx((last + a_block) / whole)


def settings(stage: int, **changes: Any) -> dict[str, Any]:
    """Return a `zero_optimization` section with a small bucket."""
    small: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 5000}
    if stage == 3:
        small["stage3_param_persistence_threshold"] = 1  # so that nothing is both whole and cut
    return small | changes


def zero_of(section: dict[str, Any]) -> ZeroSettings:
    return zero_settings({"zero_optimization": section})


ENGINES: dict[str, tuple[int, int, list[str], Changes]] = {
    "zero 1, tensor-parallel, rmsprop": (2, 1, ["parallel.tp=2", "optimizer.name=rmsprop"], {}),
    "zero 2, expert-parallel, bf16": (4, 2, ["parallel.ep=2", "train.precision=bf16"], {}),
    "zero 2, short groups": (2, 2, ["model.num_layers=4"], {"max_expert_group": 2 * 4 * 32 * 64}),
    "zero 3, expert-parallel, bf16": (2, 3, ["parallel.ep=2", "train.precision=bf16"], {}),
    "zero 3, fp32": (1, 3, [], {}),
}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """Return what each rank of each engine holds, in bytes."""
    root = tmp_path_factory.mktemp("engines")
    jobs = []
    for name, (ranks, stage, overrides, others) in ENGINES.items():
        output = root / name.replace(" ", "_")
        output.mkdir()
        job = {"output": str(output), "overrides": small(overrides), "zero": settings(stage)} | others
        jobs.append(Planned(ranks, [json.dumps(job)]))
    run_plan(root, "engine_bytes.py", [jobs])
    return {
        name: [json.loads(path.read_text()) for path in sorted((root / name.replace(" ", "_")).iterdir())]
        for name in ENGINES
    }


def small(overrides: list[str]) -> list[str]:
    return [*SMALL_MODEL, "model.num_experts=4", *overrides]


@pytest.mark.parametrize("name", ENGINES.keys())
def test_what_an_engine_holds_is_planned_to_the_byte(
    held: dict[str, list[dict[str, int]]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, stage, overrides, others = ENGINES[name]
    monkeypatch.setattr(zero_groups, "_MAX_EXPERT_GROUP", others.get("max_expert_group", zero_groups._MAX_EXPERT_GROUP))
    recipe = load_recipe("demo", small(overrides))
    topology = Topology(world_size=ranks, tp=recipe.parallel.tp, ep=recipe.parallel.ep)
    planned = memory_of_rank(recipe, topology, zero_of(settings(stage)), 0.0)
    assert len(held[name]) == ranks
    for kind in ("parameters", "optimizer", "ema"):
        assert {rank[kind] for rank in held[name]} == {getattr(planned, kind)}, kind
    gradients = "before_reduction" if stage == 1 else "gradients"
    assert max(rank[gradients] for rank in held[name]) == pytest.approx(
        planned.gradients, rel=0.01 if stage == 1 else 0
    )


def test_a_rank_keeps_whole_the_gradients_of_parameters_of_which_it_has_a_piece() -> None:
    group = Group(sizes=(6, 4, 6), ranks=2, is_expert=False)  # cut at 8
    assert (group.part, group.touched()) == (8, [10, 10])
    assert Group(sizes=(16,), ranks=4, is_expert=True).touched() == [16] * 4
    assert Group(sizes=(3,), ranks=4, is_expert=True).touched() == [3, 3, 0, 0]  # padded to 8


def test_large_experts_are_not_cut_in_the_gradients_of_zero_2(tiny_recipe: Recipe) -> None:
    recipe = load_recipe("ecdit_m_64e", ["parallel.ep=8", "parallel.dispatch_chunks=1", "train.micro_batch_size=8"])
    topology = Topology(world_size=64, ep=8)
    in_experts = 19 * 8 * 2 * 3072 * 12288
    two, three = (memory_of_rank(recipe, topology, zero_of(settings(stage)), 0.5) for stage in (2, 3))
    assert two.gradients > 2 * in_experts
    assert three.gradients < 2 * in_experts / 7


def test_the_fullest_moment_counts() -> None:
    kinds: dict[str, Any] = {"parameters": 1, "gradients": 20, "optimizer": 2, "ema": 3, "buffers": 5}
    assert Memory(activations=100, backward=110, **kinds).total == 1 + 2 + 3 + 110 + 5
    assert Memory(activations=10, backward=12, **kinds).total == 1 + 2 + 3 + 20 + 5
    assert Memory(activations=10, step=50, **kinds).total == 1 + 2 + 3 + 20 + 50


def test_offloading_leaves_nothing_of_the_optimizer_on_the_device(tiny_recipe: Recipe) -> None:
    section = settings(2, offload_optimizer={"device": "cpu"})
    here, there = (memory_of_rank(tiny_recipe, Topology(world_size=2), zero_of(z), 0.0) for z in (settings(2), section))
    assert here.optimizer > 0 and here.ema > 0
    assert (there.optimizer, there.ema, there.gradients, there.step) == (0, 0, 0, 0)
    assert there.parameters == here.parameters


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_are_as_large_as_the_settings_say(tiny_recipe: Recipe, stage: int) -> None:
    topology = Topology(world_size=2)
    small_one, large = (
        memory_of_rank(tiny_recipe, topology, zero_of(settings(stage, reduce_bucket_size=size)), 0.0)
        for size in (5000, 10**9)
    )
    assert large.buffers - small_one.buffers > 4 * (10**9 - 5000)
    if stage < 3:
        twice = memory_of_rank(tiny_recipe, topology, zero_of(settings(stage, overlap_comm=True)), 0.0)
        assert twice.buffers - small_one.buffers == 4 * 5000


def test_tensor_parallel_ranks_share_inner_widths_but_not_the_stream(tiny_recipe: Recipe) -> None:
    recipe = recipe_of(tiny_recipe, {}, {})
    whole, half = (
        peak_activations(recipe, shapes_of(recipe, Topology(world_size=tp, tp=tp), 0.0, is_gpu=True)) for tp in (1, 2)
    )
    assert whole / 2 < half < whole


def test_selective_keeps_what_exchanges_brought(tiny_recipe: Recipe) -> None:
    base = replace(recipe_of(tiny_recipe, {}, {}), parallel=replace(tiny_recipe.parallel, ep=2))
    block, selective = (replace(base, train=replace(base.train, recompute=mode)) for mode in ("block", "selective"))
    topology = Topology(world_size=2, ep=2)
    peaks = [peak_activations(r, shapes_of(r, topology, 0.0, is_gpu=True)) for r in (block, selective)]
    rows = 2 * 4 * 256  # twice the tokens of four images
    assert peaks[1] - peaks[0] == 2 * rows * 128 * 4  # there and back, 128 fp32 numbers each


def test_a_checkpoint_holds_four_numbers_a_parameter(tiny_recipe: Recipe) -> None:
    model = build_model(tiny_recipe, serial_layers(), torch.device("cpu"))
    assert checkpoint_bytes(tiny_recipe) == 16 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_the_file_leaves_out_is_as_deepspeed_has_it(stage: int) -> None:
    theirs, ours = DeepSpeedZeroConfig(stage=stage), zero_of({"stage": stage})
    same = {name: value for name, value in vars(ours).items() if name != "is_offloaded"}
    assert same == {name: getattr(theirs, name) for name in same}
    assert not ours.is_offloaded


def test_a_plan_is_drawn_from_the_projects_own_files() -> None:
    root = Path(__file__).resolve().parents[3] / "ds_configs"
    found = {path.stem: zero_settings(json.loads(path.read_text())) for path in root.glob("*.json")}
    assert {name: (zero.stage, zero.is_offloaded) for name, zero in found.items()} == {
        "zero1": (1, False),
        "zero2": (2, False),
        "zero2_offload": (2, True),
        "zero2_overlap": (2, False),
        "zero3": (3, False),
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_parameter_that_is_larger_than_the_bucket_travels_whole_and_is_counted(
    tiny_recipe: Recipe, stage: int, precision: str
) -> None:
    recipe = recipe_of(tiny_recipe, {}, {"precision": precision})
    topology, width = Topology(world_size=2, tp=1, ep=1), {"fp32": 4, "bf16": 2}[precision]
    largest = max(parameter.size for parameter in parameters(recipe.model))

    def buffers(bucket: int) -> int:
        config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": False}}
        return memory_of_rank(recipe, topology, zero_settings(config), 0.0).buffers

    small, half, whole, double = (buffers(bucket) for bucket in (1, largest // 2, largest, 2 * largest))
    # The bucket itself is as large as it is said to be; what is reduced from it, at least the largest parameter.
    assert half - small == width * (largest // 2 - 1)
    assert whole - half == width * (largest - largest // 2)
    assert double - whole == 2 * width * largest
    whole_model = sum(parameter.size for parameter in parameters(recipe.model))
    assert small >= width * largest and 2 * largest < whole_model
