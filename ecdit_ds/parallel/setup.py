"""Process groups: joining the other ranks, and this one's place in a layout."""

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed its search, and us its warning

import deepspeed
import deepspeed.ops

from ecdit_ds.errors import RankLostError, TopologyError
from ecdit_ds.model.sharding import ShardIndex
from ecdit_ds.parallel.deepspeed_moe import create_expert_groups
from ecdit_ds.parallel.expert_parallel import ExpertParallelLayers
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.parallel.world import meet_alone

TIMEOUT_MINUTES = 10
"""Timeout of a collective."""


def initialize_distributed() -> torch.device:
    """Join the other processes and return this one's device; needs the launcher's environment.

    Raises:
        TopologyError: the port where they meet cannot be used here.
        RankLostError: the same, but where they meet is for others to mend: another rank, or the next life of a job.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's business, and otherwise said by each of 512 ranks.
    warnings.filterwarnings("ignore", "torch.distributed.*(all_gather_into|reduce_scatter)_tensor", FutureWarning)
    # Otherwise the first query test-compiles every op on every rank (a minute on a CPU) for one that only inference
    # needs.
    deepspeed.ops.__compatible_ops__ = {}
    backend, timeout = "nccl" if torch.cuda.is_available() else "gloo", timedelta(minutes=TIMEOUT_MINUTES)
    try:
        meet_alone(backend, timeout)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout)
    except dist.DistNetworkError as error:
        told = f"MASTER_PORT {os.environ['MASTER_PORT']}: cannot be used ({str(error).splitlines()[0]})"
        if os.environ["RANK"] != "0":
            raise RankLostError(f"{told}; rank 0 was to be there, at {os.environ['MASTER_ADDR']}") from None
        if "SLURM_STEP_ID" in os.environ:
            raise RankLostError(f"{told}; the job's next life has another, unless ECDIT_MASTER_PORT is set") from None
        raise TopologyError(f"{told}; if another run holds it, start with deepspeed --master_port N") from None
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """This rank's place in the layout, with its process groups."""

    layers: ExpertParallelLayers
    tp: ShardIndex
    mpu: Any
    """DeepSpeed's view of the tensor-parallel groups; None without."""


def init_process_groups(topology: Topology, dispatch_chunks: int) -> ParallelContext:
    """Create all process groups of a layout; collective, once a process."""
    at = topology.coordinates(dist.get_rank())
    ep, tp = ShardIndex(index=at.ep, count=topology.ep), ShardIndex(index=at.tp, count=topology.tp)
    if tp.count == 1:
        ep_group = create_expert_groups(ep.count)
        layers = ExpertParallelLayers(ep=ep, ep_group=ep_group, dispatch_chunks=dispatch_chunks)
        return ParallelContext(layers=layers, tp=tp, mpu=None)
    from ecdit_ds.parallel.tensor_parallel import TensorParallelLayers, create_tensor_groups

    mpu = create_tensor_groups(tp.count, TIMEOUT_MINUTES)
    ep_group = create_expert_groups(ep.count, mpu)
    tp_group = mpu.get_tensor_model_parallel_group()
    layers = TensorParallelLayers(ep=ep, ep_group=ep_group, dispatch_chunks=dispatch_chunks, tp=tp, tp_group=tp_group)
    return ParallelContext(layers=layers, tp=tp, mpu=mpu)
