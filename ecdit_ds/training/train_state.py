"""What a checkpoint of a run holds: every fragment of weights, average and optimizer, the recipe, and three counts.

Tensors are named `weight/blocks.0...`, `ema/...`, `exp_avg/...`; all are fp32 slices of global tensors, whatever
layout wrote them and whatever layout reads them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit_ds.checkpoint.boxes import flat_range_boxes, shifted
from ecdit_ds.checkpoint.finite import count_nonfinite, require_finite_tensors, sum_nonfinite
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.writer import TensorShard
from ecdit_ds.config.recipe import MAY_CHANGE_ON_RESUME, Recipe, changed_fields, with_defaults
from ecdit_ds.config.yaml_loader import recipe_from_dict
from ecdit_ds.errors import CheckpointError, ConfigError
from ecdit_ds.training.engine import DeepSpeedEngine
from ecdit_ds.training.optimizer import learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """How far a run is."""

    step: int
    """Optimizer steps taken, skipped ones included."""
    samples_seen: int
    """The loader's whole state."""
    num_updates: int
    """Steps that were not skipped."""
    skipped_in_a_row: int = 0
    """Steps up to this one whose gradients were not finite."""


def checkpoint_metadata(
    progress: TrainProgress,
    recipe: Recipe,
    data: Mapping[str, Any] | None = None,
    encoders: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint keeps beside the tensors.

    Args:
        data: what it was trained on, if the recipe does not say it.
        encoders: as `describe_encoders`, which is what drawing needs of the data.
    """
    given = {"data": data, "encoders": encoders}
    return {name: dict(facts) for name, facts in given.items() if facts} | {
        "recipe": recipe.to_dict(),
        "samples_seen": progress.samples_seen,
        "num_updates": progress.num_updates,
        "skipped_in_a_row": progress.skipped_in_a_row,
    }


def load_snapshot(reader: Reader, engine: DeepSpeedEngine) -> TrainProgress:
    """Fill the engine's fragments from a checkpoint written under any layout.

    The caller makes sure that all ranks succeeded before it calls `engine.restored`.

    Raises:
        CheckpointError: damage, a tensor the checkpoint lacks or has in another shape, or numbers that are not finite.
    """
    pieces = list(_pieces_held(engine, of_others=True))
    for piece in pieces:
        reader.expect(piece.name, piece.global_shape)
    reader.read_all_into((piece.name, piece.box, piece.data) for piece in pieces)
    require_finite_tensors(reader.folder, _nonfinite_in(pieces))  # the first releases did not count
    return progress_of(reader)


def progress_of(reader: Reader) -> TrainProgress:
    """Return how far the run was that wrote the checkpoint.

    Raises:
        CheckpointError: it does not say so, in whole numbers from 0 on.
    """
    written = {"skipped_in_a_row": 0} | dict(reader.manifest.meta)  # the first checkpoints did not count these
    counts: dict[str, Any] = {name: written.get(name) for name in ("samples_seen", "num_updates", "skipped_in_a_row")}
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count < 2**63:
            raise CheckpointError(f"{reader.folder}: its manifest says {name}: {count!r}, not a whole number from 0 on")
    return TrainProgress(step=reader.manifest.step, **counts)


def check_same_recipe(written: dict[str, Any], recipe: Recipe, where: Path) -> None:
    """Refuse to go on with a run under another recipe.

    Raises:
        CheckpointError: naming every changed field that may not change, with both values.
    """
    differing = changed_fields(with_defaults(written), recipe.to_dict())
    changes = {field: values for field, values in differing.items() if field not in MAY_CHANGE_ON_RESUME}
    if changes:
        told = "; ".join(f"{field}: {old!r} there, {new!r} now" for field, (old, new) in changes.items())
        raise CheckpointError(
            f"{where}: belongs to another recipe ({told}); choose another --output, or undo the change"
        )


def rejection_of(folder: Path, check_same: Callable[[Mapping[str, Any], Path], None]) -> str | None:
    """Return what is wrong with a checkpoint by its manifest and the sizes of its files; None where nothing is.

    Args:
        folder: the checkpoint.
        check_same: (what a checkpoint keeps beside the tensors, its folder): raises where it is of another run, which
            is no damage.
    """
    try:
        reader = Reader(folder)
        progress_of(reader)
        require_finite_tensors(folder, reader.manifest.nonfinite)
    except CheckpointError as error:
        return str(error)
    recipe = reader.manifest.meta.get("recipe")
    if not isinstance(recipe, dict):
        return f"{folder}: its manifest has no recipe"
    for section in (spec.name for spec in dataclasses.fields(Recipe) if spec.name != "name"):
        if not isinstance(recipe.get(section, {}), dict):  # as `model: null`; what is missing has its defaults
            return f"{folder}: its manifest's recipe has no {section}"
    check_same(reader.manifest.meta, folder)
    return None


def none_valid(faults: Iterable[str]) -> CheckpointError:
    """Return what is said where every candidate has a fault: whether to start afresh is for a person to decide."""
    told = [*faults]
    return CheckpointError(
        f"none of {len(told)} checkpoints is valid ({' | '.join(told)}); "
        "restore one, or choose another --output to start afresh"
    )


def check_not_beyond(step: int, recipe: Recipe, where: Path) -> None:
    """Refuse to go on from a step that is beyond the last one.

    Raises:
        ConfigError: with both numbers.
    """
    if step > recipe.train.max_steps:
        raise ConfigError(
            f"train.max_steps: {recipe.train.max_steps}, but {where} is at step {step} already; "
            "raise it, or choose another --output"
        )


def schedule_jumps(written: Mapping[str, Any], recipe: Recipe, step: int) -> list[str]:
    """Return a line for each scheduled number that the former recipe would have given another value at the next step.

    Args:
        written: the recipe that the checkpoint was trained by.
        recipe: the one that it goes on by, with changes that `check_same_recipe` allows.
        step: steps taken; the next one has this number, from 0.
    """
    try:
        former = recipe_from_dict(dict(written))
    except ConfigError:
        return []  # of an older release, whose numbers are not known
    lines = []
    for field, what, number_of in _SCHEDULED:
        before, now = number_of(former, step), number_of(recipe, step)
        if before != now and step < recipe.train.max_steps:
            old, new = getattr(former.train, field), getattr(recipe.train, field)
            lines.append(
                f"{what} jumps at step {step + 1}: {before:.6g} as it was begun, {now:.6g} from here, for "
                f"train.{field} was {old} and is {new}"
            )
    return lines


_SCHEDULED: tuple[tuple[str, str, Callable[[Recipe, int], float]], ...] = (
    ("max_steps", "learning rate", lambda recipe, step: learning_rate(step, recipe.train.max_steps, recipe.optimizer)),
    ("unmasked_from_step", "share of tokens left out", lambda recipe, step: recipe.train.mask_ratio_at(step)),
)
"""Fields of `train` that may change on resume and move a number of the next step, which, and the number."""


def check_same_data(written: Any, data: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with a run on other samples: the order counts through them, whatever their number and encoders.

    Args:
        written: what the checkpoint says of its data; None where it does not, as one that was converted.
        data: likewise, of what is to be trained on now.
        where: the checkpoint.

    Raises:
        CheckpointError: they differ.
    """
    if written is not None and data and written != data:
        before = written.get("encoders_beside") if isinstance(written, dict) else None
        now, told = data.get("encoders_beside"), ""
        if before != now:
            told = (
                f" (encoders beside training were {before}, now {now}; data.shift_factor and data.scaling_factor set "
                "those of pixels)"
            )
        raise CheckpointError(
            f"{where}: was trained on other samples, or through other encoders, than data.path names now{told}; bring "
            "the former back, or choose another --output"
        )


def check_same_encoders(written: Any, encoders: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with a model on latents or texts of other encoders, which it would have to learn anew.

    Args:
        written: what the checkpoint says of its encoders; None where it does not, as one of an earlier release.
        encoders: likewise, of what is to be trained through now.
        where: the checkpoint.

    Raises:
        CheckpointError: they differ.
    """
    for what in ("image", "text") if isinstance(written, dict) else ():
        before = written.get(what)
        before = before if isinstance(before, dict) else {}
        if before.get("identity") == encoders[what].get("identity"):
            continue
        mend = "bring the former back"
        if before.get("kind") == encoders[what].get("kind") == "pixels":
            shift, scale = (_as_flag(before.get(name)) for name in ("shift_factor", "scaling_factor"))
            mend = f"keep the former by --set data.shift_factor={shift} --set data.scaling_factor={scale}"
        raise CheckpointError(
            f"{where}: was trained through the {what} encoder {before.get('identity')}, now it is "
            f"{encoders[what].get('identity')}; {mend}, or choose another --output"
        )


def _as_flag(factor: Any) -> str:
    return f"[{','.join(map(str, factor))}]" if isinstance(factor, list | tuple) else f"[{factor}]"


def local_shards(engine: DeepSpeedEngine) -> Iterator[TensorShard]:
    """Yield what this rank writes: views of the engine's state, in global coordinates."""
    return _pieces_held(engine, of_others=False)


def count_nonfinite_shards(engine: DeepSpeedEngine) -> dict[str, int]:
    """Return how many numbers that this rank writes are NaN or infinite, by tensor that has any."""
    return _nonfinite_in(local_shards(engine))


def _nonfinite_in(pieces: Iterable[TensorShard]) -> dict[str, int]:
    return sum_nonfinite((piece.name, count_nonfinite(piece.data)) for piece in pieces)


def _pieces_held(engine: DeepSpeedEngine, *, of_others: bool) -> Iterator[TensorShard]:
    """Yield what this rank holds, with or without what another one writes."""
    for fragment in engine.fragments():
        if not (fragment.is_saved_by_this_rank or of_others):
            continue
        stop = fragment.start + next(iter(fragment.states.values())).numel()
        for state_name, values in fragment.states.items():
            for box, at in flat_range_boxes(fragment.local_shape, fragment.start, stop):
                yield TensorShard(
                    name=f"{state_name}/{fragment.name}",
                    global_shape=fragment.shard.global_shape,
                    box=shifted(box, fragment.shard.offset),
                    data=values.narrow(0, at, box.numel).view(box.shape),
                )
