"""`bench.py dispatch`: what moving tokens to experts on other ranks costs, in bytes and in time.

The floor in bytes of an exchange in equal parts: each token goes to f experts and comes back, but for the 1/ep that
live on its own rank, so a forward sends 2 * f * tokens * hidden * bytes * (ep - 1) / ep a rank, and a backward the
same. The floor in time is the bare collective with the same tensors.

Suffixes: B images, S tokens of an image, D hidden_size, E experts, C expert capacity, R rows of one expert.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ecdit_ds.files.provenance import describe_run
from ecdit_ds.parallel.dispatch import AllToAllDispatcher
from ecdit_ds.seeding import parameter_generator
from tools.benchmarks.report import compare, times_text

CAPACITY_FACTOR = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of a call."""

    tokens: int
    """Tokens of an image."""
    experts: int
    chunks: int
    call_tokens: int
    """Tokens of all images of a rank."""
    hidden_size: int
    dtype: torch.dtype

    @property
    def capacity(self) -> int:
        """Return C, tokens an expert takes from an image."""
        return CAPACITY_FACTOR * self.tokens // self.experts

    def bytes_floor(self, ranks: int) -> float:
        """Return the bytes that rows alone cost a rank in a forward, without counts or padding."""
        row = self.hidden_size * self.dtype.itemsize
        return 2 * CAPACITY_FACTOR * self.call_tokens * row * (ranks - 1) / ranks


def run_dispatch(options: argparse.Namespace) -> None:
    """Measure every case on `--ranks` processes, print the rows, and write them as JSON when asked."""
    cases = [
        Case(
            tokens=tokens,
            experts=options.experts,
            chunks=chunks,
            call_tokens=options.call_tokens,
            hidden_size=options.hidden_size,
            dtype=options.dtype,
        )
        for tokens in options.tokens
        for chunks in options.chunks
    ]
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        ranks = [
            spawn.Process(target=_rank, args=(rank, options, cases, Path(folder))) for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("bench.py dispatch: a rank failed; its error is above")
        measured = json.loads((Path(folder) / "measured.json").read_text())
    rows = [_to_row(case, options.ranks, found) for case, found in zip(cases, measured, strict=True)]
    for row in rows:
        print(
            f"{row['case']:>34}  sent {row['bytes_sent'] / 1e6:8.2f} MB a forward, "
            f"floor {row['bytes_floor'] / 1e6:8.2f} ({row['bytes_sent'] / row['bytes_floor']:.3f})  {times_text(row)}"
        )
    if options.json:
        meta = describe_run(options.device, ("torch",)) | {
            "ranks": options.ranks,
            "dtype": str(options.dtype).removeprefix("torch."),
            "rounds": options.rounds,
            "clock": "wall, forward and backward",
            "hidden_size": options.hidden_size,
            "tokens_a_call": options.call_tokens,
            "capacity_factor": CAPACITY_FACTOR,
        }
        options.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


def _to_row(case: Case, ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    name = f"{case.tokens} tokens, {case.experts} experts, chunks {case.chunks}"
    return compare(name, "bare", found["ours_ms"], found["bare_ms"]) | {
        "tokens_an_image": case.tokens,
        "num_experts": case.experts,
        "dispatch_chunks": case.chunks,
        "bytes_sent": found["bytes_sent"],
        "bytes_floor": case.bytes_floor(ranks),
    }


def _rank(rank: int, options: argparse.Namespace, cases: list[Case], folder: Path) -> None:
    torch.set_num_threads(1)
    device = options.device
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=options.ranks,
    )
    with tqdm(total=options.rounds * len(cases) * 2, unit="timing", disable=None if rank == 0 else True) as bar:
        measured = _measure(cases, options.rounds, device, bar.update)
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def _measure(cases: list[Case], rounds: int, device: torch.device, tick: Callable[[], object]) -> list[dict[str, Any]]:
    sides = [{"ours_ms": _ours(case, device), "bare_ms": _bare(case, device)} for case in cases]
    found: list[dict[str, Any]] = [
        {"ours_ms": [], "bare_ms": [], "bytes_sent": _bytes_sent(s["ours_ms"])} for s in sides
    ]
    for side in sides:
        side["bare_ms"]()  # warm up
    for turn in range(rounds):
        for times, side in zip(found, sides, strict=True):
            for name in ("ours_ms", "bare_ms") if turn % 2 else ("bare_ms", "ours_ms"):
                times[name].append(_time_ms(side[name], device))
                tick()
    return found


def _ours(case: Case, device: torch.device) -> Callable[[], None]:
    """Return a forward and backward of the dispatcher, with experts that give back what they get."""
    world = dist.group.WORLD
    assert world is not None
    dispatcher = AllToAllDispatcher(world, case.chunks)
    x_BSD = _draw("x", case, device).requires_grad_()
    grad_BSD = _draw("grad", case, device)
    shape = (case.call_tokens // case.tokens, case.experts, case.tokens)
    scores_BES = torch.rand(shape, generator=parameter_generator(0, "scores")).to(device)
    gates_BEC, indices_BEC = scores_BES.topk(case.capacity, dim=-1, sorted=False)

    def forward_backward() -> None:
        dispatcher(x_BSD, gates_BEC, indices_BEC, lambda x_LRD: x_LRD).backward(grad_BSD)
        x_BSD.grad = None

    return forward_backward


def _bare(case: Case, device: torch.device) -> Callable[[], None]:
    rows = case.call_tokens // case.tokens * case.capacity
    x_ERD = torch.zeros(case.experts, rows, case.hidden_size, dtype=case.dtype, device=device)
    out_ERD = torch.empty_like(x_ERD)

    def exchange_four_times() -> None:
        for _ in range(4):  # there and back, forward and backward
            dist.all_to_all_single(out_ERD, x_ERD)

    return exchange_four_times


def _draw(name: str, case: Case, device: torch.device) -> Tensor:
    flat = torch.randn(case.call_tokens, case.hidden_size, generator=parameter_generator(0, name))
    return rearrange(flat, "(b s) d -> b s d", s=case.tokens).to(device=device, dtype=case.dtype)


def _time_ms(work: Callable[[], None], device: torch.device) -> float:
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else dist.barrier
    dist.barrier()
    start_s = time.perf_counter()
    work()
    wait()
    return 1e3 * (time.perf_counter() - start_s)


def _bytes_sent(forward_backward: Callable[[], None]) -> float:
    """Return the bytes that this rank sends to others in a forward: half of those of a forward and backward."""
    with _SentBytes() as sent:
        forward_backward()
    ranks = dist.get_world_size()
    return sent.total * (ranks - 1) / ranks / 2


class _SentBytes(TorchDispatchMode):
    """Adds up what goes into all-to-alls."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all" in op.name():
            self.total += args[0].nbytes
        return op(*args, **(kwargs or {}))
