"""Let DeepSpeed's own engine load and save, on freshly forked ranks beside our own loading and saving.

    python tests/helpers/deepspeed_checkpoints.py PLAN.json      # waves of jobs, as `launch.run_plan` writes them

`load_universal` is what a script must do that goes on from a Universal Checkpoint; docs/conversion.md explains it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.helpers import many_runs  # isort: skip  # sets the environment, and imports what takes long

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import groups

from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.writer import save_checkpoint
from ecdit_ds.config.deepspeed_json import load_deepspeed_config
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.flow.objective import FlowBatch, flow_losses
from ecdit_ds.model.sharding import shard_of
from ecdit_ds.parallel.partition_rules import sharded_axes
from ecdit_ds.parallel.setup import ParallelContext, init_process_groups, initialize_distributed
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.parallel.world import World
from ecdit_ds.runtime.signals import StopSignal
from ecdit_ds.training.engine import DeepSpeedEngine
from ecdit_ds.training.setup import build_model
from ecdit_ds.training.train_state import TrainProgress, checkpoint_metadata, load_snapshot, local_shards
from tests.helpers.random_model import random_values
from tools import convert_ckpt

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
RATE = 1e-3


def run_job(arguments: list[str], _: StopSignal) -> int:
    """Do one job on this rank, and write down what was seen.

    Its keys: `convert` (a command line) or `ds_to_universal` (source, destination) alone; or `recipe` (name,
    overrides), `zero`, `ours` (a checkpoint to go on from), `universal` (the same, for DeepSpeed's own loader; may be
    absent) and `output`, where both ways of saving go; under ZeRO-3 not with experts.
    """
    job = json.loads(arguments[0])
    if "convert" in job:
        return convert_ckpt.main(job["convert"])
    if "ds_to_universal" in job:
        return convert_as_deepspeed_does(*map(Path, job["ds_to_universal"]))
    recipe, output = load_recipe(*job["recipe"]), Path(job["output"])
    initialize_distributed()
    topology = Topology(world_size=dist.get_world_size(), tp=recipe.parallel.tp, ep=recipe.parallel.ep)
    grid = init_process_groups(topology, recipe.parallel.dispatch_chunks)
    config = load_deepspeed_config(ROOT / f"ds_configs/zero{job['zero']}.json", recipe, topology.dp)
    place = topology.coordinates(dist.get_rank()).dp, topology.dp

    def new_engine(more: dict[str, Any]) -> DeepSpeedEngine:
        model = build_model(recipe, grid.layers, torch.device("cpu"))
        return DeepSpeedEngine(model, recipe.optimizer, config | more, grid)

    engine = new_engine({})
    progress = load_snapshot(Reader(Path(job["ours"])), engine)
    engine.restored(progress.num_updates)
    loaded = _states(engine)
    seen: dict[str, Any] = {"ours": _train(engine, recipe, place)}
    if job["zero"] < 3 or not recipe.model.is_sparse:
        step = progress.step + STEPS
        progress = TrainProgress(
            step=step, samples_seen=step * recipe.train.global_batch_size, num_updates=engine.num_updates
        )
        save_checkpoint(output / "ours", step, local_shards(engine), checkpoint_metadata(progress, recipe), World())
        engine._engine.skipped_steps = progress.step - progress.num_updates  # it would know, had it made them all
        save_natively(engine, output / "native")
    if "universal" in job:
        other = new_engine({"checkpoint": {"load_universal": True}})
        seen["client_state"] = load_universal(other, Path(job["universal"]), grid)
        seen["unequal"] = [name for name, value in _states(other).items() if not torch.equal(value, loaded[name])]
        seen["compared"] = len(loaded)
        seen["theirs"] = _train(other, recipe, place)
    (output / f"rank_{dist.get_rank()}.json").write_text(json.dumps(seen))
    return 0


def save_natively(engine: DeepSpeedEngine, folder: Path) -> None:
    """Save as DeepSpeed does, but for experts: its way asks for a third matrix and a book of places that ours lack."""
    engine._engine.has_moe_layers = False
    engine._engine.save_checkpoint(str(folder), client_state={"note": "of a user's script"})


def convert_as_deepspeed_does(source: Path, destination: Path) -> int:
    """Let DeepSpeed's own tool convert a tag's folder."""
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(destination),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    ds_to_universal.main(options)
    return 0


def load_universal(engine: DeepSpeedEngine, folder: Path, grid: ParallelContext) -> dict[str, Any]:
    """Load a Universal Checkpoint with DeepSpeed's own loader, and mend what it leaves wrong; return its counts."""
    zero, is_zero_3 = engine._zero, hasattr(engine._zero, "fp32_partitioned_groups_flat")
    if is_zero_3 and grid.tp.count > 1:  # its ZeRO-3 loader cuts over tensor-parallel ranks only what is marked so
        groups._TENSOR_MODEL_PARALLEL_GROUP = grid.mpu.get_tensor_model_parallel_group()
        for name, parameter in engine._engine.module.named_parameters():
            axis = sharded_axes(name).get("tp")
            whole = list(parameter.ds_shape)
            if axis is not None:
                whole[axis] = shard_of(parameter).global_shape[axis]
            parameter.ds_autotp_universal_checkpoint_meta = {
                "partition_dim": axis,
                "logical_shape": tuple(whole),
                "replicated": axis is None,
                "universal_checkpoint_version": 0.4,
            }
    _, counts = engine._engine.load_checkpoint(str(folder))
    if is_zero_3:  # all groups were given one tensor as their step count, which each would then advance
        for flat in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat]["step"] = zero.optimizer.state[flat]["step"].clone()
    return dict(counts)


def _states(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return copies of what this rank holds: weights, the optimizer's numbers, and the average where it was loaded."""
    states = {
        f"{kind}/{fragment.name}": values.detach().clone()
        for fragment in engine.fragments()
        for kind, values in fragment.states.items()
        if kind != "ema"
    }
    for index, flat in enumerate(engine._partitions.flats()):
        state = engine._zero.optimizer.state[flat]
        states[f"step/{index}"] = state["step"].clone()
        if not hasattr(engine._zero, "fp32_partitioned_groups_flat"):
            states[f"ema/{index}"] = state.get("ema", engine.ema.averages[index]).clone()
    return states


def _train(engine: DeepSpeedEngine, recipe: Recipe, place: tuple[int, int]) -> list[float]:
    """Take some steps on made-up numbers, the same ones for every layout; return this rank's losses."""
    dp_rank, dp_size = place
    size, model = recipe.train.global_batch_size // dp_size, recipe.model

    def drawn(step: int, what: str, *shape: int) -> torch.Tensor:
        whole = random_values(f"{what}{step}", (recipe.train.global_batch_size, *shape))
        return whole[dp_rank * size : (dp_rank + 1) * size]

    def loss_of(module: torch.nn.Module, batch: FlowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        losses = flow_losses(module, batch)
        return losses.flow_B.mean(), losses.load_balance

    losses = []
    for step in range(STEPS):
        image = (model.in_channels, model.latent_height, model.latent_width)
        batch = FlowBatch(
            latents_BCHW=drawn(step, "latents", *image),
            noise_BCHW=drawn(step, "noise", *image),
            timesteps_B=drawn(step, "times").sigmoid(),
            text_embeds_BTD=drawn(step, "text", model.max_text_tokens, model.text_embed_dim),
            text_mask_BT=torch.ones(size, model.max_text_tokens, dtype=torch.bool),
            text_pooled_BD=drawn(step, "pooled", model.text_embed_dim),
        )
        losses.append(float(engine.step([batch], loss_of, RATE).loss))
    return losses


if __name__ == "__main__":
    many_runs.main = run_job  # type: ignore[assignment]
    sys.exit(many_runs.run_waves(Path(sys.argv[1])))
