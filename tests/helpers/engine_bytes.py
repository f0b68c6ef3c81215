"""Build engines on freshly forked ranks, run one backward each, and tell how many bytes of what they hold.

    python tests/helpers/engine_bytes.py PLAN.json      # waves of jobs, as `launch.run_plan` writes them

A job's argument is JSON: `output`, `overrides` of the demo recipe, and the `zero` section. Each rank writes
`OUTPUT/rank_R.json`. `max_expert_group` replaces DeepSpeed's limit, which no test could fill.
"""

import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.helpers import many_runs  # isort: skip  # sets the environment, and imports what takes long

import torch
import torch.distributed as dist
from deepspeed.moe import utils
from torch import Tensor

import ecdit_ds.training.engine
from ecdit_ds.config.deepspeed_json import DEFAULT_PATH, load_deepspeed_config
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.flow.objective import FlowBatch, flow_losses
from ecdit_ds.parallel.setup import init_process_groups, initialize_distributed
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.runtime.signals import StopSignal
from ecdit_ds.training.engine import DeepSpeedEngine
from ecdit_ds.training.setup import build_model


def run_job(arguments: list[str], stop: StopSignal | None = None) -> int:
    """Build, run backward, and write down what is held."""
    job = json.loads(arguments[0])
    recipe = load_recipe("demo", job["overrides"])
    device = initialize_distributed()
    topology = Topology(world_size=dist.get_world_size(), tp=recipe.parallel.tp, ep=recipe.parallel.ep)
    if "max_expert_group" in job:
        ecdit_ds.training.engine.split_params_into_different_moe_groups_for_optimizer = partial(
            utils.split_params_into_different_moe_groups_for_optimizer, max_group_size=job["max_expert_group"]
        )
    config = load_deepspeed_config(DEFAULT_PATH, recipe, topology.dp) | {"zero_optimization": job["zero"]}
    grid = init_process_groups(topology, recipe.parallel.dispatch_chunks)
    engine = DeepSpeedEngine(build_model(recipe, grid.layers, device), recipe.optimizer, config, grid)
    held = _held(engine)
    (Path(job["output"]) / f"rank_{dist.get_rank()}.json").write_text(json.dumps(held | _gradients(engine, recipe)))
    return 0


def _held(engine: DeepSpeedEngine) -> dict[str, int]:
    """Return the bytes of what outlives a step, each storage once and with the first kind that has it."""
    zero, seen = engine._zero, set[int]()
    states = [value for state in zero.optimizer.state.values() for name, value in state.items() if name != "step"]
    parts = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    return {
        "parameters": _bytes([*engine.module.parameters(), *parts], seen),
        "optimizer": _bytes([*engine._partitions.flats(), *states], seen),
        "ema": _bytes(engine.ema.averages, seen),
    }


def _gradients(engine: DeepSpeedEngine, recipe: Recipe) -> dict[str, int]:
    """Return the bytes of gradients at the end of backward, before and after ZeRO-1 collects them."""
    zero, before = engine._zero, list[int]()
    if hasattr(zero, "reduce_gradients"):
        collect = zero.reduce_gradients

        def note_and_collect(*args: Any, **kwargs: Any) -> Any:
            before.append(_bytes([p.grad for p in engine.module.parameters() if p.grad is not None], set()))
            return collect(*args, **kwargs)

        zero.reduce_gradients = note_and_collect
    losses = flow_losses(engine._engine, _batch(recipe, engine))
    engine._engine.backward(losses.flow_B.mean())
    kept = [tensor for group in zero.averaged_gradients.values() for tensor in group]
    return {"gradients": _bytes(kept, set()), "before_reduction": max(before, default=0)}


def _batch(recipe: Recipe, engine: DeepSpeedEngine) -> FlowBatch:
    model, size = recipe.model, engine._engine.train_micro_batch_size_per_gpu()
    return FlowBatch(
        latents_BCHW=torch.randn(size, model.in_channels, model.latent_height, model.latent_width),
        noise_BCHW=torch.randn(size, model.in_channels, model.latent_height, model.latent_width),
        timesteps_B=torch.rand(size),
        text_embeds_BTD=torch.randn(size, model.max_text_tokens, model.text_embed_dim),
        text_mask_BT=torch.ones(size, model.max_text_tokens, dtype=torch.bool),
        text_pooled_BD=torch.randn(size, model.text_embed_dim),
    )


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Return the bytes of storages not in `seen`, and add them there."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


if __name__ == "__main__":
    many_runs.main = run_job  # type: ignore[assignment]
    sys.exit(many_runs.run_waves(Path(sys.argv[1])))
