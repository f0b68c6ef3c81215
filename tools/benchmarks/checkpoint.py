"""Saving, loading and converting a checkpoint of many experts, against moving the same bytes and torch's formats.

Everything runs in one process on one disk, interleaved in rotating order; every write ends with fsync, every cold read
begins with the file's pages dropped from the cache. Ours computes and compares all checksums; the others have none.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from tqdm import tqdm

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.convert import convert_to_ecdit
from ecdit_ds.checkpoint.convert.file_plan import plan_files
from ecdit_ds.checkpoint.convert.sources import EcditSource
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.staging import StagingBuffer
from ecdit_ds.checkpoint.writer import Save, TensorShard, save_checkpoint
from ecdit_ds.errors import ConfigError
from ecdit_ds.files.durable import put_on_disk
from ecdit_ds.files.provenance import describe_run

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
HIDDEN, INNER = 256, 1024
CHUNK_BYTES = 2**20
"""Bytes per call of raw writing and reading: larger calls were slower here."""
CONVERTED_FILES = 8
RAW, OURS = "raw", "ours"


@dataclass(kw_only=True)
class Bench:
    """A state, a folder, and the seconds of every side by case."""

    folder: Path
    state: dict[str, Tensor]
    host: StagingBuffer
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())

    def pieces(self) -> list[TensorShard]:
        return pieces_of(self.state)

    def time(self, case: str, side: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        self.seconds.setdefault(case, {}).setdefault(side, []).append(time.perf_counter() - began)


def run_checkpoint(options: argparse.Namespace) -> None:
    """Measure, print, and write the rows as JSON when asked.

    Raises:
        ConfigError: too little room on the disk.
    """
    folder = Path(options.folder) / f"bench-checkpoint-{os.getpid()}"
    need_bytes = int(4.5 * options.gigabytes * 1e9)
    free_bytes = shutil.disk_usage(options.folder).free
    if free_bytes < need_bytes:
        raise ConfigError(
            f"--folder {options.folder}: needs {need_bytes} bytes, {free_bytes} free; use less --gigabytes"
        )
    folder.mkdir()
    try:
        state = synthetic_state(options.gigabytes, options.experts)
        bench = Bench(folder=folder, state=state, host=StagingBuffer(pieces_of(state), is_pinned=False))
        steps = [save_all, load_all, convert_all]
        with tqdm(total=len(steps) * options.rounds, unit="part", disable=None) as bar:
            for turn in range(options.rounds):
                for step in steps:
                    step(bench, turn)
                    bar.update()
        peak_bytes = peak_of_conversion(bench)
    finally:
        shutil.rmtree(folder)
    rows = [row for case, sides in bench.seconds.items() for row in to_rows(case, sides, bench.nbytes)]
    print(f"{bench.nbytes:,} bytes in {len(bench.state)} tensors of {options.experts} experts, {options.rounds} rounds")
    for row in rows:
        print(row_text(row))
    print(f"converting them in a process of its own: at most {peak_bytes / 2**20:,.0f} MiB resident")
    if options.json:
        meta = describe_run(torch.device("cpu"), ("torch", "safetensors", "xxhash")) | {"bytes": bench.nbytes}
        meta |= {"rounds": options.rounds, "peak_bytes_of_conversion": peak_bytes}
        options.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


def synthetic_state(gigabytes: float, num_experts: int) -> dict[str, Tensor]:
    """Return weights, average and both moments of layers with experts, about so many bytes in all."""
    shapes = {"experts.w1": (num_experts, HIDDEN, INNER), "experts.w2": (num_experts, INNER, HIDDEN)} | {
        f"attention.{name}.weight": (HIDDEN, HIDDEN) for name in ("query", "key", "value", "out")
    }
    layer_bytes = 4 * len(KINDS) * sum(torch.Size(shape).numel() for shape in shapes.values())
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind}/blocks.{layer}.{name}": torch.empty(shape).normal_(generator=generator)
        for kind in KINDS
        for layer in range(layers)
        for name, shape in shapes.items()
    }


def pieces_of(state: dict[str, Tensor]) -> list[TensorShard]:
    """Return each tensor as one piece."""
    return [
        TensorShard(name=name, global_shape=tuple(t.shape), box=Box((0,) * t.dim(), tuple(t.shape)), data=t)
        for name, t in state.items()
    ]


def save_all(bench: Bench, turn: int) -> None:
    """Write the state in every way."""
    root = bench.folder / "saved"

    def ours(*, read_back: bool) -> None:
        save_checkpoint(root, 1, bench.pieces(), {}, SoloPeers(), read_back=read_back)

    sides: dict[str, Callable[[], object]] = {
        RAW: lambda: write_raw(bench.folder / "raw", bench.state),
        OURS: lambda: ours(read_back=False),
        "ours, read back": lambda: ours(read_back=True),
        "torch.save": lambda: torch_save(bench.folder / "saved.pt", bench.state),
        "torch DCP": lambda: dcp.save(
            bench.state, storage_writer=dcp.FileSystemWriter(bench.folder / "dcp", sync_files=True), no_dist=True
        ),
    }
    for name in rotated(list(sides), turn):
        bench.time("save", name, sides[name])
        for left in ("raw", "saved", "saved.pt", "dcp"):
            remove(bench.folder / left)
    save = None

    def begin() -> None:
        nonlocal save
        save = Save(root, 1, bench.pieces(), {}, SoloPeers())
        save.pieces = bench.host.of(save.pieces)

    bench.time("stall", "ours, in the background", begin)
    assert save is not None
    writer = threading.Thread(target=save.write, kwargs={"read_back": True})
    writer.start()
    writer.join()
    save.publish()
    remove(root)
    for side, saved in ((RAW, RAW), ("ours, at once", OURS), ("ours, at once, read back", "ours, read back")):
        bench.seconds["stall"].setdefault(side, []).append(bench.seconds["save"][saved][-1])


def load_all(bench: Bench, turn: int) -> None:
    """Read the state in every way, first from the disk, then from the page cache."""
    write_raw(bench.folder / "raw", bench.state)
    root = save_checkpoint(bench.folder / "saved", 1, bench.pieces(), {}, SoloPeers())
    torch_save(bench.folder / "saved.pt", bench.state)
    dcp.save(bench.state, storage_writer=dcp.FileSystemWriter(bench.folder / "dcp", sync_files=True), no_dist=True)
    out = {name: torch.zeros_like(tensor) for name, tensor in bench.state.items()}

    def ours() -> None:
        whole = ((name, Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor) for name, tensor in out.items())
        Reader(root).read_all_into(whole)

    sides: dict[str, Callable[[], object]] = {
        RAW: lambda: read_raw(bench.folder / "raw", out),
        OURS: ours,
        "torch.load": lambda: torch.load(bench.folder / "saved.pt", weights_only=True),
        "torch DCP": lambda: dcp.load(out, storage_reader=dcp.FileSystemReader(bench.folder / "dcp"), no_dist=True),
    }
    for name in rotated(list(sides), turn):
        for case in ("load", "load, cached"):
            if case == "load":
                drop_from_cache(bench.folder)
            bench.time(case, name, sides[name])
    for left in ("raw", "saved", "saved.pt", "dcp"):
        remove(bench.folder / left)


def convert_all(bench: Bench, turn: int) -> None:
    """Convert to other files, and copy the same files."""
    root = save_checkpoint(bench.folder / "saved", 1, bench.pieces(), {}, SoloPeers())

    def ours() -> None:
        source = EcditSource(root)
        files = plan_files(source, list(source.tensors), CONVERTED_FILES, None)
        convert_to_ecdit(source, bench.folder / "converted", files, lambda _: None)

    def copy() -> None:
        (bench.folder / "copied").mkdir()
        for path in root.iterdir():
            shutil.copyfile(path, bench.folder / "copied" / path.name)
            put_on_disk(bench.folder / "copied" / path.name)

    sides = {RAW: copy, OURS: ours}
    for name in rotated(list(sides), turn):
        drop_from_cache(bench.folder)
        bench.time("convert", name, sides[name])
        remove(bench.folder / "converted")
        remove(bench.folder / "copied")
    remove(bench.folder / "saved")


def peak_of_conversion(bench: Bench) -> int:
    """Return the resident bytes of tools/convert_ckpt.py at their highest."""
    root = save_checkpoint(bench.folder / "saved", 1, bench.pieces(), {}, SoloPeers())
    tool = Path(__file__).parents[1] / "convert_ckpt.py"
    watch = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    watch += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    command = [sys.executable, str(tool), "convert", str(root), str(bench.folder / "converted"), "--to", "ecdit"]
    said = subprocess.run([sys.executable, "-c", watch, *command], capture_output=True, text=True, check=True)
    return int(said.stdout) * 1024


def write_raw(path: Path, state: dict[str, Tensor]) -> None:
    """Write all tensors' bytes one after the other."""
    with open(path, "wb", buffering=0) as file:
        for tensor in state.values():
            values = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(values), CHUNK_BYTES):
                file.write(values[start : start + CHUNK_BYTES])
        os.fsync(file.fileno())


def read_raw(path: Path, out: dict[str, Tensor]) -> None:
    """Read them into memory that is there already."""
    with open(path, "rb", buffering=0) as file:
        for tensor in out.values():
            values = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(values), CHUNK_BYTES):
                file.readinto(values[start : start + CHUNK_BYTES])


def torch_save(path: Path, state: dict[str, Tensor]) -> None:
    """Write as most programs do, but on to the disk."""
    torch.save(state, path)
    put_on_disk(path)


def drop_from_cache(folder: Path) -> None:
    """Make the next reading come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rotated(names: list[str], turn: int) -> list[str]:
    """Return the names in another order each turn."""
    return names[turn % len(names) :] + names[: turn % len(names)]


def to_rows(case: str, sides: dict[str, list[float]], nbytes: int) -> list[dict[str, Any]]:
    """Return each side's seconds, and its speed as a share of the raw one's, paired within rounds."""
    rows = []
    for side, seconds in sides.items():
        shares = [raw / own for raw, own in zip(sides[RAW], seconds, strict=True)]
        rows.append(
            {
                "case": case,
                "side": side,
                "seconds": statistics.median(seconds),
                "spread": [min(seconds), max(seconds)],
                "bytes_per_second": nbytes / statistics.median(seconds),
                "of_raw": statistics.median(shares),
                "of_raw_spread": [min(shares), max(shares)],
            }
        )
    return rows


def row_text(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    low, high = row["spread"]
    share_low, share_high = row["of_raw_spread"]
    return (
        f"{row['case']:<13} {row['side']:<24} {row['seconds']:7.2f} s [{low:.2f}, {high:.2f}]  "
        f"{row['bytes_per_second'] / 1e9:6.2f} GB/s  {row['of_raw']:6.2f} x raw [{share_low:.2f}, {share_high:.2f}]"
    )
