"""From a recipe to a run: everything is built here, once, in the order of `run`; nothing builds itself elsewhere."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ecdit_ds.checkpoint.lease import Lease, attempt_name, claim
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.retention import quarantine
from ecdit_ds.config.deepspeed_json import with_profile_in
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.encoders.from_recipe import check_encodable, describe_encoders, encoders_of, runs_encoders
from ecdit_ds.data.encoders.online import OnlineEncoders, online_encoders
from ecdit_ds.data.latents.index import VerifyOptions
from ecdit_ds.data.loader import training_batches
from ecdit_ds.data.mixture import Bucket, Mixture, SampleSet
from ecdit_ds.data.prefetch import prefetch
from ecdit_ds.data.splits import open_split, validate_split
from ecdit_ds.errors import CheckpointError, ExitCode
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.init import empty_model, initialize_by_name
from ecdit_ds.model.layers import LayerFactory
from ecdit_ds.parallel.activation_checkpoint import Recompute
from ecdit_ds.parallel.setup import init_process_groups, initialize_distributed
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.parallel.world import RankInfo, World
from ecdit_ds.planner.flops import training_flops
from ecdit_ds.runtime.exit_report import RunStatus, current_process, print_quietly
from ecdit_ds.runtime.fault_injection import faults_from_environment
from ecdit_ds.runtime.signals import StopSignal
from ecdit_ds.training.batches import EncodeBatch, MakeBatch
from ecdit_ds.training.callbacks import BadSampleLines, Callback, Console, JsonLines, TensorBoard
from ecdit_ds.training.engine import DeepSpeedEngine
from ecdit_ds.training.evaluator import Evaluator
from ecdit_ds.training.metrics import count_bad_samples, peak_flops_per_s
from ecdit_ds.training.run_dir import RunDir
from ecdit_ds.training.train_state import (
    TrainProgress,
    check_not_beyond,
    check_same_data,
    check_same_encoders,
    check_same_recipe,
    load_snapshot,
    none_valid,
    rejection_of,
    schedule_jumps,
)
from ecdit_ds.training.trainer import Surroundings, Trainer


def run(
    recipe: Recipe,
    topology: Topology,
    deepspeed_config: dict[str, Any],
    folder: RunDir,
    resume: str,
    stop: StopSignal,
    status: RunStatus,
) -> ExitCode:
    """Build everything and train; every rank calls this. Return DONE, or CHECKPOINTED after a stop.

    Args:
        resume: `auto`, `never`, or the path of a checkpoint or run.
        stop: asked at reports.
        status: filled in, for the last line.

    Raises:
        EcditError: on all ranks, for what a user can mend.
    """
    if not runs_encoders(recipe):
        check_encodable(recipe)
    if recipe.data.dataset == "encoded":
        validate_split(recipe, "train")
        validate_split(recipe, "heldout")
    device = initialize_distributed()
    world = World()
    faults = world.run_on_all(lambda: faults_from_environment(world.rank))
    status.rank, status.checkpoints, status.seats = world.rank, folder.checkpoints, world.share(current_process())
    status.watch_peers()
    encoders = world.run_on_all(partial(_open_encoders, recipe, device))
    attempt = world.broadcast(attempt_name())
    held_locks: list[IO[str]] = []
    with ExitStack() as undo:  # a start that is refused leaves the folder as it was
        lease, candidates = world.on_rank0(lambda: _claim(folder, recipe, resume, attempt, held_locks, undo))
        mixture, heldout_set = _open_data(recipe, world, encoders)
        data = _data_facts(recipe, mixture, encoders)
        described = world.run_on_all(lambda: describe_encoders(recipe, mixture.null_text, device if encoders else None))
        grid = init_process_groups(topology, recipe.parallel.dispatch_chunks)
        model = build_model(recipe, grid.layers, device)
        engine = DeepSpeedEngine(model, recipe.optimizer, with_profile_in(folder.path, deepspeed_config), grid)
        progress, resumed_from = _restore(
            candidates, folder.checkpoints, engine, recipe, world, partial(_check_same, recipe, data, described)
        )
        check_not_beyond(progress.step, recipe, folder.path)
        bad_before = world.on_rank0(lambda: count_bad_samples(folder.begin(recipe, progress.step)))
        undo.pop_all()

    surroundings = Surroundings(
        device=device,
        checkpoints=folder.checkpoints,
        lease=lease,
        resumed_from=resumed_from,
        faults=faults,
        status=status,
        stop=stop,
        data=data,
        encoders=described,
        bad_before=bad_before,
        **_work(recipe, topology, device, world, mixture, heldout_set, encoders),
    )
    callbacks = _callbacks(folder, recipe, progress) if world.rank == 0 else []
    try:
        was_stopped = Trainer(recipe, engine, world, surroundings, callbacks).fit(progress)
    finally:
        for callback in callbacks:
            with suppress(OSError):  # what could not be written was told already
                callback.close()
    world.all_true(True)  # no rank leaves while another one may still need it
    return ExitCode.CHECKPOINTED if was_stopped else ExitCode.DONE


def build_model(recipe: Recipe, layers: LayerFactory, device: torch.device) -> ECDiT:
    """Return the model on `device`, its weights a function of the seed and of their names."""
    recompute = Recompute(mode=recipe.train.recompute, every=recipe.train.recompute_every)
    model = empty_model(recipe.model, layers, device, run_block=recompute)
    initialize_by_name(model, recipe.train.seed)
    return model


def share_cores(place: RankInfo) -> None:
    """Give each rank of this machine its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))


def _claim(
    folder: RunDir, recipe: Recipe, resume: str, attempt: str, held_locks: list[IO[str]], undo: ExitStack
) -> tuple[Lease, list[Path]]:
    """Lock and claim the folder, and return its candidates; `undo` is given what takes that back."""
    if folder.path.is_dir():
        folder.check_recipe(recipe)
    folder.candidates(resume)
    held_locks.append(folder.lock(attempt, undo))
    folder.check_recipe(recipe)
    lease = claim(folder.path, attempt)  # before looking, so that no old life can publish what was not seen
    undo.callback(lease.give_back)
    return lease, folder.candidates(resume)


def _open_encoders(recipe: Recipe, device: torch.device) -> OnlineEncoders | None:
    """Return the frozen encoders on this rank's device, where some run beside training."""
    if not runs_encoders(recipe):
        return None
    check_encodable(recipe, device)  # here, so that they are loaded once
    return online_encoders(*encoders_of(recipe, device), device)


def _open_data(recipe: Recipe, world: World, beside: OnlineEncoders | None) -> tuple[Mixture, SampleSet]:
    """Open what is trained on and the held-out set; rank 0 makes them first where they are missing.

    The ranks share out the shards that are compared with their sizes and checksums.
    """
    encoders = (beside.image_encoder, beside.text_encoder) if beside else None
    if recipe.data.dataset == "digit_scenes":
        encoders = encoders_of(recipe)

    def open_both(check: VerifyOptions) -> tuple[Mixture, SampleSet]:
        mixture = Mixture(
            open_split(recipe, "train", encoders, check=check),
            weights=recipe.data.weights,
            seed=recipe.train.seed,
            global_batch_size=recipe.train.global_batch_size,
        )
        (heldout_set,) = open_split(recipe, "heldout", encoders, check=check)
        return mixture, heldout_set

    world.on_rank0(lambda: open_both(VerifyOptions(shards=slice(0))) and None)
    share = VerifyOptions(shards=slice(world.rank, None, world.size), checksums=recipe.data.verify == "checksums")
    return world.run_on_all(lambda: open_both(share))


def _data_facts(recipe: Recipe, mixture: Mixture, encoders: OnlineEncoders | None) -> dict[str, Any]:
    """Return what checkpoints say of the data; digit scenes are a function of the recipe."""
    if recipe.data.dataset == "digit_scenes":
        return {}
    beside = [encoders.image_encoder.identity, encoders.text_encoder.identity] if encoders else []
    return {"sets": [of_set.fingerprint for of_set in mixture.sets], "encoders_beside": beside}


def _restore(
    candidates: list[Path],
    own: Path,
    engine: DeepSpeedEngine,
    recipe: Recipe,
    world: World,
    check_same: Callable[[Mapping[str, Any], Path], None],
) -> tuple[TrainProgress, Path | None]:
    """Fill the engine from the first candidate that proves whole on every rank; `own` is this run's checkpoints.

    Return how far it is, and where from; (the beginning, None) without candidates.

    Args:
        check_same: as `_check_same`, of this run.

    Raises:
        CheckpointError: there were candidates and none is valid, or the recipe, the data or its encoders changed.
    """
    rejections: dict[Path, str] = {}
    for folder in candidates:
        fault = world.on_rank0(partial(rejection_of, folder, check_same))
        if fault is None:
            progress, own_fault = _try_load(folder, engine)
            if world.all_true(own_fault is None) and progress is not None:
                engine.restored(progress.num_updates)
                world.on_rank0(partial(_report_resume, folder, progress, rejections, own, recipe))
                return progress, folder
            faults = world.broadcast(world.gather(own_fault))
            fault = next(reason for reason in faults if reason is not None)
        rejections[folder] = fault
    if rejections:
        raise none_valid(rejections.values())
    return TrainProgress(step=0, samples_seen=0, num_updates=0), None


def _report_resume(
    folder: Path, progress: TrainProgress, rejections: dict[Path, str], own: Path, recipe: Recipe
) -> None:
    """Log the resume point and what jumps there, and quarantine this run's damaged checkpoints."""
    for damaged, fault in rejections.items():
        is_own = damaged.parent.resolve() == own.resolve()
        print_quietly(f"rejected {fault}; kept as {quarantine(damaged) if is_own else damaged}", sys.stdout)
    print_quietly(f"goes on from {folder} at step {progress.step}", sys.stdout)
    for line in schedule_jumps(Reader(folder).manifest.meta["recipe"], recipe, progress.step):
        print_quietly(line, sys.stdout)


def _check_same(
    recipe: Recipe, data: dict[str, Any], encoders: dict[str, Any], meta: Mapping[str, Any], folder: Path
) -> None:
    """Refuse a checkpoint of another recipe, other data or other encoders than the run's."""
    check_same_recipe(meta["recipe"], recipe, folder)
    check_same_data(meta.get("data"), data, folder)
    check_same_encoders(meta.get("encoders"), encoders, folder)


def _try_load(folder: Path, engine: DeepSpeedEngine) -> tuple[TrainProgress | None, str | None]:
    try:
        return load_snapshot(Reader(folder), engine), None
    except CheckpointError as error:
        return None, str(error)


def _work(
    recipe: Recipe,
    topology: Topology,
    device: torch.device,
    world: World,
    mixture: Mixture,
    heldout_set: SampleSet,
    encoders: OnlineEncoders | None,
) -> dict[str, Any]:
    """Return the part of a run's surroundings that says what there is to do."""
    micro = recipe.micro_batch_size(topology.dp)
    transform = MakeBatch(recipe, mixture.null_text)

    def batches(start_sample: int) -> Any:
        steps = training_batches(
            mixture,
            micro_batch_size=micro,
            dp_rank=topology.coordinates(world.rank).dp,
            dp_size=topology.dp,
            start_sample=start_sample,
            end_sample=recipe.train.max_steps * recipe.train.global_batch_size,
            num_workers=recipe.data.num_workers,
            transform=transform,
        )
        if mixture.is_whole:
            return steps
        assert encoders is not None
        return prefetch(steps, EncodeBatch(encoders=encoders, mixture=mixture))

    monitor = Evaluator(
        recipe=recipe,
        topology=topology,
        world=world,
        device=device,
        heldout_set=heldout_set,
        encoders=encoders,
        null_text=mixture.null_text,
    )
    peak = peak_flops_per_s(device)
    return {
        "batches": batches,
        "is_tp_leader": topology.coordinates(world.rank).tp == 0,
        "heldout_losses": monitor.heldout_losses,
        "draw": monitor.draw,
        "scene_scores": monitor.scene_scores if recipe.sample.scenes_per_kind else None,
        "flops_per_image": _Flops(recipe, mixture, micro),
        "peak_flops_per_s": peak * world.size if peak else None,
    }


class _Flops:
    """Step (from 0) -> model FLOPs of an image's forward and backward, with the mask and the size of that step."""

    def __init__(self, recipe: Recipe, mixture: Mixture, micro_batch_size: int) -> None:
        self._recipe, self._mixture = recipe, mixture
        self._pool_images = recipe.model.pool_images(micro_batch_size)
        self._known: dict[tuple[Bucket, float], float] = {}

    def __call__(self, step: int) -> float:
        key = bucket, ratio = self._mixture.bucket_at(step), self._recipe.train.mask_ratio_at(step)
        if key not in self._known:
            model = self._recipe.model.resized(*bucket[1:])
            self._known[key] = training_flops(model, model.num_kept_tokens(ratio), self._pool_images).total
        return self._known[key]


class _SampleFiles(Callback):
    """Sample grids as PNG."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_samples(self, step: int, images_BHWC: np.ndarray, captions: list[str]) -> None:
        from ecdit_ds.inference.figures import save_grid  # matplotlib takes a while, and one rank alone needs it

        save_grid(images_BHWC, captions, min(4, len(captions)), self._folder / f"step_{step}.png")


def _callbacks(folder: RunDir, recipe: Recipe, progress: TrainProgress) -> list[Callback]:
    return [
        Console(progress.step, recipe.train.max_steps),
        JsonLines(folder.metrics, folder.evaluations),
        BadSampleLines(folder.bad_samples),
        *_tensorboard(folder.tensorboard, progress),
        _SampleFiles(folder.samples),
    ]


def _tensorboard(folder: Path, progress: TrainProgress) -> list[Callback]:
    """Return the writer of TensorBoard's files; none where they cannot be written, since metrics.jsonl has it all."""
    try:
        return [TensorBoard(folder, progress.step, progress.step - progress.num_updates)]
    except OSError as error:
        print_quietly(
            f"warning: {folder}: cannot be written: {error.strerror or error}; training goes on without", sys.stderr
        )
        return []
