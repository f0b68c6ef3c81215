"""The loop: when things happen. What a step is, the engine knows; what is shown to whom, the callbacks know."""

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ecdit_ds.checkpoint.finite import sum_nonfinite, tell_nonfinite
from ecdit_ds.checkpoint.lease import Lease
from ecdit_ds.checkpoint.naming import list_checkpoints, step_of
from ecdit_ds.checkpoint.retention import find_damage
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.sources.bad_sample import ReplacedSample
from ecdit_ds.errors import NonFiniteError, UnrecoverableError
from ecdit_ds.flow.objective import FlowBatch, flow_losses
from ecdit_ds.parallel.world import World
from ecdit_ds.runtime.exit_report import RunStatus, print_quietly
from ecdit_ds.runtime.fault_injection import Faults
from ecdit_ds.runtime.signals import StopSignal, format_stop_reasons
from ecdit_ds.training.callbacks import Callback
from ecdit_ds.training.checkpointer import Checkpointer
from ecdit_ds.training.engine import DeepSpeedEngine, StepResult
from ecdit_ds.training.metrics import (
    BadSampleCounts,
    BadSamples,
    MetricLog,
    RoutingProbe,
    bad_sample_lines,
    finite_or_none,
)
from ecdit_ds.training.optimizer import learning_rate
from ecdit_ds.training.train_state import TrainProgress, count_nonfinite_shards

T = TypeVar("T")
Batches = Callable[[int], Iterable[list[FlowBatch]]]
"""start sample -> this rank's micro-batches, step after step."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a run is given besides its recipe."""

    device: torch.device
    checkpoints: Path
    lease: Lease
    """The right to publish there."""
    resumed_from: Path | None
    faults: Faults
    status: RunStatus
    batches: Batches
    heldout_losses: Callable[[nn.Module], list[float]]
    """model -> held-out loss at each fixed time; collective."""
    draw: Callable[[nn.Module], np.ndarray]
    """model -> uint8 pictures (B, H, W, 3) of the recipe's prompts; collective."""
    scene_scores: Callable[[nn.Module], dict[str, Any]] | None
    """model -> how many held-out digit scenes it draws right (`Alignment.summary`); collective. None: not asked for."""
    flops_per_image: Callable[[int], float]
    """Step (from 0) -> model FLOPs of an image in it, which depend on how many tokens it leaves out."""
    stop: StopSignal
    is_tp_leader: bool
    """Whether this rank counts those of its batches: one of each group that trains on the same does."""
    data: Mapping[str, Any]
    """What is trained on, for checkpoints to say; empty where the recipe says it all."""
    encoders: Mapping[str, Any]
    """What that went through, for checkpoints to say."""
    bad_before: BadSampleCounts
    """Bad samples that earlier lives met, up to the step that is gone on from."""
    peak_flops_per_s: float | None
    """Peak FLOP/s of all devices together; None where it is not known."""


class Trainer:
    """Trains until train.max_steps."""

    def __init__(
        self,
        recipe: Recipe,
        engine: DeepSpeedEngine,
        world: World,
        surroundings: Surroundings,
        callbacks: Sequence[Callback],
    ) -> None:
        self.recipe, self.engine, self.world = recipe, engine, world
        self._given, self._callbacks = surroundings, callbacks
        self._log, self._probe = MetricLog(), RoutingProbe(engine.module)
        self._bad = BadSamples(recipe.data.max_bad)  # `fit` knows what earlier lives met
        given = surroundings
        self._saver = Checkpointer(
            given.checkpoints,
            recipe,
            engine,
            world,
            given.lease,
            given.faults,
            given.resumed_from,
            self._note,
            given.data,
            given.encoders,
        )
        self._mute: set[str] = set()
        self._heldout: float | None = None
        """Mean held-out loss of weights and average as last looked at in this life: finite only where both are."""

    def fit(self, progress: TrainProgress) -> bool:
        """Train on from `progress` until train.max_steps, or until any rank was asked to stop; return whether one was.

        A stop is agreed at a report: all ranks save that step and leave.

        Raises:
            UnrecoverableError: train.max_skipped_steps steps in a row had a non-finite gradient, weights or what is
                kept beside them are not finite, the last step's held-out loss is not, or more samples are bad than
                data.max_bad.
            CheckpointError: the last checkpoint could not be written, or a newer attempt has taken over.
            RankLostError: a checkpoint was not written in time.
        """
        train = self.recipe.train
        self._given.status.step = progress.step
        self._bad = BadSamples(
            self.recipe.data.max_bad, before=self._given.bad_before, num_trained=progress.samples_seen
        )
        if progress.step == 0:
            self._evaluate(0)
        for micro_batches, seconds_waited in _timed(self._batches(progress)):
            self._given.faults.at("step", progress.step + 1)
            started = time.perf_counter()
            result = self._step(micro_batches, progress.step)
            num_bad = self._bad.note(bad for batch in micro_batches for bad in self._counted(batch))
            progress = TrainProgress(
                step=progress.step + 1,
                samples_seen=progress.samples_seen + train.global_batch_size,
                num_updates=self.engine.num_updates,
                skipped_in_a_row=progress.skipped_in_a_row + 1 if result.is_skipped else 0,
            )
            self._given.status.step = progress.step
            self._record(progress, result, seconds_waited + time.perf_counter() - started, num_bad)
            self._saver.complain()
            self._saver.keeps_all = result.is_skipped
            self._check_finite(progress)
            is_last = progress.step == train.max_steps
            is_checkpoint = progress.step % train.checkpoint_every == 0
            is_report = is_last or is_checkpoint or progress.step % train.log_every == 0
            was_stopped = is_report and self._report() and not is_last
            if was_stopped:
                self._given.status.stop_reason = format_stop_reasons(self.world.share(self._given.stop.reason))
                self._saver.save_last(progress, read_back=False)  # first of all: whoever asked may not wait
            if is_last or progress.step % train.evaluate_every == 0:
                self._evaluate(progress.step)
            if is_last or progress.step % train.sample_every == 0:
                self._draw(progress.step)
            if was_stopped:
                self._note(self._farewell(progress))
                return True
            if is_last:
                self._saver.save_last(progress, read_back=True)
            elif is_checkpoint:
                self._saver.start(progress)
        self._conclude(progress)
        return False

    def _batches(self, progress: TrainProgress) -> Iterator[list[FlowBatch]]:
        if progress.step < self.recipe.train.max_steps:
            yield from self._given.batches(progress.samples_seen)

    def _step(self, micro_batches: list[FlowBatch], step: int) -> StepResult:
        on_device = [batch.to(self._given.device) for batch in micro_batches]
        rate = learning_rate(step, self.recipe.train.max_steps, self.recipe.optimizer)
        return self.engine.step(on_device, self._loss, rate)

    def _loss(self, model: nn.Module, batch: FlowBatch) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        losses = flow_losses(model, batch, recipe.model.patch_size)
        others = (
            recipe.model.load_balance_weight * losses.load_balance
            + recipe.train.reconstruction_weight * losses.reconstruction
        )
        return losses.flow_B.mean(), others

    def _counted(self, batch: FlowBatch) -> tuple[ReplacedSample, ...]:
        """Return the bad samples of a batch on one rank of those that train on it together."""
        return batch.replaced if self._given.is_tp_leader else ()

    def _record(self, progress: TrainProgress, result: StepResult, seconds: float, num_bad: int) -> None:
        images_per_second = self.recipe.train.global_batch_size / seconds
        flops_per_second = images_per_second * self._given.flops_per_image(progress.step - 1)
        peak = self._given.peak_flops_per_s
        facts: dict[str, Any] = {
            "step": progress.step,
            "samples_seen": progress.samples_seen,
            "learning_rate": learning_rate(progress.step - 1, self.recipe.train.max_steps, self.recipe.optimizer),
            "is_skipped": result.is_skipped,
            "seconds": seconds,
            "images_per_second": images_per_second,
            "model_flops_per_second": flops_per_second,
            "model_flops_utilization": flops_per_second / peak if peak else None,
            "memory_bytes": _memory_bytes(self._given.device),
            "experts_per_token": None,
        }
        routing = self._probe.latest()
        tensors = {
            "loss": result.loss,
            "auxiliary_loss": result.auxiliary_loss,
            "grad_norm": torch.as_tensor(result.grad_norm, device=result.loss.device),
        }
        if routing:
            tensors["experts_per_token"] = routing["experts_per_token"].mean()
            tensors |= {name: values for name, values in routing.items() if name != "experts_per_token"}
        self._log.record(facts, tensors, {"bad_samples": num_bad})

    def _check_finite(self, progress: TrainProgress) -> None:
        limit = self.recipe.train.max_skipped_steps
        if not progress.skipped_in_a_row:
            return
        self._note(
            f"step {progress.step} skipped on every rank: a gradient is not finite "
            f"({progress.skipped_in_a_row} in a row, the run ends at {limit})"
        )
        if progress.skipped_in_a_row >= limit:
            self._report()
            self._saver.finish()
            raise UnrecoverableError(
                f"step {progress.step}: {limit} steps in a row had a non-finite gradient (train.max_skipped_steps); "
                "inspect the data, or train with a lower optimizer.learning_rate and another --output"
            )

    def _report(self) -> bool:
        """Tell of the steps since the last report, and publish what all have written; return whether any is to stop."""
        wants_stop = self._given.stop.reason is not None
        answers = (wants_stop, self._saver.is_written, not self.engine.is_finite())
        records, (stops, written, broken) = self._log.flush(self.world, answers)
        if records:
            self._tell(lambda callback: callback.on_report(records))
            self._judge(records)
        if written == 1 or broken:
            self._saver.finish()
        if broken:
            self._give_up_on_state()
        return stops > 0

    def _give_up_on_state(self) -> NoReturn:
        found = self.world.share(count_nonfinite_shards(self.engine))
        told = tell_nonfinite(sum_nonfinite(item for of_rank in found for item in of_rank.items()))
        newest = self._saver.newest
        raise UnrecoverableError(
            f"step {self._given.status.step}: {told}, though gradients may be; no later step mends that, and it is not "
            "saved; train with a lower optimizer.learning_rate or optimizer.weight_decay and another --output, since "
            f"as it is this run would go on from {newest.name if newest else 'the beginning'} and come here again"
        )

    def _conclude(self, progress: TrainProgress) -> None:
        """Say that the run is done, unless its finite weights have grown so large that what they predict is not.

        A last step that was skipped says nothing by itself: a bad batch leaves good weights behind.
        """
        if self._heldout is None:  # at its end before this life began
            with _evaluating(self.engine.module) as model:
                losses = self._given.heldout_losses(model)
                with self.engine.ema_weights():
                    self._heldout = float(np.mean([*losses, *self._given.heldout_losses(model)]))
        skipped = progress.skipped_in_a_row
        told = f", the last {skipped} skipped" if skipped else ""
        if not np.isfinite(self._heldout):
            last_update = progress.step - skipped
            older = (f for f in list_checkpoints(self._given.checkpoints) if step_of(f) < last_update)
            before = next((folder for folder in older if find_damage(folder) is None), None)
            raise UnrecoverableError(
                f"all {progress.step} steps are done{told}, and the held-out loss is {self._heldout}: as a rule, "
                f"weights grew too large by step {last_update}; newest checkpoint from before it: {before or 'none'}; "
                "train with a lower optimizer.learning_rate and another --output"
            )
        newest = self._saver.newest
        self._note(f"done at step {progress.step}{told}; newest checkpoint is {newest.name if newest else 'none'}")

    def _judge(self, records: list[dict[str, Any]]) -> None:
        """Tell of the bad samples of some steps; end the run, on all ranks alike, where they are too many."""
        batch = self.recipe.train.global_batch_size
        told = self._bad.agree(self.world, batch * len(records), sum(record["bad_samples"] for record in records))
        if not told:
            return
        lines = [{"step": bad.position // batch + 1} | dataclasses.asdict(bad) for bad in told]
        self._tell(lambda callback: callback.on_bad_samples(lines))
        for line in bad_sample_lines(told, records[-1]["step"]):
            self._note(line)
        try:
            self._bad.check()
        except UnrecoverableError:
            self._saver.finish()
            raise

    def _farewell(self, progress: TrainProgress) -> str:
        asked = self._given.status.stop_reason
        return f"stopped at step {progress.step} ({asked}): saved; the same command goes on from there"

    def _evaluate(self, step: int) -> None:
        score, scores = self._given.scene_scores, None
        with _evaluating(self.engine.module) as model:
            losses = averaged = self._given.heldout_losses(model)
            if step > 0:
                with self.engine.ema_weights():
                    averaged = self._given.heldout_losses(model)
                    scores = self._looked_at(step, lambda: score(model)) if score else None
        self._heldout = float(np.mean([*losses, *averaged]))
        record = {
            "step": step,
            "heldout_loss": finite_or_none(float(np.mean(losses))),
            "heldout_loss_ema": finite_or_none(float(np.mean(averaged))),
            "heldout_loss_by_time": [finite_or_none(loss) for loss in losses],
        } | ({"scenes": scores} if scores else {})
        self._tell(lambda callback: callback.on_evaluation(record))

    def _draw(self, step: int) -> None:
        prompts = list(self.recipe.sample.prompts)
        if prompts:
            with _evaluating(self.engine.module) as model, self.engine.ema_weights():
                pictures = self._looked_at(step, lambda: self._given.draw(model))
            if pictures is not None:
                self._tell(lambda callback: callback.on_samples(step, pictures, prompts))

    def _looked_at(self, step: int, look: Callable[[], T]) -> T | None:
        """Return what is only looked at; training goes on without pictures that are not finite, and says so."""
        try:
            return look()
        except NonFiniteError as error:
            self._note(f"step {step}: not drawn, training goes on: {error}")
            return None

    def _note(self, text: str) -> None:
        self._tell(lambda callback: callback.on_note(text))

    def _tell(self, tell: Callable[[Callback], None]) -> None:
        for callback in self._callbacks:
            try:
                tell(callback)
            except OSError as error:  # training goes on without; once is enough to know it
                name = type(callback).__name__
                if name not in self._mute:
                    print_quietly(f"{name} cannot write: {error.strerror or error}; training goes on", sys.stderr)
                self._mute.add(name)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[nn.Module]:
    model.eval()
    try:
        yield model
    finally:
        model.train()


def _timed(batches: Iterator[list[FlowBatch]]) -> Iterator[tuple[list[FlowBatch], float]]:
    """Yield each item with the seconds it was waited for."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def _memory_bytes(device: torch.device) -> int:
    """Return the most device memory used so far; on a CPU, the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
