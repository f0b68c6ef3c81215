"""A few ranks as copies of this process, so that imports are paid once; for small questions about several of them."""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS_AT_MOST = 60
"""For a rank that waits for one which never answers."""


def on_ranks(size: int, work: Callable[[int], Any]) -> list[Any]:
    """Return what `work(rank)` returns on each of `size` ranks: tensors and plain data. A rank that raises raises here.

    The ranks talk through gloo, and `work` may close over anything: the processes are forked.
    """
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        sys.stderr.flush()
        processes = [_forked(rank, size, Path(folder), work) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        said = [path.read_text() for rank in range(size) if (path := Path(folder, f"{rank}.txt")).exists()]
        assert not any(codes), f"exit codes {codes}\n" + "\n".join(said)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(size)]


def _forked(rank: int, size: int, folder: Path, work: Callable[[int], Any]) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.alarm(SECONDS_AT_MOST)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        torch.save(work(rank), folder / f"{rank}.pt")
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(code)
