"""Which rank a process is, from what srun tells it: pure functions of SLURM_* variables, standard library only."""

import re
from collections.abc import Mapping

from ecdit_ds.errors import TopologyError

_FIRST_PORT, _NUM_PORTS = 20000, 10000
"""Below the ports that systems hand out by themselves."""
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Which GPUs a process sees; Slurm sets the first for NVIDIA's and the last for AMD's, and each narrows the others."""
_NO_DEVICE = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, LOCAL_RANK, LOCAL_SIZE, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of a step.

    Where the site gives each task one GPU only, that one is number 0 to it; in a rehearsal it gets none, also where
    Slurm gave it one against an empty CUDA_VISIBLE_DEVICES of the job. ECDIT_MASTER_ADDR and ECDIT_MASTER_PORT overrule
    where the ranks meet, which is the step's first node and a port that differs from step to step.

    Raises:
        TopologyError: srun did not start this process, or what it was told cannot be.
    """
    tasks = tasks_by_node(_variable(environment, "SLURM_STEP_TASKS_PER_NODE"))
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    node = _below(len(tasks), environment, "SLURM_NODEID")
    local_rank = _below(tasks[node], environment, "SLURM_LOCALID")
    rank = _below(size, environment, "SLURM_PROCID")
    devices = [[name for name in environment.get(variable, "").split(",") if name] for variable in VISIBLE_DEVICES]
    has_own_device = any(len(names) == 1 for names in devices)
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    life = _number(environment, "SLURM_RESTART_COUNT", "0")
    port = _number(environment, "ECDIT_MASTER_PORT", str(_FIRST_PORT + (job * 101 + life * 11 + step) % _NUM_PORTS))
    if not 0 < port < 65536:
        raise TopologyError(f"environment variable ECDIT_MASTER_PORT: {port} is no port; choose one below 65536")
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0" if has_own_device else str(local_rank),
        "LOCAL_SIZE": str(tasks[node]),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": environment.get("ECDIT_MASTER_ADDR")
        or first_host(_variable(environment, "SLURM_STEP_NODELIST")),
        "MASTER_PORT": str(port),
    } | (_NO_DEVICE if environment.get("ECDIT_REHEARSAL") == "1" else {})


def tasks_by_node(text: str) -> list[int]:
    """Return `[2, 2, 1]` of `2(x2),1`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if not match:
            raise TopologyError(f"SLURM_STEP_TASKS_PER_NODE: {text!r} is not like 8(x64) or 2(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return `gpu-003` of `gpu-[003,007-009],login[1-2]`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    host = re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", first[0] if first else "")
    if not re.fullmatch(r"[\w.-]+", host):
        raise TopologyError(f"SLURM_STEP_NODELIST: {nodes!r} names no first host; set ECDIT_MASTER_ADDR")
    return host


def _variable(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise TopologyError(f"environment variable {name} is missing: srun starts ranks, in a job of slurm/")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = _variable(environment, name) if default is None else environment.get(name) or default
    if not text.isdecimal():
        raise TopologyError(f"environment variable {name}: {text!r} is not a number")
    return int(text)


def _below(count: int, environment: Mapping[str, str], name: str) -> int:
    number = _number(environment, name)
    if number >= count:
        raise TopologyError(f"environment variable {name}: {number}, but the step has {count}, counted from 0")
    return number
