"""When and how a run saves: one checkpoint at a time, written behind the training's back, none removed too early.

A save begins by copying the state to host memory, for which training stands still; a thread writes the copy. At a
report, where ranks talk anyway, they learn that all have written, and publish. For what must be there before the
process ends (the last step, a stop) training waits.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecdit_ds.checkpoint.finite import tell_nonfinite
from ecdit_ds.checkpoint.lease import Lease
from ecdit_ds.checkpoint.naming import step_of
from ecdit_ds.checkpoint.retention import apply_retention
from ecdit_ds.checkpoint.staging import StagingBuffer
from ecdit_ds.checkpoint.writer import Save
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import CheckpointError, RankLostError, StaleRunError, UnrecoverableError
from ecdit_ds.parallel.world import World
from ecdit_ds.runtime.exit_report import print_quietly
from ecdit_ds.runtime.fault_injection import Faults
from ecdit_ds.training.engine import DeepSpeedEngine
from ecdit_ds.training.train_state import TrainProgress, checkpoint_metadata, local_shards

_LOOK_EVERY_S = 1.0


@dataclass(kw_only=True)
class _InFlight:
    """A save that a thread is writing."""

    save: Save
    thread: threading.Thread
    started: float
    stall_seconds: float | None
    """For which training stood still; None where it waits for the whole save."""
    is_read_back: bool
    is_told: bool = False


class Checkpointer:
    """Saves the checkpoints of one run; all but `complain` is collective.

    Args:
        root: folder of checkpoints.
        lease: this attempt's right to publish in it.
        verified: the checkpoint that this run goes on from, which was verified in loading; None for a fresh start.
        note: tells a person, on rank 0.
        data: what the run is trained on, for `check_same_data`.
        encoders: what that went through, for drawing.
    """

    def __init__(
        self,
        root: Path,
        recipe: Recipe,
        engine: DeepSpeedEngine,
        world: World,
        lease: Lease,
        faults: Faults,
        verified: Path | None,
        note: Callable[[str], None],
        data: Mapping[str, Any],
        encoders: Mapping[str, Any],
    ) -> None:
        self._root, self._recipe, self._engine, self._world, self._lease = root, recipe, engine, world, lease
        self._data, self._encoders = data, encoders
        self._faults, self._note = faults, note
        self._verified = [] if verified is None else [verified]
        self.keeps_all = False
        """Whether nothing is removed for now: steps are skipped, and what makes them so may be in all that is newer."""
        self._in_flight: _InFlight | None = None
        self._host: StagingBuffer | None = None
        if recipe.train.async_save:
            self._host = StagingBuffer(local_shards(engine), is_pinned=torch.cuda.is_available())

    @property
    def newest(self) -> Path | None:
        """Return the newest checkpoint that was published, or loaded, in this life."""
        return self._verified[-1] if self._verified else None

    @property
    def is_written(self) -> bool:
        """Return whether this rank has nothing left to write; asks nobody."""
        return self._in_flight is None or not self._in_flight.thread.is_alive()

    def complain(self) -> None:
        """Log a failed write once, on the failing rank; the others learn of it at the next report."""
        flying = self._in_flight
        if flying and not flying.is_told and not flying.thread.is_alive() and flying.save.fault:
            flying.is_told = True
            text = f"rank {self._world.rank}: step {flying.save.step} will not be saved: {flying.save.fault}"
            print_quietly(text, sys.stderr)

    def start(self, progress: TrainProgress) -> None:
        """Save in the background where the recipe says so; what cannot be saved is noted, and training goes on."""
        self.finish()
        with self._noted(progress.step):
            self._launch(progress, self._host, read_back=True)
        if self._host is None:
            self.finish()

    def finish(self) -> None:
        """Publish what is in flight, once every rank has written it; what cannot be published is noted.

        Raises:
            UnrecoverableError: on every rank, when what was published is not finite.
            RankLostError: on every rank, when one has not written it within train.save_timeout_minutes.
        """
        if self._in_flight is not None:
            with self._noted(self._in_flight.save.step):
                self._publish(self._in_flight)

    def save_last(self, progress: TrainProgress, *, read_back: bool) -> None:
        """Save at once, because nothing comes after it.

        Raises:
            CheckpointError: it could not be saved.
            UnrecoverableError, RankLostError: as `finish`.
        """
        self.finish()
        self._publish(self._launch(progress, None, read_back=read_back))

    def _launch(self, progress: TrainProgress, host: StagingBuffer | None, *, read_back: bool) -> _InFlight:
        """Let a thread write the state: a copy of it, or itself where nobody changes it meanwhile."""
        began = time.perf_counter()
        meta = checkpoint_metadata(progress, self._recipe, self._data, self._encoders)
        save = Save(
            self._root,
            progress.step,
            local_shards(self._engine),
            meta,
            self._world,
            self._lease,
            lambda phase: self._faults.at(phase, progress.step),
        )
        if host is not None:
            save.pieces = host.of(save.pieces)
        thread = threading.Thread(target=save.write, kwargs={"read_back": read_back}, name="checkpoint", daemon=True)
        stall_seconds = None if host is None else time.perf_counter() - began
        self._in_flight = _InFlight(
            save=save, thread=thread, started=began, stall_seconds=stall_seconds, is_read_back=read_back
        )
        thread.start()
        return self._in_flight

    def _publish(self, flying: _InFlight) -> None:
        self._await_writers(flying)
        self.complain()
        self._in_flight = None
        folder = flying.save.publish()
        total = time.perf_counter() - flying.started
        stall = total if flying.stall_seconds is None else flying.stall_seconds
        self._note(f"saved {folder}: held up training for {stall:.2f} s, published after {total:.2f} s")
        if flying.save.nonfinite:
            raise UnrecoverableError(
                f"{folder}: {tell_nonfinite(flying.save.nonfinite)}; it is kept for you to look into and counts for "
                "nothing; go on from a checkpoint from before"
            )
        if flying.is_read_back:
            self._verified.append(folder)
        if self._world.rank == 0 and not self.keeps_all:
            self._remove_old(folder)

    def _remove_old(self, newest: Path) -> None:
        train = self._recipe.train
        try:
            apply_retention(
                self._root,
                train.keep_checkpoints,
                keep_every=train.keep_every,
                verified=self._verified,
                reached=lambda phase: self._faults.at(phase, step_of(newest)),
            )
        except (CheckpointError, OSError) as error:  # the new one is safe, which is what counts
            self._note(f"an old checkpoint stays: {error}")

    @contextmanager
    def _noted(self, step: int) -> Iterator[None]:
        """Let training go on without a save that failed; a stale attempt may not go on."""
        try:
            yield
        except StaleRunError:
            raise
        except CheckpointError as error:
            self._note(f"step {step}: not saved, training goes on: {error}")

    def _await_writers(self, flying: _InFlight) -> None:
        """Wait together, in rounds, so that no rank sits in a collective longer than its time limit."""
        patience_s = 60 * self._recipe.train.save_timeout_minutes
        for _ in range(max(1, round(patience_s / _LOOK_EVERY_S))):
            flying.thread.join(_LOOK_EVERY_S)
            if self._world.all_true(not flying.thread.is_alive()):
                return
        slow = [rank for rank, is_alive in enumerate(self._world.share(flying.thread.is_alive())) if is_alive]
        if not slow:
            return
        raise RankLostError(
            f"{flying.save.folder}: ranks {', '.join(map(str, slow))} have not written their part within "
            f"{self._recipe.train.save_timeout_minutes:g} minutes (train.save_timeout_minutes); the storage may hang"
        )
