"""From stored samples to a training step, for `bench.py loader`: where a worker's time goes, and what a step waits.

Suffixes: B batch, C channels, H, W latent height and width.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.data.loader import training_batches
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.data.replacement import read_valid
from ecdit_ds.flow.objective import FlowBatch, flow_losses, sample_noise
from ecdit_ds.model.init import empty_model, initialize_by_name
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.planner.flops import training_flops
from ecdit_ds.planner.hardware import bf16_peak_of
from ecdit_ds.training.batches import MakeBatch
from tools.benchmarks.corpus import Corpus

MEASURED_STEPS = 5
STEPS_WAITED = 15
GPU = "H100"


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """What a step of a micro-batch takes."""

    micro_batch_size: int
    seconds: float | None
    """None where it is yet to be measured, on a batch of the set."""
    source: str


def step_time(recipe: Recipe, micro_batch_size: int, utilization: float) -> StepTime:
    """Return the time of a micro-batch's forward and backward on a GPU, from the planner's FLOPs.

    A recipe of digit scenes trains on CPUs: its step, with the recipe's own batch on one rank, is left to measure.
    """
    model = recipe.model
    if recipe.data.dataset != "encoded":
        return StepTime(
            micro_batch_size=recipe.micro_batch_size(1), seconds=None, source="forward and backward, measured here"
        )
    kept = model.num_kept_tokens(recipe.train.mask_ratio_at(0))
    flops = micro_batch_size * training_flops(model, kept, model.pool_images(micro_batch_size)).total
    peak = bf16_peak_of(GPU)
    assert peak is not None
    return StepTime(
        micro_batch_size=micro_batch_size,
        seconds=flops / (peak * utilization),
        source=f"estimate: {flops:.3g} FLOPs at {utilization:.0%} of {peak:.3g} FLOP/s, one {GPU}",
    )


def worker_row(case: str, corpus: Corpus, workers: int, alone: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the speed of the training loader with some workers that only gather, from the first batch to the last."""
    batches = 3 * len(corpus.order())
    loaded = _batches(corpus, batches, workers, _as_read)
    next(loaded)
    began, samples = time.perf_counter(), 0
    for (micro_batch,) in loaded:
        samples += len(micro_batch.captions)
    speed = samples / (time.perf_counter() - began)
    raw = next(row for row in alone if row["side"].startswith("raw"))
    return {
        "case": case,
        "side": f"ours, {workers} worker{'s'[: workers - 1]}",
        "workers": workers,
        "samples_per_second": speed,
        "samples_per_second_per_core": speed / workers,
        "samples_per_second_spread": [speed, speed],
        "bytes_per_second": speed * raw["bytes_per_second"] / raw["samples_per_second"],
        "of_raw": None,
        "of_raw_spread": None,
        "over_formatter": None,
        "over_formatter_spread": None,
    }


def _as_read(samples: Samples) -> Samples:
    return samples


def _mixture(corpus: Corpus) -> Mixture:
    return Mixture([corpus.ours], seed=0, global_batch_size=corpus.batch_size)


def _batches(corpus: Corpus, count: int, workers: int, transform: Callable[[Samples], Any]) -> Any:
    size = corpus.batch_size
    return training_batches(
        _mixture(corpus),
        micro_batch_size=size,
        dp_rank=0,
        dp_size=1,
        start_sample=0,
        end_sample=count * size,
        num_workers=workers,
        transform=transform,
    )


def way_to_a_step(corpus: Corpus, step: StepTime, workers: list[int], rounds: int, threads: int) -> dict[str, Any]:
    """Return where a worker's time for a micro-batch goes, and what a step waits for one.

    Args:
        threads: of the step, where it is measured; loading has one.
    """
    recipe, order = corpus.recipe, corpus.order()
    transform = MakeBatch(recipe, corpus.ours.null_text)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    mixture = _mixture(corpus)
    for turn in range(max(rounds, 3)):
        positions = turn * corpus.batch_size + np.arange(corpus.batch_size)
        timed("gather", partial(corpus.ours.gather, order[turn % len(order)], positions))
        samples = timed("read", partial(read_valid, mixture, positions))
        batch = timed("transform", partial(transform, samples))
        shape, index_B = tuple(samples.latents_BCHW.shape[1:]), samples.stream_index_B
        timed("noise", partial(sample_noise, shape, index_B, recipe.train.seed))
    parts = {name: statistics.median(values) for name, values in seconds.items()}
    split = {
        "gather": parts["gather"],
        "order and check": max(0.0, parts["read"] - parts["gather"]),
        "noise": parts["noise"],
        "rest": max(0.0, parts["transform"] - parts["noise"]),
    }
    step_seconds = step.seconds or _measure_step(recipe, batch, threads)
    return {
        "micro_batch_size": corpus.batch_size,
        "step_seconds": step_seconds,
        "step_source": step.source,
        "worker_seconds": parts["read"] + parts["transform"],
        "parts_seconds": split,
        "waits_seconds": {count: _wait(corpus, transform, step_seconds, count) for count in (0, *workers)},
    }


def _measure_step(recipe: Recipe, batch: FlowBatch, threads: int) -> float:
    """Return the median seconds of forward and backward on the CPU; the optimizer's are left out."""
    one_thread = torch.get_num_threads()
    torch.set_num_threads(threads)
    model = empty_model(recipe.model, serial_layers(), torch.device("cpu"))
    initialize_by_name(model, recipe.train.seed)
    seconds = []
    for _ in range(1 + MEASURED_STEPS):
        began = time.perf_counter()
        model.zero_grad(set_to_none=True)
        flow_losses(model, batch.to(torch.device("cpu")), recipe.model.patch_size).flow_B.mean().backward()
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(one_thread)
    return statistics.median(seconds[1:])


def _wait(corpus: Corpus, transform: Callable[[Samples], Any], step_seconds: float, workers: int) -> float:
    """Return the median seconds that training waits for a batch when it asks for one every `step_seconds`."""
    loaded, waits = iter(_batches(corpus, 2 + STEPS_WAITED, workers, transform)), []
    for _ in itertools.repeat(None, 2 + STEPS_WAITED):
        time.sleep(step_seconds)  # as the device computes
        began = time.perf_counter()
        next(loaded)
        waits.append(time.perf_counter() - began)
    return statistics.median(waits[2:])


def way_lines(way: dict[str, Any]) -> list[str]:
    """Return what a person reads."""
    step, worker = way["step_seconds"], way["worker_seconds"]
    parts = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in way["parts_seconds"].items())
    lines = [
        f"  step of {way['micro_batch_size']} samples {1e3 * step:.1f} ms ({way['step_source']})",
        f"  a worker's work for it {1e3 * worker:.2f} ms: {parts}; one worker is busy {worker / step:.1%} of the time",
    ]
    for workers, seconds in way["waits_seconds"].items():
        lines.append(f"  with {workers} workers a step waits {1e3 * seconds:.3f} ms: {seconds / step:.2%} (aim 2 %)")
    return lines
