"""Every key that the DeepSpeed JSON may have reaches a real engine, or shows in what a run prints."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # the engine's first use imports it, for seconds
import pytest
import torch
import torch.utils.tensorboard
from torch import Tensor

from ecdit_ds import train
from ecdit_ds.config import deepspeed_json as deepspeed_config
from ecdit_ds.config.deepspeed_json import load_deepspeed_config
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.flow.objective import FlowBatch, flow_losses
from ecdit_ds.parallel.setup import init_process_groups, initialize_distributed
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.training.engine import DeepSpeedEngine
from ecdit_ds.training.setup import build_model
from tests.conftest import TINY_RECIPE
from tests.helpers.forked import in_a_copy
from tests.helpers.launch import free_port

Read = Callable[[Any], Any]

FACTS: dict[str, tuple[Any, Read]] = {
    "train_batch_size": (8, lambda engine: engine._engine.train_batch_size()),
    "train_micro_batch_size_per_gpu": (2, lambda engine: engine._engine.train_micro_batch_size_per_gpu()),
    "gradient_accumulation_steps": (4, lambda engine: engine._engine.gradient_accumulation_steps()),
    "gradient_clipping": (0.25, lambda engine: engine._zero.clip_grad),
    "bf16": ({"enabled": False}, lambda engine: {"enabled": next(engine.module.parameters()).dtype == torch.bfloat16}),
}
"""Key of the JSON -> a value that is not DeepSpeed's default, and where the engine has it that acts on it."""
OF_ALL_STAGES: dict[str, tuple[Any, Read]] = {
    "reduce_bucket_size": (12_345, lambda engine: engine._zero.reduce_bucket_size),
    "contiguous_gradients": (True, lambda engine: engine._zero.contiguous_gradients),
    "reduce_scatter": (True, lambda engine: engine._zero.reduce_scatter),
}
OF_STAGE: dict[int, dict[str, tuple[Any, Read]]] = {
    2: OF_ALL_STAGES
    | {
        "stage": (2, lambda engine: 2 if engine._zero.partition_gradients else 1),
        "allgather_bucket_size": (23_456, lambda engine: engine._zero.allgather_bucket_size),
        "overlap_comm": (True, lambda engine: engine._zero.overlap_comm),
        "round_robin_gradients": (False, lambda engine: engine._zero.round_robin_gradients),
        "offload_optimizer": (
            {"device": "cpu", "pin_memory": True},
            lambda engine: {
                "device": engine._zero.cpu_offload and "cpu",
                "pin_memory": engine._zero.cpu_offload_pin_memory,
            },
        ),
    },
    3: OF_ALL_STAGES
    | {
        "stage": (3, lambda engine: engine._engine.zero_optimization_stage()),
        "overlap_comm": (False, lambda engine: engine._engine.zero_overlap_comm()),
        "round_robin_gradients": (False, lambda engine: False),
        "stage3_param_persistence_threshold": (
            77,
            lambda engine: engine._zero.parameter_offload.param_numel_persistence_threshold,
        ),
        "stage3_max_live_parameters": (
            34_567,
            lambda engine: engine._zero.parameter_offload._max_available_parameters_in_numel,
        ),
        "stage3_max_reuse_distance": (
            45_678,
            lambda engine: engine._zero.parameter_offload._max_reuse_distance_in_numel,
        ),
        "stage3_prefetch_bucket_size": (5_678, lambda engine: engine._zero.parameter_offload._prefetch_bucket_sz),
        "sub_group_size": (6_789, lambda engine: engine._zero.sub_group_size),
        "offload_optimizer": (
            {"device": "cpu", "pin_memory": True},
            lambda engine: {
                "device": engine._zero.offload_optimizer and "cpu",
                "pin_memory": engine._zero.offload_optimizer_pin_memory,
            },
        ),
    },
}


RATES = [1e-3, 0.0, 4e-3, 2e-3]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Make this the only rank of a world."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (world | {"MASTER_PORT": str(free_port())}).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module", params=[2, 3])
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a real engine of one rank was given, what it has, and how far each of some steps moved a weight."""
    stage, folder = request.param, tmp_path_factory.mktemp("engine")
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    overrides = ["train.micro_batch_size=2", "optimizer.gradient_clipping=0.25", "optimizer.eps=1e-30"]
    recipe = load_recipe(str(folder / "tiny.yaml"), overrides)
    zero = {key: value for key, (value, _) in OF_STAGE[stage].items()}
    given = {key: value for key, (value, _) in FACTS.items()} | {"zero_optimization": zero}
    (folder / "mine.json").write_text(json.dumps(given))

    def look() -> int:
        config, device = load_deepspeed_config(folder / "mine.json", recipe, dp_size=1), initialize_distributed()
        grid = init_process_groups(Topology(world_size=1, tp=1, ep=1), 1)
        engine = DeepSpeedEngine(build_model(recipe, grid.layers, device), recipe.optimizer, config, grid)
        found = {key: read(engine) for key, (_, read) in FACTS.items()}
        found["zero_optimization"] = {key: read(engine) for key, (_, read) in OF_STAGE[stage].items()}
        (folder / "probe.json").write_text(json.dumps({"found": found, "moves": _moves(engine, recipe)}))
        return 0

    code, _, err = in_a_copy(look)
    assert code == 0, err
    return {"given": given} | json.loads((folder / "probe.json").read_text())


def _moves(engine: DeepSpeedEngine, recipe: Recipe) -> list[float]:
    """Return the farthest that a weight moved in each step, all on the same batch, at RATES."""
    texts = torch.ones(2, recipe.model.max_text_tokens, recipe.model.text_embed_dim)
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = FlowBatch(
        latents_BCHW=latents,
        noise_BCHW=latents.flip(0),
        timesteps_B=torch.full((2,), 0.5),
        text_embeds_BTD=texts,
        text_mask_BT=torch.ones(texts.shape[:2], dtype=torch.bool),
        text_pooled_BD=texts[:, 0],
    )

    def loss_of(model: torch.nn.Module, given: FlowBatch) -> tuple[Tensor, Tensor]:
        return flow_losses(model, given).flow_B.mean(), torch.zeros(())

    moves = []
    for rate in RATES:
        before = [fragment.states["weight"].clone() for fragment in engine.fragments()]
        engine.step([batch] * 4, loss_of, rate)
        after = [fragment.states["weight"] for fragment in engine.fragments()]
        moves.append(max(float((new - old).abs().max()) for old, new in zip(before, after, strict=True)))
    return moves


def test_every_accepted_key_is_in_the_tables_above() -> None:
    shown_by_a_run = {"wall_clock_breakdown", "flops_profiler"}
    accepted = deepspeed_config._KEYS - deepspeed_config._FIXED_KEYS.keys()
    assert accepted == {*FACTS, "zero_optimization", *shown_by_a_run}
    for stage, sizes in ((2, deepspeed_config._ZERO_1_AND_2_SIZES), (3, deepspeed_config._ZERO_3_SIZES)):
        assert OF_STAGE[stage].keys() == {"stage", "offload_optimizer", *deepspeed_config._ZERO_FLAGS, *sizes}


def test_every_accepted_key_reaches_what_acts_on_it(probe: dict[str, Any]) -> None:
    assert probe["found"] == probe["given"]


def test_a_step_is_taken_at_the_rate_that_it_is_given_and_not_at_its_neighbours(probe: dict[str, Any]) -> None:
    # Always the same batch: Adam moves a weight by about the rate, whatever its gradient is; at first, just that.
    first, none, *later = probe["moves"]
    assert first == pytest.approx(RATES[0], rel=1e-3)
    assert none == 0.0
    assert later == pytest.approx(RATES[2:], rel=0.5)


def test_times_and_profile_that_the_file_asks_for_are_told(tiny_recipe_file: Path, tmp_path: Path) -> None:
    profiler = {
        "enabled": True,
        "profile_step": 1,
        "recompute_fwd_factor": 1.0,
        "module_depth": 3,
        "top_modules": 3,
        "detailed": True,
        "output_file": deepspeed_config.PROFILE_NAME,
    }
    assert profiler.keys() == deepspeed_config._PROFILER.keys()
    path = tmp_path / "told.json"
    asked = {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True, "flops_profiler": profiler}
    path.write_text(json.dumps(asked))
    command = ["--config", str(tiny_recipe_file), "--deepspeed", str(path), "--output", str(tmp_path / "run")]
    overrides = [f"data.cache_dir={tmp_path / 'cache'}", "train.max_steps=2", "sample.prompts=[]"]
    command += [part for override in overrides for part in ("--set", override)]
    code, out, err = in_a_copy(lambda: train.main(command))
    assert code == 0, err
    assert out.count("bwd_allreduce_microstep") == 2
    text = (tmp_path / "run" / deepspeed_config.PROFILE_NAME).read_text()
    for told in ("Profile Summary at step 2", "Top 3 modules", "depth 2:", "DiTBlock(", "bwd FLOPS per GPU = 3 *"):
        assert told in text, told
