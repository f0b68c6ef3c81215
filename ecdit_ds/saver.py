"""When and how a run saves: one checkpoint at a time, written behind the training's back, none removed too early.

A save begins by copying the state to host memory, for which training stands still; a thread writes the copy. At a
report, where ranks talk anyway, they learn that all have written, and publish. What must be there before the process
ends (the last step, a stop) is written at once.
"""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ecdit_ds.checkpoint.host_copy import HostCopy
from ecdit_ds.checkpoint.lease import Lease
from ecdit_ds.checkpoint.storage import Save
from ecdit_ds.checkpoint.tending import remove_old
from ecdit_ds.config import Recipe
from ecdit_ds.ending import say
from ecdit_ds.engine import DeepSpeedEngine
from ecdit_ds.errors import CheckpointError, LostRankError, StaleAttemptError
from ecdit_ds.faults import Faults
from ecdit_ds.parallel.world import World
from ecdit_ds.snapshot import Progress, meta_of, pieces_of

_LOOK_EVERY_S = 1.0


@dataclass(kw_only=True)
class _InFlight:
    """A save that a thread is writing."""

    save: Save
    thread: threading.Thread
    stall_seconds: float
    started: float
    is_told: bool = False


class Saver:
    """Saves the checkpoints of one run; all but `complain` is collective.

    Args:
        root: folder of checkpoints.
        lease: this attempt's right to publish in it.
        verified: the checkpoint that this run goes on from, which was verified in loading; None for a fresh start.
        note: tells a person, on rank 0.
    """

    def __init__(
        self, root: Path, recipe: Recipe, engine: DeepSpeedEngine, world: World, lease: Lease, faults: Faults,
        verified: Path | None, note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._root, self._recipe, self._engine, self._world, self._lease = root, recipe, engine, world, lease
        self._faults, self._note = faults, note
        self._verified = [] if verified is None else [verified]
        self._in_flight: _InFlight | None = None
        self._host: HostCopy | None = None
        if recipe.train.async_save:
            nbytes = sum(piece.data.nbytes for piece in pieces_of(engine))
            self._host = HostCopy(nbytes, is_pinned=torch.cuda.is_available())

    @property
    def newest(self) -> Path | None:
        """Return the newest checkpoint that was published, or loaded, in this life."""
        return self._verified[-1] if self._verified else None

    @property
    def is_written(self) -> bool:
        """Return whether this rank has nothing left to write; asks nobody."""
        return self._in_flight is None or not self._in_flight.thread.is_alive()

    def complain(self) -> None:
        """Say once, on the rank it befell, that writing failed; all ranks learn it at the next report."""
        flying = self._in_flight
        if flying and not flying.is_told and not flying.thread.is_alive() and flying.save.fault:
            flying.is_told = True
            text = f"rank {self._world.rank}: step {flying.save.step} will not be saved: {flying.save.fault}"
            say(text, sys.stderr)

    def start(self, progress: Progress) -> None:
        """Save in the background where the recipe says so; what cannot be saved is noted, and training goes on."""
        self.finish()
        if self._host is None:
            self._save_now(progress, must_succeed=False, read_back=True)
            return
        began = time.perf_counter()
        try:
            save = self._begin(progress)
        except StaleAttemptError:
            raise
        except CheckpointError as error:
            self._not_saved(progress.step, error)
            return
        save.pieces = self._host.of(save.pieces)
        thread = threading.Thread(target=save.write, kwargs={"read_back": True}, name="checkpoint", daemon=True)
        self._in_flight = _InFlight(
            save=save, thread=thread, started=began, stall_seconds=time.perf_counter() - began
        )  # fmt: skip
        thread.start()

    def finish(self) -> None:
        """Publish what is in flight, once every rank has written it.

        Raises:
            LostRankError: on every rank, when one has not written it within train.save_timeout_minutes.
        """
        flying = self._in_flight
        if flying is None:
            return
        self._await_writers(flying)
        self.complain()
        self._in_flight = None
        try:
            folder = flying.save.publish()
        except StaleAttemptError:
            raise
        except CheckpointError as error:
            self._not_saved(flying.save.step, error)
            return
        total = time.perf_counter() - flying.started
        self._published(folder, f"held up training for {flying.stall_seconds:.2f} s, published after {total:.2f} s")

    def save_last(self, progress: Progress, *, read_back: bool) -> None:
        """Save at once, because nothing comes after it.

        Raises:
            CheckpointError: it could not be saved.
        """
        self.finish()
        self._save_now(progress, must_succeed=True, read_back=read_back)

    def _save_now(self, progress: Progress, *, must_succeed: bool, read_back: bool) -> None:
        began = time.perf_counter()
        try:
            save = self._begin(progress)
            save.write(read_back=read_back)
            folder = save.publish()
        except CheckpointError as error:
            if must_succeed or isinstance(error, StaleAttemptError):
                raise
            self._not_saved(progress.step, error)
            return
        self._published(folder, f"held up training for {time.perf_counter() - began:.2f} s", is_verified=read_back)

    def _begin(self, progress: Progress) -> Save:
        return Save(
            self._root, progress.step, pieces_of(self._engine), meta_of(progress, self._recipe), self._world,
            self._lease, lambda phase: self._faults.at(phase, progress.step),
        )  # fmt: skip

    def _await_writers(self, flying: _InFlight) -> None:
        """Wait together, in rounds, so that no rank sits in a collective longer than its time limit."""
        patience_s = 60 * self._recipe.train.save_timeout_minutes
        for _ in range(max(1, round(patience_s / _LOOK_EVERY_S))):
            flying.thread.join(_LOOK_EVERY_S)
            if self._world.all_ok(not flying.thread.is_alive()):
                return
        alive = self._world.gather(flying.thread.is_alive()) or []
        slow = self._world.broadcast([rank for rank, is_alive in enumerate(alive) if is_alive])
        raise LostRankError(
            f"{flying.save.folder}: ranks {', '.join(map(str, slow))} have not written their part within "
            f"{self._recipe.train.save_timeout_minutes:g} minutes (train.save_timeout_minutes); the storage may hang"
        )

    def _published(self, folder: Path, how: str, *, is_verified: bool = True) -> None:
        self._note(f"saved {folder}: {how}")
        if is_verified:
            self._verified.append(folder)
        if self._world.rank == 0:
            try:
                keep, keep_every = self._recipe.train.keep_checkpoints, self._recipe.train.keep_every
                remove_old(
                    folder.parent, keep, keep_every=keep_every, verified=self._verified,
                    reached=lambda phase: self._faults.at(phase, int(folder.name.removeprefix("step_"))),
                )  # fmt: skip
            except CheckpointError as error:  # the new one is safe, which is what counts
                self._note(f"an old checkpoint stays: {error}")

    def _not_saved(self, step: int, error: CheckpointError) -> None:
        self._note(f"step {step}: not saved, training goes on: {error}")
