"""A trainer that writes down what its own rank saw; metrics.jsonl has only what all ranks together saw."""

import json
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import deepspeed
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from xxhash import xxh3_64_hexdigest

import ecdit_ds
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.writer import save_checkpoint
from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.flow.objective import FlowBatch
from ecdit_ds.training.batches import MakeBatch, PendingBatch
from ecdit_ds.training.checkpointer import Checkpointer
from ecdit_ds.training.engine import StepResult
from ecdit_ds.training.train_state import TrainProgress, checkpoint_metadata, load_snapshot, local_shards
from ecdit_ds.training.trainer import Trainer

# Not by a folder's name: a clone may be called like the package, and hold the environment too.
_ROOTS = {module.__name__: Path(module.__path__[0]) for module in (deepspeed, ecdit_ds)}
SAMPLES_FILE = "WITNESS_SAMPLES"
"""Environment variable: where the samples that are trained on are written down; unset, nowhere."""
SOURCES = "WITNESS_SOURCES"
"""Environment variable: JSON list of [name, checkpoint] to go on from, one after the other, in the same process."""
HOST_WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")
"""Operators whose result the host must wait for."""


class WitnessedSaver(Checkpointer):
    """Saves as ever, and notes what its collectives move."""

    collective_dtypes: ClassVar[set[str]] = set()

    def start(self, progress: TrainProgress) -> None:
        self._watched(lambda: super(WitnessedSaver, self).start(progress))

    def finish(self) -> None:
        self._watched(super().finish)

    def save_last(self, progress: TrainProgress, *, read_back: bool) -> None:
        self._watched(lambda: super(WitnessedSaver, self).save_last(progress, read_back=read_back))

    def _watched(self, save: Callable[[], None]) -> None:
        with _Operators() as operators:
            save()
        WitnessedSaver.collective_dtypes |= operators.collective_dtypes


class WitnessedTrainer(Trainer):
    """Trains as ever."""

    def fit(self, progress: TrainProgress) -> bool:
        """Also go on from each checkpoint of SOURCES, and write `rank_R.json` at the end."""
        self._run = self._given.checkpoints.parent
        self._grad_norms: list[float] = []
        self._host_waits: list[Counter[str]] = []
        was_stopped = super().fit(progress)
        seen = {
            "grad_norms": self._grad_norms,
            "uncut_weights": dict(self._uncut_weights()),
            "host_waits": self._host_waits,
            "save_dtypes": sorted(WitnessedSaver.collective_dtypes),
            "courses": {
                name: self._course_from(name, Path(path)) for name, path in json.loads(os.environ.get(SOURCES, "[]"))
            },
        }
        (self._run / f"rank_{self.world.rank}.json").write_text(json.dumps(seen))
        return was_stopped

    def _course_from(self, name: str, source: Path) -> dict[str, list[float]]:
        """Load a checkpoint, save what was loaded under `loaded/NAME`, and train to the end from there."""
        progress = load_snapshot(Reader(source), self.engine)
        self.engine.restored(progress.num_updates)
        meta = checkpoint_metadata(progress, self.recipe)
        save_checkpoint(self._run / "loaded" / name, progress.step, local_shards(self.engine), meta, self.world)
        results = [
            Trainer._step(self, micro_batches, progress.step + done)
            for done, micro_batches in enumerate(self._batches(progress))
        ]
        return {
            "loss": [float(self.world.mean(result.loss)) for result in results],
            "grad_norm": [float(result.grad_norm) for result in results],
        }

    def _step(self, micro_batches: Any, step: int) -> StepResult:
        # Watching is slow, and ZeRO-3 compares notes in its first steps only.
        self._is_watched = step >= self.recipe.train.max_steps - 2
        with _Operators() if self._is_watched else nullcontext() as seen:
            result = super()._step(micro_batches, step)
        if isinstance(seen, _Operators):
            self._host_waits.append(seen.host_waits)
        self._grad_norms.append(float(result.grad_norm))
        return result

    def _record(self, *arguments: Any) -> None:
        with _Operators() if self._is_watched else nullcontext() as seen:
            super()._record(*arguments)
        if isinstance(seen, _Operators):
            self._host_waits[-1].update(seen.host_waits)

    def _uncut_weights(self) -> Iterator[tuple[str, str]]:
        for fragment in self.engine.fragments():
            if not fragment.shard.is_tp_sharded:
                weight = fragment.states["weight"]
                yield f"{fragment.name} {fragment.start}", xxh3_64_hexdigest(weight.numpy().tobytes())


class WitnessedDraw(MakeBatch):
    """Makes batches as ever, and writes down which samples they are of."""

    def __call__(self, samples: Samples) -> FlowBatch | PendingBatch:
        line = json.dumps([int(os.environ["RANK"]), samples.stream_index_B.tolist()])
        with open(os.environ[SAMPLES_FILE], "a", encoding="ascii") as file:
            file.write(f"{line}\n")
        return super().__call__(samples)


class _Operators(TorchDispatchMode):
    """Counts host waits by who asked, and notes the dtypes of all that collectives move."""

    def __init__(self) -> None:
        super().__init__()
        self.host_waits: Counter[str] = Counter()
        self.collective_dtypes: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = op._schema.name.split("::")
        if name.strip("_") in {wait.strip("_") for wait in HOST_WAITS}:
            self.host_waits[_asker()] += 1
        if "c10d" in namespace:
            self.collective_dtypes |= {str(tensor.dtype) for tensor in _tensors(args)}
        return op(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _tensors(element)


def _asker() -> str:
    """Return the innermost function that is ours or DeepSpeed's, as `package: path:name`."""
    for frame in reversed(traceback.extract_stack()):
        for package, root in _ROOTS.items():
            if Path(frame.filename).is_relative_to(root):
                return f"{package}: {Path(frame.filename).relative_to(root)}:{frame.name}"
    return "elsewhere"
