"""A run's folder: one run at a time, one recipe for all its lives, nothing overwritten.

OUTPUT/recipe.yaml          what is trained, resolved
OUTPUT/metrics.jsonl        one line a step
OUTPUT/evaluations.jsonl    one line a held-out evaluation
OUTPUT/bad_samples.jsonl    one line a sample that was replaced, and why; not there without any
OUTPUT/checkpoints/step_N   layout-free checkpoints
OUTPUT/tensorboard/         the same numbers, and sample grids
OUTPUT/samples/             sample grids as PNG
OUTPUT/slurm/               of jobs of slurm/: their lives, and a log a rank
OUTPUT/.lock, .attempt      which process writes there, and which start of the run may publish
"""

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ecdit_ds.checkpoint.lease import LEASE_NAME, is_successor
from ecdit_ds.checkpoint.naming import MANIFEST_NAME, list_checkpoints, misnamed_checkpoints
from ecdit_ds.checkpoint.retention import remove_incomplete_saves
from ecdit_ds.config.deepspeed_json import PROFILE_NAME
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import dump_recipe, parse_yaml
from ecdit_ds.errors import CheckpointError, ConfigError, escape_unprintable
from ecdit_ds.files.durable import is_still, make_folders, plain_file, private_file, replace_durably
from ecdit_ds.slurm.job_history import LOGS
from ecdit_ds.training.train_state import check_same_recipe

_LOCK_PATIENCE_S = 60.0
_OWN_LOCK = ".lock"
_OWN_NAMES = (_OWN_LOCK, LEASE_NAME, LOGS, "recipe.yaml.tmp")  # what a job's start, or a kill soon after, leaves
_NAMES_OF_A_RUN = {
    "metrics.jsonl",
    "evaluations.jsonl",
    "bad_samples.jsonl",
    "checkpoints",
    "tensorboard",
    "samples",
    PROFILE_NAME,
}
_OPEN_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class RunDir:
    """Where a run keeps what it leaves behind."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def bad_samples(self) -> Path:
        return self.path / "bad_samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def lock(self, attempt: str, undo: ExitStack | None = None) -> IO[str]:
        """Make the folder ours until the returned file is closed or the process ends.

        A scheduler that gave up on a machine may start the job again while its old life still holds the lock: then the
        lock is left to it, and the lease keeps it from publishing.

        Args:
            attempt: this start of the run.
            undo: given what takes back all that was made or changed here, for a start that is refused.

        Raises:
            ConfigError: another live process holds it, or it cannot be made.
        """
        undo = undo or ExitStack()
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            handle = self._open_lock(undo)
            if not self._take(handle, attempt, deadline):
                return handle
            if is_still(handle, self.path / _OWN_LOCK):
                break
            handle.close()  # whoever held it was refused, and took the file away
        handle.seek(0)
        undo.callback(self._let_go, handle, handle.read())
        handle.truncate(0)
        handle.write(f"{os.getpid()} {attempt}")
        handle.flush()
        return handle

    def _open_lock(self, undo: ExitStack) -> IO[str]:
        for tries_left in reversed(range(_OPEN_TRIES)):
            undo.callback(_remove_empty, [place for place in (self.path, *self.path.parents) if not place.exists()])
            try:
                make_folders(self.path)
                return open(
                    self.path / _OWN_LOCK, "a+", encoding="utf-8", errors="backslashreplace", opener=private_file
                )
            except OSError as error:
                if isinstance(error, FileNotFoundError) and tries_left:
                    continue  # another start that made the folder was refused, and took it away
                raise ConfigError(
                    f"--output {error.filename or self.path}: {error.strerror}; choose a folder that can be written"
                ) from None
        raise AssertionError("the last try returns or raises")

    def _take(self, handle: IO[str], attempt: str, deadline: float) -> bool:
        """Wait for the lock; return False where it is left to an earlier life of the same job."""
        # Just after its launcher was killed, the old life may still be saving.
        is_told = False
        while True:
            try:
                # A record lock, unlike flock, is not inherited by loader workers.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise ConfigError(
                        f"--output {self.path}: its file system cannot lock ({error.strerror}); choose one that can"
                    ) from None
                handle.seek(0)
                process, _, holder = handle.read().partition(" ")
                if is_successor(attempt, of=holder):
                    return False
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"--output {self.path}: another run (process {process or 'unknown'}) is writing there; stop it "
                        "or choose another folder"
                    ) from None
                if not is_told:
                    print(
                        escape_unprintable(f"waits for process {process or 'unknown'} to leave {self.path}"), flush=True
                    )
                    is_told = True
                time.sleep(0.2)

    def _let_go(self, handle: IO[str], before: str) -> None:
        """Leave the lock as it was found, or none where there was none."""
        with suppress(OSError):
            if before:
                handle.truncate(0)
                handle.write(before)
                handle.flush()
            elif is_still(handle, self.path / _OWN_LOCK):
                (self.path / _OWN_LOCK).unlink()  # while it is ours: who waits for it sees that it is gone
        handle.close()

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse a folder that holds something else.

        Raises:
            CheckpointError: a run of another recipe.
            ConfigError: files of no run at all.
        """
        if self.recipe.exists():
            try:
                written = parse_yaml(plain_file(self.recipe).read_text(encoding="utf-8"))
            except (ConfigError, OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"{self.recipe}: cannot be read ({error}); move it away, if checkpoints are there, which hold the "
                    "recipe too, or choose another --output"
                ) from None
            if not isinstance(written, dict):
                raise ConfigError(f"{self.recipe}: holds no recipe; choose another --output")
            check_same_recipe(written, recipe, self.path)
            return
        if any(self.checkpoints.glob(f"*/{MANIFEST_NAME}")):
            return  # its recipe is lost, and each of them is compared with its own before anything goes on from it
        found = {path.name for path in self.path.iterdir()} - {*_OWN_NAMES}
        if found and found <= _NAMES_OF_A_RUN:
            raise ConfigError(
                f"--output {self.path}: {self.recipe.name} is lost, and no checkpoint is there that holds what was "
                "trained; put either back, or choose another folder"
            )
        if foreign := sorted(found - _NAMES_OF_A_RUN):
            raise ConfigError(
                f"--output {self.path}: holds {len(foreign)} files that are no run's (such as {foreign[0]}); "
                "choose a new or empty folder"
            )

    def candidates(self, resume: str) -> list[Path]:
        """Return the checkpoints to try, best first; none means a fresh start.

        Args:
            resume: `auto`, `never`, or the path of a checkpoint or of a run, from which a folder without
                checkpoints of its own starts; so the same command goes on after a crash.

        Raises:
            CheckpointError: the request cannot be met without overwriting something.
        """
        own = self._own_checkpoints()
        if resume == "auto":
            return own
        if resume == "never":
            if own or self.metrics.exists():
                raise CheckpointError(
                    f"--resume never: {self.path} already holds a run; choose another --output or use --resume auto"
                )
            return []
        source = Path(resume)
        found = [source] if (source / MANIFEST_NAME).is_file() else list_checkpoints(source / "checkpoints")
        if not found:
            raise CheckpointError(f"--resume {resume}: is neither a checkpoint nor a run with checkpoints")
        if source.resolve() in [folder.resolve() for folder in own[1:]]:
            raise CheckpointError(
                f"--resume {resume}: {self.checkpoints} already holds {own[0].name}, which would be overwritten; "
                "choose another --output"
            )
        return own or found

    def _own_checkpoints(self) -> list[Path]:
        """Return this run's checkpoints, newest first.

        Raises:
            CheckpointError: there were some, and they are lost from sight.
        """
        if not self.checkpoints.is_dir() and os.path.lexists(self.checkpoints):
            raise CheckpointError(f"{self.checkpoints}: is no folder, or a link to one that is not there; mount it")
        own = list_checkpoints(self.checkpoints)
        misnamed = {} if own else misnamed_checkpoints(self.checkpoints)
        for path, name in misnamed.items():
            raise CheckpointError(
                f"{path}: is a checkpoint by another name; name it {name}, and the run goes on from it"
            )
        damaged = [] if own else sorted(path.name for path in self.checkpoints.glob("step_*.damaged-*"))
        if damaged:
            raise CheckpointError(
                f"{self.checkpoints}: holds only damaged checkpoints, such as {damaged[-1]}; restore one, or choose "
                "another --output to start afresh"
            )
        return own

    def _check_not_lost(self, recipe: Recipe) -> None:
        """Refuse to begin at the beginning where a run has come so far that it must have left a checkpoint.

        The first one is published before the step after the second is due.
        """
        lines = _lines_up_to(self.metrics, sys.maxsize) if self.metrics.exists() else []
        last_step = json.loads(lines[-1])["step"] if lines else 0
        if last_step > 2 * recipe.train.checkpoint_every:
            raise CheckpointError(
                f"{self.path}: had come to step {last_step}, and {self.checkpoints} holds nothing to go on from; "
                f"restore a checkpoint, or move {self.metrics.name} away to start afresh"
            )

    def begin(self, recipe: Recipe, step: int) -> list[str]:
        """Write the recipe down and drop what an earlier life left beyond `step`, which will be trained again.

        Return the lines of bad samples that stay.

        Raises:
            CheckpointError: the run begins at step 0 where an earlier life had come far.
            ConfigError: the folder cannot be written.
        """
        if step == 0:
            self._check_not_lost(recipe)
        logs = (self.metrics, self.evaluations, self.bad_samples)
        kept = {log: _lines_up_to(log, step) for log in logs if log.exists()}
        try:
            replace_durably(self.recipe, dump_recipe(recipe).encode("utf-8"))
            remove_incomplete_saves(self.checkpoints)
            (self.path / PROFILE_NAME).unlink(missing_ok=True)  # DeepSpeed would write through a link
            for log, lines in kept.items():
                replace_durably(log, "".join(lines).encode("utf-8"))
        except OSError as error:
            raise ConfigError(
                f"--output {self.path}: cannot be written: {error.strerror}; make room, or choose another folder"
            ) from None
        return kept.get(self.bad_samples, [])


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, of which none may hold anything."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _lines_up_to(log: Path, step: int) -> list[str]:
    """Return the lines of a JSON-lines file up to `step`, without a last one that a kill cut off."""
    try:
        lines = plain_file(log).read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if step > 0 and line.endswith("}\n") and json.loads(line)["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{log}: cannot be read ({type(error).__name__}: {error}); move it away") from None
