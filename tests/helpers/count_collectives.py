"""Take real training steps as one rank of a world that is not there, and write down what its collectives carry.

    python tests/helpers/count_collectives.py PLAN.json      # cases as `test_planner_communication.py` writes them

torch's fake process group answers every collective at once, with nothing in it. So the numbers are worthless, but
which collectives are called, among whom, and on how much, is what a rank of a real world of that size would do.
"""

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # the engine's first use imports it, for seconds
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit_ds.config.deepspeed_json import load_deepspeed_config
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.parallel import tensor_parallel  # noqa: F401
from ecdit_ds.parallel.setup import init_process_groups
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.training.engine import DeepSpeedEngine
from ecdit_ds.training.setup import build_model

STEPS_BEFORE = 2
"""ZeRO-3 learns in the first which weights will be wanted when."""
SMALLEST = 16
"""Bytes; norms, overflow flags and the like are less."""


class Collectives(TorchDispatchMode):
    """Adds up payloads by `kind ranks stride`, where the ranks of the group stand a stride apart."""

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name().split("::")[-1].split(".")[0]
        if "c10d" in op.name() and name in _KINDS:
            kind, longer, group = _KINDS[name]
            handed = args[longer]
            tensors = handed if isinstance(handed, list) else [handed]
            members = _members(args[group] if group >= 0 else args[-1])
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if len(members) > 1 and size >= SMALLEST:
                self.payload_bytes[f"{kind} {len(members)} {members[1] - members[0]}"] += size
        return op(*args, **(kwargs or {}))


_KINDS = {
    "allreduce_": ("all_reduce", 0, 1),
    "_allgather_base_": ("all_gather", 0, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "all_to_all_single": ("all_to_all", 0, -1),
    "alltoall_base_": ("all_to_all", 1, 2),
}
"""Operator: our name, which argument is the longer tensor, which one the group."""


def _members(group: Any) -> list[int]:
    known = dist.ProcessGroup.unbox(group) if isinstance(group, torch.ScriptObject) else group
    if isinstance(known, str):
        known = dist.distributed_c10d._resolve_process_group(known)  # type: ignore[arg-type]
    ranks: list[int] = dist.get_process_group_ranks(known)
    return ranks


def count(case: dict[str, Any]) -> dict[str, int]:
    """Return the payloads of one optimizer step of rank 0."""
    recipe = load_recipe("demo", case["overrides"])
    topology = Topology(world_size=case["ranks"], tp=recipe.parallel.tp, ep=recipe.parallel.ep)
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": case["ranks"], "LOCAL_SIZE": case["ranks"]}
    os.environ |= {name: str(value) for name, value in place.items()}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute, for inference
    dist.init_process_group("fake", rank=0, world_size=case["ranks"], store=FakeStore())
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False)
    grid = init_process_groups(topology, recipe.parallel.dispatch_chunks)
    model = build_model(recipe, grid.layers, torch.device("cpu"))
    config = load_deepspeed_config(Path(case["deepspeed"]), recipe, topology.dp)
    engine = DeepSpeedEngine(model, recipe.optimizer, config, grid)
    micro = recipe.micro_batch_size(topology.dp)
    batches = [None] * (recipe.train.global_batch_size // (micro * topology.dp))
    for _ in range(STEPS_BEFORE if config["zero_optimization"]["stage"] == 3 else 0):
        engine.step(batches, lambda called, _: _loss(called, recipe, micro), 1e-9)
    with Collectives() as collectives:
        result = engine.step(batches, lambda called, _: _loss(called, recipe, micro), 1e-9)
    assert not result.is_skipped
    return dict(collectives.payload_bytes)


def _loss(called: Any, recipe: Recipe, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = recipe.model
    kept = torch.arange(model.num_kept_tokens(recipe.train.mask_ratio)).expand(micro, -1)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    predicted = called(
        torch.ones(micro, model.in_channels, model.latent_height, model.latent_width, dtype=dtype),
        torch.linspace(0, 1, micro),
        torch.ones(micro, model.max_text_tokens, model.text_embed_dim, dtype=dtype),
        torch.ones(micro, model.max_text_tokens, dtype=torch.bool),
        torch.ones(micro, model.text_embed_dim, dtype=dtype),
        kept if recipe.train.mask_ratio else None,
    )
    # What the fake collectives left in the tensors may be anything, so that nothing real is left of the loss.
    loss = predicted.velocity_BCHW.float().nan_to_num(0.0, 0.0, 0.0).mul(1e-9).sum()
    return loss, predicted.auxiliary_loss.float().nan_to_num() * 0.0


def main(plan: Path) -> int:
    """Count every case in a process of its own, forked from this warm one; results stand beside the plan."""
    for index, case in enumerate(json.loads(plan.read_text())):
        process = os.fork()
        if not process:
            code = 1
            try:
                (plan.parent / f"{index}.json").write_text(json.dumps(count(case)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(process, 0)
        if status:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
