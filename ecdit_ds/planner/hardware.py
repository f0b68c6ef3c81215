"""What GPUs can do, and how much of it is assumed to be reached; the numbers and their sources are in hardware.yaml."""

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ecdit_ds.config.yaml_loader import parse_yaml
from ecdit_ds.errors import ConfigError, shown

DATA_FILE = Path(__file__).with_name("hardware.yaml")
MOST_NODES, MOST_GPUS_PER_NODE = 100_000, 576
"""Beyond any machine, also one whose racks are nodes; a search asks for every number of nodes up to here."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in the vendor's reference machine; bytes and FLOPs per second are peaks, one direction."""

    name: str
    device_name: str
    """A part of the name that the driver gives it."""
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    memory_gb: float
    """As sold, in 1e9 bytes."""
    memory_gib: float
    """What the driver shows, in 2**30 bytes."""
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    """To the other GPUs of its node together."""
    network_bytes_per_s: float
    pcie_bytes_per_s: float
    source: str

    @property
    def memory_bytes(self) -> int:
        """What the driver shows."""
        return int(self.memory_gib * 2**30)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of the peaks that are reached; why these, says hardware.yaml."""

    matmul_efficiency: float
    attention_efficiency: float
    bandwidth_efficiency: float
    link_efficiency: float
    network_efficiency: float
    usable_memory: float
    host_bytes_per_s: float
    """A GPU's share of host memory bandwidth; the only one that is no share of a peak."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            most = math.inf if item.name == "host_bytes_per_s" else 1.0
            if not (0.0 < value <= most and math.isfinite(value)):
                raise ConfigError(f"--{item.name.replace('_', '-')}: {value} is outside (0, {most:g}]")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines that are planned for."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    assumptions: Assumptions

    def __post_init__(self) -> None:
        for flag, value, most in (
            ("--nodes", self.nodes, MOST_NODES),
            ("--gpus-per-node", self.gpus_per_node, MOST_GPUS_PER_NODE),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"{flag}: {value} is outside 1 to {most}")

    @property
    def world_size(self) -> int:
        """GPUs, and ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> int:
        """Memory of one GPU that tensors may take."""
        return int(self.gpu.memory_bytes * self.assumptions.usable_memory)

    @property
    def link_bytes_per_s(self) -> float:
        """What collectives reach within a node, a GPU."""
        return self.gpu.link_bytes_per_s * self.assumptions.link_efficiency

    @property
    def network_bytes_per_s(self) -> float:
        """What collectives reach between nodes, a GPU."""
        return self.gpu.network_bytes_per_s * self.assumptions.network_efficiency

    def with_nodes(self, nodes: int) -> "Cluster":
        """Return as many nodes of the same kind."""
        return replace(self, nodes=nodes)


def gpu_names() -> list[str]:
    """Return what `--gpu` knows."""
    return sorted(_data()["gpus"])


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name in hardware.yaml.

    Raises:
        ConfigError: no such name; says which are near.
    """
    gpus = _data()["gpus"]
    if name not in gpus:
        near = difflib.get_close_matches(name.lower(), gpus, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"--gpu {name}: is not known; {hint}GPUs are {', '.join(gpu_names())}")
    return Gpu(name=name, **gpus[name])


def read_machine(path: Path) -> tuple[Gpu, int | None]:
    """Read a machine of the user's own: a YAML file with the fields of `Gpu`, and `gpus_per_node`.

    What it leaves out is that of the GPU that `base` names. Its name is the file's, unless it has one.

    Returns:
        The GPU, and how many a node has, if the file says it.

    Raises:
        ConfigError: it cannot be read, or a field is missing, unknown or no positive number.
    """
    try:
        told = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ConfigError(f"holds {type(told).__name__}, no lines of `field: value`")
        base = told.pop("base", None)
        known = {} if base is None else asdict(find_gpu(str(base)))
        count = told.pop("gpus_per_node", None)
        if count is not None and (type(count) is not int or not 1 <= count <= MOST_GPUS_PER_NODE):
            raise ConfigError(f"gpus_per_node: {shown(count)} is outside 1 to {MOST_GPUS_PER_NODE}")
        return _gpu_of(known | {"name": path.stem, "device_name": "", "source": str(path)} | told), count
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--machine {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ConfigError as error:
        raise ConfigError(f"--machine {path}: {error}") from None


def _gpu_of(told: dict[str, Any]) -> Gpu:
    names = {spec.name: spec.type for spec in fields(Gpu)}
    for name, value in told.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"{name}: is no field; {f'did you mean {near[0]}? ' if near else ''}fields are base, gpus_per_node, "
                f"{', '.join(names)}"
            )
        is_right = isinstance(value, str) if names[name] is str else type(value) in (int, float) and 0 < value < 1e30
        if not is_right:
            raise ConfigError(f"{name}: {shown(value)} is no {'text' if names[name] is str else 'positive number'}")
    if missing := [name for name in names if name not in told]:
        raise ConfigError(f"{missing[0]}: is missing; write it, or `base: ` with one of {', '.join(gpu_names())}")
    return Gpu(**told)


def default_assumptions() -> Assumptions:
    """Return the values of hardware.yaml."""
    return Assumptions(**{name: float(entry["value"]) for name, entry in _data()["assumptions"].items()})


def reasons() -> dict[str, str]:
    """Return why each assumption is what it is."""
    return {name: entry["reason"] for name, entry in _data()["assumptions"].items()}


def bf16_peak_of(device_name: str) -> float | None:
    """Return the peak FLOP/s of the GPU that the driver calls `device_name`, or None where it is not known."""
    peaks = (gpu["bf16_flops_per_s"] for gpu in _data()["gpus"].values() if gpu["device_name"] in device_name)
    return next(peaks, None)


@lru_cache(maxsize=1)
def _data() -> Any:
    return yaml.safe_load(DATA_FILE.read_text(encoding="utf-8"))
