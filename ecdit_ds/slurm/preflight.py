"""What every rank does before training:  preflight.py [FLAGS] -- ARGUMENTS OF train.py

All meet, sum over the device that will train, compare what is installed, and write and read back some bytes where
checkpoints will go. A sick node, a folder that only some nodes see, or a time limit without room for a save is found
within a minute or two and named, before an hour of 512 GPUs is spent on finding it. Rank 0 speaks for all.
"""

import argparse
import importlib.metadata
import os
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
import xxhash

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import DEFAULT_RECIPE, load_recipe
from ecdit_ds.errors import ConfigError, EcditError, ExitCode, RankLostError, escape_unprintable, exit_code_of
from ecdit_ds.files.durable import open_new, write_all
from ecdit_ds.parallel.world import World, meet_alone
from ecdit_ds.planner.memory import checkpoint_bytes
from ecdit_ds.slurm.completion import NODE_CHECK, mark_complete, mark_ended
from ecdit_ds.slurm.job_history import LOGS
from ecdit_ds.slurm.rank import DEFERRED_SIGNALS
from ecdit_ds.slurm.ranks import VISIBLE_DEVICES

LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy", "safetensors")
_PACKAGE = Path(__file__).resolve().parents[1]
_SUM_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
_DISK_BYTES = 32 << 20
_START_SECONDS = 120.0
"""Time of imports and checks before the first step of a life."""


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """What one rank is and has."""

    node: str
    installed: tuple[str, ...]
    device: str
    write_bytes_per_s: float
    """0 on ranks that write nothing: the first of each node does."""


def main(arguments: list[str] | None = None) -> int:
    """Check, and turn what is wrong into one line on rank 0; return the exit code, the same on all ranks."""
    try:
        options, recipe = parse_arguments(arguments)
        check_device(os.environ)
        world = _meet(options.patience_seconds)
    except EcditError as error:
        print(escape_unprintable(f"error: {_node()}: {error}"), file=sys.stderr)
        mark_ended(exit_code_of(error))
        return exit_code_of(error)
    try:
        with _others_there("summing over all ranks"):
            sum_bytes_per_s = _sum_up(world)
        with _others_there("checking the disk together"):
            speed = _check_disk(options.output, world, sight_s=options.patience_seconds / 6)
            own = NodeInfo(node=_node(), installed=_installed(), device=_device_name(), write_bytes_per_s=speed)
            facts = world.share(own)
            table = world.on_rank0(lambda: check_nodes(facts, recipe, options.limit_seconds))
            was_asked = any(world.share(not DEFERRED_SIGNALS.isdisjoint(signal.sigpending())))
        if was_asked:  # and training would never hear of it
            raise RankLostError("a signal asked to stop before training began")
    except EcditError as error:
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        mark_ended(exit_code_of(error))
        return exit_code_of(error)
    if world.rank == 0:
        rate = f"sums of {_SUM_BYTES[_kind()] >> 20} MiB at {sum_bytes_per_s / 1e9:.3g} GB/s a rank"
        print(
            "\n".join([*map(escape_unprintable, table), f"ranks        {world.size} summed up alike; {rate}"]),
            flush=True,
        )
    dist.destroy_process_group()
    mark_complete(NODE_CHECK)
    return ExitCode.DONE


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Recipe]:
    """Return our own flags with the run's folder, and the recipe that train.py's arguments name."""
    parser = argparse.ArgumentParser(prog="preflight.py", description=__doc__)
    parser.add_argument("--limit-seconds", type=float, help="the job's time limit; none where it is left out")
    parser.add_argument("--patience-seconds", type=float, default=180.0, help="that ranks wait for one another")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="-- and the arguments of train.py")
    options = parser.parse_args(arguments)
    of_train = argparse.ArgumentParser(add_help=False)
    of_train.add_argument("--config", default=DEFAULT_RECIPE)
    of_train.add_argument("--set", action="append", default=[])
    of_train.add_argument("--output", type=Path, required=True)
    known, _ = of_train.parse_known_args(options.train[1:])
    options.output = known.output
    return options, load_recipe(known.config, known.set)


def check_device(environment: Any) -> None:
    """Refuse a rank without the device that it is to train on.

    Raises:
        ConfigError: there is no GPU, and no rehearsal was asked for; or there are fewer than ranks on this node.
    """
    if environment.get("ECDIT_REHEARSAL") == "1":
        return
    count, local_rank = torch.cuda.device_count(), int(environment["LOCAL_RANK"])
    if count == 0:
        given = {name: environment[name] for name in VISIBLE_DEVICES if name in environment}
        told = " and ".join(f"{name}={value!r}" for name, value in given.items()) or f"no {VISIBLE_DEVICES[0]}"
        raise ConfigError(
            f"PyTorch {torch.__version__} sees no GPU, and Slurm gave {told}; use a partition with GPUs, or rehearse "
            "on CPUs with ECDIT_REHEARSAL=1"
        )
    told = environment.get("SLURM_GPUS_ON_NODE", "")
    on_node = int(told) if told.isdigit() else count
    if count == 1:  # each task sees its own, or all tasks the only one
        count, local_rank = on_node, int(environment["LOCAL_SIZE"]) - 1
    if local_rank >= count and on_node > local_rank:
        raise ConfigError(
            f"this task sees {count} of the node's {on_node} GPUs, and is number {local_rank} of "
            f"{environment['LOCAL_SIZE']} there: Slurm bound tasks to GPUs; let each see all, with --gpu-bind=none"
        )
    if local_rank >= count:
        raise ConfigError(f"{environment['LOCAL_SIZE']} ranks on this node, and {count} GPUs; lower --ntasks-per-node")


def check_nodes(facts: list[NodeInfo], recipe: Recipe, limit_seconds: float | None) -> list[str]:
    """Return lines about what all ranks are and have.

    Raises:
        ConfigError: they differ in what is installed, or no save fits into the time limit.
    """
    by_version: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for rank in facts:
        by_version[rank.installed].add(rank.node)
    if len(by_version) > 1:
        usual = max(by_version, key=lambda installed: len(by_version[installed]))
        other, nodes = next((installed, nodes) for installed, nodes in by_version.items() if installed != usual)
        theirs, ours = (", ".join(sorted(set(a) - set(b))) for a, b in ((other, usual), (usual, other)))
        raise ConfigError(
            f"{_some(sorted(nodes))}: has {theirs}, where others have {ours}; install the same everywhere, or leave "
            "such nodes out with --exclude"
        )
    speeds = {rank.node: rank.write_bytes_per_s for rank in facts if rank.write_bytes_per_s}
    total, slowest = sum(speeds.values()), min(speeds, key=lambda node: speeds[node])
    save_seconds = checkpoint_bytes(recipe) / total
    if limit_seconds is not None and limit_seconds < _START_SECONDS + save_seconds:
        raise ConfigError(
            f"the job's time limit is {limit_seconds / 60:.0f} min, but to start takes about {_START_SECONDS / 60:.0f} "
            f"min and to save {checkpoint_bytes(recipe) / 1e9:,.3g} GB at the {total / 1e9:.3g} GB/s measured here "
            f"{save_seconds / 60:.1f} min; submit with a longer --time"
        )
    return [
        f"nodes        {len(speeds)} with the same {', '.join(facts[0].installed)}",
        f"devices      {', '.join(sorted({rank.device for rank in facts}))}",
        f"disk         {len(speeds)} nodes together write {total / 1e9:.3g} GB/s, slowest {slowest} "
        f"({speeds[slowest] / 1e9:.3g}); a checkpoint of {checkpoint_bytes(recipe) / 1e9:,.3g} GB in about "
        f"{save_seconds:.0f} s, so --signal should come at least {save_seconds + 60:.0f} s before the end",
    ]


def _meet(patience_s: float) -> World:
    """Join all other ranks.

    Raises:
        RankLostError: they did not all come in time.
    """
    if _kind() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend, patience = "nccl" if _kind() == "cuda" else "gloo", timedelta(seconds=patience_s)
    try:
        if not meet_alone(backend, patience):
            dist.init_process_group(backend, timeout=patience)
    except RuntimeError as error:
        raise RankLostError(
            f"the ranks did not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{_first_line(error)}; leave a dead node out with --exclude, or set ECDIT_MASTER_ADDR"
        ) from None
    return World()


@contextmanager
def _others_there(doing: str) -> Iterator[None]:
    """Take what fails inside for the loss of another rank."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"{_node()}: {doing} failed: {_first_line(error)}") from None


def _sum_up(world: World) -> float:
    """Sum numbers whose sum is known over all ranks; return bytes a second of the second time.

    Raises:
        RankLostError: the sum is wrong.
    """
    numbers = torch.full((_SUM_BYTES[_kind()] // 4,), float(world.rank + 1), device=_kind())
    expected = world.size * (world.size + 1) / 2
    seconds = 0.0
    for _ in range(2):
        total = numbers.clone()
        _wait()
        began = time.perf_counter()
        dist.all_reduce(total)
        _wait()
        seconds = time.perf_counter() - began
    is_right = bool((total == expected).all())
    wrong = sorted({node for node, right in world.share((_node(), is_right)) if not right})
    if wrong:
        raise RankLostError(f"{_some(wrong)}: a sum over all ranks came out wrong; leave it out with --exclude")
    return numbers.numel() * numbers.element_size() / seconds


def _check_disk(output: Path, world: World, sight_s: float) -> float:
    """Write where checkpoints will go, read it back, and see what rank 0 wrote; return bytes a second.

    Raises:
        ConfigError: on all ranks when any cannot, or its node sees another folder than rank 0's.
    """
    folder, token = output / LOGS, world.broadcast(f"{time.time_ns():x}")
    sign, speed = folder / f".sign-{token}", folder / f".speed-{token}-{world.rank}"
    is_writer = world.share(_node()).index(_node()) == world.rank
    try:
        world.on_rank0(lambda: _touch(sign))
        world.run_on_all(lambda: _see(sign, sight_s))
        return world.run_on_all(lambda: _write_speed(speed) if is_writer else 0.0)
    finally:  # all have seen it
        if world.rank == 0:
            _remove(sign)


def _touch(sign: Path) -> None:
    try:
        sign.parent.mkdir(parents=True, exist_ok=True)
        for left in (*sign.parent.glob(".sign-*"), *sign.parent.glob(".speed-*")):  # by a check that was killed
            _remove(left)
        open_new(sign).close()
    except OSError as error:
        raise ConfigError(f"{sign.parent}: {_node()} cannot write there: {error.strerror}") from None


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _see(sign: Path, sight_s: float) -> None:
    deadline = time.monotonic() + sight_s
    while not sign.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{sign.parent}: {_node()} does not see what rank 0 wrote there within {sight_s:.0f} s; --output must "
                "be on a file system that all nodes share, and can write to"
            )
        time.sleep(0.2)


def _write_speed(path: Path) -> float:
    data = os.urandom(_DISK_BYTES)
    try:
        began = time.perf_counter()
        with open_new(path) as file:
            write_all(file, data)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        is_same = path.read_bytes() == data
    except OSError as error:
        raise ConfigError(f"{path.parent}: {_node()} cannot write there: {error.strerror}") from None
    finally:
        _remove(path)
    if not is_same:
        raise ConfigError(f"{path.parent}: {_node()} reads back other bytes than it wrote; its storage is broken")
    return _DISK_BYTES / seconds


def _installed() -> tuple[str, ...]:
    versions = [f"{name} {_version(name)}" for name in LIBRARIES]
    ours = xxhash.xxh3_64()
    for path in sorted(_PACKAGE.rglob("*.py")):
        ours.update(path.read_bytes())
    return (f"Python {sys.version.split()[0]}", *versions, f"ecdit_ds source {ours.hexdigest()[:8]}")


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _device_name() -> str:
    return torch.cuda.get_device_name() if _kind() == "cuda" else f"{os.cpu_count()} processors"


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # virtual nodes share a host


def _kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    if _kind() == "cuda":
        torch.cuda.synchronize()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


if __name__ == "__main__":
    # All is said. A process group that Python takes down may abort, and its code would outdo the one that tells.
    os._exit(main())
