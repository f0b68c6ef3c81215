"""Batches: any layout reads the same, from any step on, and workers neither change nor outlive anything."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.data.digit_scenes.dataset import open_digit_scenes
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE
from ecdit_ds.data.latents.dataset import LatentDataset, Samples
from ecdit_ds.data.loader import evaluation_batches, training_batches
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.data.order import sample_order
from ecdit_ds.errors import DataError

NUM_SAMPLES = 21
"""Neither a multiple of a batch nor more than a few, so that epochs end within steps."""
GLOBAL_BATCH = 8
Steps = list[list[Samples]]


def as_read(samples: Samples) -> Samples:
    """Leave a micro-batch as it is."""
    return samples


@pytest.fixture
def dataset(tiny_config: ModelConfig, tmp_path: Path) -> LatentDataset:
    """Return a small encoded set."""
    return open_digit_scenes(
        replace(tiny_config, latent_height=16, latent_width=16, max_text_tokens=10),
        DataConfig(num_train=NUM_SAMPLES, cache_dir=str(tmp_path)),
        split="train",
        seed=0,
        image_encoder=PixelVAE(),
        text_encoder=HashedWordEncoder(embed_dim=24, max_tokens=10),
    )


@pytest.fixture
def read(dataset: LatentDataset) -> Callable[..., Steps]:
    """Return `read(**changes)`: the first six steps of one rank as a list, with some arguments changed."""

    def read_changed(*, seed: int = 0, **changes: Any) -> Steps:
        mixture = Mixture([dataset], seed=seed, global_batch_size=GLOBAL_BATCH)
        arguments: dict[str, Any] = {
            "micro_batch_size": 2,
            "dp_rank": 0,
            "dp_size": 1,
            "start_sample": 0,
            "end_sample": 6 * GLOBAL_BATCH,
            "num_workers": 0,
            "transform": as_read,
        }
        return list(training_batches(mixture, **(arguments | changes)))

    return read_changed


def contents(micro_batches: list[Samples]) -> list[tuple[int, str, bytes]]:
    """Return position, caption and pixels of every sample, in the order of positions."""
    return sorted(
        (int(position), caption, latents.numpy().tobytes())
        for samples in micro_batches
        for position, caption, latents in zip(
            samples.stream_index_B, samples.captions, samples.latents_BCHW, strict=True
        )
    )


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)])
def test_the_ranks_together_read_the_same_global_batch_under_any_layout(
    read: Callable[..., Steps], dp_size: int, micro_batch_size: int, num_workers: int
) -> None:
    whole = read()
    of_rank = [
        read(dp_rank=rank, dp_size=dp_size, micro_batch_size=micro_batch_size, num_workers=num_workers)
        for rank in range(dp_size)
    ]
    for step, reference in enumerate(whole):
        pieces = [micro_batch for steps in of_rank for micro_batch in steps[step]]
        assert {len(piece.captions) for piece in pieces} == {micro_batch_size}
        assert contents(pieces) == contents(reference)
    assert [len(steps) for steps in of_rank] == [6] * dp_size


def test_steps_follow_the_stream_and_the_stream_follows_the_order(
    read: Callable[..., Steps], dataset: LatentDataset
) -> None:
    for step, micro_batches in enumerate(read(seed=5)):
        read_here = contents(micro_batches)
        positions = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        assert [position for position, _, _ in read_here] == positions.tolist()
        expected = [dataset[int(i)].caption for i in sample_order(positions, NUM_SAMPLES, seed=5)]
        assert [caption for _, caption, _ in read_here] == expected


def test_micro_batches_of_the_ranks_alternate_in_the_stream(read: Callable[..., Steps]) -> None:
    second_step = read(dp_rank=1, dp_size=2)[1]
    assert [samples.stream_index_B.tolist() for samples in second_step] == [[10, 11], [14, 15]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_starting_at_a_step_equals_skipping_the_steps_before(read: Callable[..., Steps], num_workers: int) -> None:
    layout = {"dp_rank": 1, "dp_size": 2, "num_workers": num_workers}
    resumed, whole = read(start_sample=4 * GLOBAL_BATCH, **layout), read(**layout)
    assert [contents(step) for step in resumed] == [contents(step) for step in whole[4:]]


def test_a_run_at_its_end_has_no_steps_left(read: Callable[..., Steps]) -> None:
    assert read(start_sample=6 * GLOBAL_BATCH) == []


@pytest.mark.parametrize(("num_workers", "is_elsewhere"), [(0, False), (1, True)])
def test_transforms_run_where_the_batch_is_read_on_one_thread(
    read: Callable[..., list[list[tuple[int, int]]]], num_workers: int, is_elsewhere: bool
) -> None:
    steps = read(num_workers=num_workers, transform=lambda samples: (os.getpid(), torch.get_num_threads()))
    for process, threads in (place for step in steps for place in step):
        assert (process != os.getpid()) == is_elsewhere
        if is_elsewhere:
            assert threads == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_leaves_the_global_generators_alone(read: Callable[..., Steps], num_workers: int) -> None:
    before_torch, before_numpy = torch.get_rng_state(), str(np.random.get_state())
    read(num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before_torch)
    assert str(np.random.get_state()) == before_numpy


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"start_sample": 12}, ["start_sample(12)", "global_batch_size(8)", "8 or 16"]),
        ({"start_sample": -8}, ["start_sample(-8)"]),
        ({"end_sample": 47}, ["end_sample(47)", "40 or 48"]),
        ({"micro_batch_size": 3}, ["micro_batch_size(3)", "global_batch_size(8)"]),
        ({"dp_size": 3}, ["ranks(3)"]),
    ],
)
def test_ranges_and_sizes_that_cut_a_step_are_refused_before_any_is_read(
    dataset: LatentDataset, refusal_of: Callable[[Callable[[], object]], str], change: dict[str, int], parts: list[str]
) -> None:
    mixture = Mixture([dataset], seed=0, global_batch_size=8)
    numbers = {"micro_batch_size": 2, "dp_size": 1, "start_sample": 0, "end_sample": 48}
    arguments: dict[str, Any] = {"dp_rank": 0, "num_workers": 0, "transform": as_read, **numbers, **change}
    message = refusal_of(lambda: training_batches(mixture, **arguments))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_the_whole_job_does_not_stop_the_batches(
    dataset: LatentDataset, read: Callable[..., Steps], number: signal.Signals
) -> None:
    """A scheduler signals workers too; the training process must still be able to finish its step and save."""
    batches = training_batches(
        Mixture([dataset], seed=0, global_batch_size=GLOBAL_BATCH),
        micro_batch_size=2,
        dp_rank=0,
        dp_size=1,
        start_sample=0,
        end_sample=6 * GLOBAL_BATCH,
        num_workers=1,
        transform=as_read,
    )
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, number)
    time.sleep(0.1)
    assert [contents(step) for step in [first, *batches]] == [contents(step) for step in read()]


def test_workers_end_with_the_iteration(dataset: LatentDataset) -> None:
    batches = training_batches(
        Mixture([dataset], seed=0, global_batch_size=GLOBAL_BATCH),
        micro_batch_size=2,
        dp_rank=0,
        dp_size=1,
        start_sample=0,
        end_sample=100 * GLOBAL_BATCH,
        num_workers=1,
        transform=as_read,
    )
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    del batches
    assert multiprocessing.active_children() == []


PROCESS_THAT_FAILS = """
import sys
from pathlib import Path
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.loader import training_batches
from ecdit_ds.data.mixture import Mixture
batches = training_batches(
    Mixture([LatentDataset(Path(sys.argv[1]))], seed=0, global_batch_size=8), micro_batch_size=2, dp_rank=0, dp_size=1,
    start_sample=0, end_sample=8000, num_workers=1, transform=lambda samples: samples,
)
next(batches)
raise RuntimeError("the training step failed")
"""


def test_a_training_process_that_fails_does_not_wait_for_its_workers(dataset: LatentDataset, tmp_path: Path) -> None:
    (folder,) = tmp_path.iterdir()
    ended = subprocess.run(
        [sys.executable, "-c", PROCESS_THAT_FAILS, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("RuntimeError: the training step failed")


def evaluate(dataset: LatentDataset, batch_size: int, dp_size: int) -> list[list[tuple[Samples, Tensor]]]:
    """Return the evaluation batches of every rank."""
    return [
        list(evaluation_batches(dataset, batch_size=batch_size, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]


@pytest.mark.parametrize(("batch_size", "dp_size"), [(1, 1), (4, 1), (7, 3), (4, 2), (2, 4), (32, 2)])
def test_evaluation_weighs_each_sample_once_and_gives_all_ranks_equal_work(
    dataset: LatentDataset, batch_size: int, dp_size: int
) -> None:
    of_rank = evaluate(dataset, batch_size, dp_size)
    assert len({len(batches) for batches in of_rank}) == 1
    weighed = []
    for samples, weights_B in (pair for batches in of_rank for pair in batches):
        assert len(samples.captions) == len(weights_B) == batch_size
        assert set(weights_B.tolist()) <= {0.0, 1.0}
        weighed += samples.stream_index_B[weights_B > 0].tolist()
        assert set(samples.stream_index_B[weights_B == 0].tolist()) <= {NUM_SAMPLES - 1}
    assert sorted(weighed) == list(range(NUM_SAMPLES))


def test_evaluation_reads_the_set_in_its_own_order(dataset: LatentDataset) -> None:
    ((samples, _),) = evaluate(dataset, NUM_SAMPLES, 1)[0]
    assert samples.captions == tuple(dataset[i].caption for i in range(NUM_SAMPLES))


def read_what_shrank(samples: Samples) -> Samples:
    """End as a process does that reads a map beyond the end of its file."""
    os.kill(os.getpid(), signal.SIGBUS)
    return samples


def test_a_worker_that_a_bus_error_ends_is_answered_with_one_line_about_its_causes(dataset: LatentDataset) -> None:
    steps = training_batches(
        Mixture([dataset], seed=0, global_batch_size=8),
        micro_batch_size=8,
        dp_rank=0,
        dp_size=1,
        start_sample=0,
        end_sample=8,
        num_workers=1,
        transform=read_what_shrank,
    )
    with pytest.raises(DataError, match=r"^a loader worker was ended by a bus error: .* shrank .* /dev/shm is full.*$"):
        list(steps)
