"""Batches for training and for the held-out loss, alike under any layout.

Training reads an endless stream: at position n stands what `Mixture.ids_at(n)` says. A step takes `global_batch_size`
positions; its micro-batch m of data-parallel rank r holds

    start of the step + (m * dp_size + r) * micro_batch_size + j,    j < micro_batch_size

so the ranks together read exactly the global batch, and the whole state of a loader is one integer. The position
travels with the sample as `stream_index_B`; all randomness about the sample is addressed by it. Bad samples
are replaced where they are read (`replacing`).
"""

import atexit
import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ecdit_ds.data.collate import pack_tensors
from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.data.mixture import BucketView, Mixture, SampleSet
from ecdit_ds.data.replacement import read_valid
from ecdit_ds.errors import DataError, EcditError
from ecdit_ds.seeding import stable_seed

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
"""Linux's prctl option for the signal that is sent when the parent dies."""
_BUS_ERROR = (
    "a loader worker was ended by a bus error: a file of the training set shrank while it was read, or /dev/shm is "
    "full; compare the sets with tools/encode_data.py inspect, or lower data.num_workers"
)


def training_batches(
    mixture: Mixture,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    start_sample: int,
    end_sample: int,
    num_workers: int,
    transform: Callable[[Samples], T],
) -> Iterator[list[T]]:
    """Iterate over steps, each the list of this rank's micro-batches.

    Args:
        mixture: the stream.
        micro_batch_size: samples of one forward of one rank.
        dp_rank, dp_size: which data-parallel rank, of how many.
        start_sample: samples seen so far; the loader's whole state.
        end_sample: samples seen after the last step.
        num_workers: reading processes; the batches do not depend on it.
        transform: applied to each micro-batch where it is read.

    Raises:
        DataError: the range is not one of whole steps, or the micro-batches do not fill the global batch; later, a
            set is damaged, or nearly all of its samples are bad.
    """
    global_batch_size = mixture.global_batch_size
    if global_batch_size % (micro_batch_size * dp_size):
        raise DataError(
            f"global_batch_size({global_batch_size}) is not a multiple of micro_batch_size({micro_batch_size}) x "
            f"data-parallel ranks({dp_size}); change one of them"
        )
    _require_whole_steps("start_sample", start_sample, global_batch_size)
    _require_whole_steps("end_sample", end_sample, global_batch_size)
    positions = _RankPositions(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        start_sample=start_sample,
        end_sample=end_sample,
    )
    loader = DataLoader(
        _Stream(mixture=mixture, transform=transform),
        batch_size=None,  # the sampler gives whole micro-batches
        sampler=positions,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_prepare_worker,
        pin_memory=torch.cuda.is_available(),
        # Without one of its own, a loader advances torch's global generator.
        generator=torch.Generator().manual_seed(stable_seed(mixture.seed, "loader")),
    )
    return _steps(loader, global_batch_size // (micro_batch_size * dp_size))


def _require_whole_steps(name: str, sample: int, global_batch_size: int) -> None:
    if sample < 0 or sample % global_batch_size:
        below = max(sample, 0) // global_batch_size * global_batch_size
        raise DataError(
            f"{name}({sample}) is not a multiple of global_batch_size({global_batch_size}): a step is never cut; "
            f"choose {below} or {below + global_batch_size}, or keep the batch size of the run so far"
        )


def evaluation_batches(
    dataset: SampleSet, *, batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[tuple[Samples, Tensor]]:
    """Iterate once over a fixed set, bucket by bucket, split over the ranks.

    Args:
        dataset: read in its own order, of each bucket; `stream_index_B` is the sample's place in it.
        batch_size: samples a rank sees at a time.
        dp_rank: data-parallel rank, in [0, dp_size).
        dp_size: data-parallel ranks.

    Returns:
        Pairs of samples and weights_B (fp32): 1 for each sample of the set exactly once over all ranks, 0 for the
        repeats of a bucket's last sample that give every rank equally many batches of equal size, and for bad samples.
        All ranks are at the same bucket at a time.
    """
    for bucket in range(len(dataset.buckets)):
        part = BucketView(dataset.runs, bucket)
        for start in range(0, len(part), batch_size * dp_size):
            places_B = start + dp_rank * batch_size + np.arange(batch_size)
            indices_B = part.samples(np.minimum(places_B, len(part) - 1))
            weights_B = torch.from_numpy((places_B < len(part)).astype(np.float32))
            samples = dataset.gather(indices_B, indices_B)
            weights_B[list(samples.bad)] = 0.0
            yield samples, weights_B


@dataclass(frozen=True, kw_only=True)
class _RankPositions(Sampler[npt.NDArray[np.int64]]):
    """The stream positions of each of a rank's micro-batches, step after step."""

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    start_sample: int
    end_sample: int

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        stride = self.micro_batch_size * self.dp_size
        first = self.start_sample + self.dp_rank * self.micro_batch_size
        for start in range(first, self.end_sample, stride):
            yield np.arange(start, start + self.micro_batch_size, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class _Failed:
    """What a user can mend, on its way from a worker: torch would make a traceback of it."""

    error: EcditError


@dataclass(frozen=True, kw_only=True)
class _Stream(Dataset[T | _Failed]):
    """The endless stream as torch's loader wants it: indexed by an array of positions."""

    mixture: Mixture
    transform: Callable[[Samples], T]

    def __getitem__(self, positions: npt.NDArray[np.int64]) -> T | _Failed:
        try:
            batch = self.transform(read_valid(self.mixture, positions))
        except EcditError as error:
            return _Failed(error=error)
        return batch if get_worker_info() is None else pack_tensors(batch)


def _steps(loader: DataLoader[T | _Failed], num_micro_batches: int) -> Iterator[list[T]]:
    micro_batches = iter(loader)
    stop_workers = getattr(micro_batches, "_shutdown_workers", _do_nothing)
    # Workers are deaf to SIGTERM, by which an exiting Python would end them: it would wait for ever.
    atexit.register(stop_workers)
    try:
        while step := [_checked(batch) for batch in itertools.islice(micro_batches, num_micro_batches)]:
            yield step
    except RuntimeError:
        # What torch says depends on who notices first, and names the signal in words, if at all.
        if _had_bus_error(micro_batches):
            raise DataError(_BUS_ERROR) from None
        raise
    finally:
        atexit.unregister(stop_workers)
        stop_workers()


def _had_bus_error(micro_batches: object) -> bool:
    return any(worker.exitcode == -signal.SIGBUS for worker in getattr(micro_batches, "_workers", ()))


def _checked(micro_batch: T | _Failed) -> T:
    if isinstance(micro_batch, _Failed):
        raise micro_batch.error
    return micro_batch


def _prepare_worker(worker: int) -> None:
    # Its tokenizers would share out work to threads that a fork left behind.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # the training process beside it has use for the other cores
    # Schedulers and terminals signal all processes of a job. Whether to stop is for the training process to decide,
    # after it has saved; a worker ends with it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A worker has its parent's sockets too: while it lives, a killed rank's peers wait for an answer. By itself it
    # would notice after seconds.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _as_it_is(micro_batch: T) -> T:
    return micro_batch


def _do_nothing() -> None:
    """Stop no workers: without any, the training process reads."""
