"""What is in a checkpoint, whether it is whole, and how two differ."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.sources import CheckpointSource, EcditSource, Tick, read_part, split_box
from ecdit_ds.checkpoint.convert.universal import UniversalSource
from ecdit_ds.checkpoint.finite import count_nonfinite, sum_nonfinite, tell_nonfinite
from ecdit_ds.config.recipe import changed_fields, with_defaults
from ecdit_ds.errors import CheckpointError

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes."""
_LONGEST_VALUE = 1000
"""Characters of a value of meta that are told."""


def describe_checkpoint(source: CheckpointSource) -> list[str]:
    """Return lines: step, recipe, kinds with their sizes, files and slices, and numbers that are not finite."""
    meta, recipe = source.meta, _section(source.meta, "recipe")
    model, parallel = _section(recipe, "model"), _section(recipe, "parallel")
    lines = [
        f"step         {source.step}, {meta.get('samples_seen', '?')} samples seen",
        f"recipe       {recipe.get('name', '?')}: {model.get('num_layers', '?')} layers of "
        f"{model.get('hidden_size', '?')}, {model.get('ffn', '?')}, {model.get('num_experts', '?')} experts",
        f"written by   parallel.tp {parallel.get('tp', '?')}, parallel.ep {parallel.get('ep', '?')}; "
        "any layout reads it",
    ]
    if encoders := _section(meta, "encoders"):
        of_images, of_texts = (_section(encoders, what).get("identity", "?") for what in ("image", "text"))
        lines.append(f"encoders     images {of_images}, texts {of_texts}")
    for kind, names in _by_kind(source).items():
        numel = sum(_numel(source, name) for name in names)
        nbytes = sum(_nbytes(source, name) for name in names)
        dtypes = ", ".join(sorted({str(source.tensors[name][0]).removeprefix("torch.") for name in names}))
        lines.append(f"{kind:<12} {len(names)} tensors, {numel:,} numbers, {nbytes:,} bytes, {dtypes}")
    if isinstance(source, EcditSource):
        slices = sum(len(stored.slices) for stored in source.manifest.tensors.values())
        size = sum(file.size_bytes for file in source.manifest.files.values())
        lines.append(f"files        {len(source.manifest.files)} with {slices} slices, {size:,} bytes")
    found = source.nonfinite
    said = "does not say; verify counts" if found is None else tell_nonfinite(found) if found else "all numbers are"
    return [*lines, f"finite       {said}"]


def verify(
    source: CheckpointSource, expected: Mapping[str, tuple[int, ...]], state_names: Collection[str], tick: Tick
) -> int:
    """Check everything there is to check and return the bytes of tensors that were read.

    That slices tile each tensor, without gap or overlap, every expert's included, was proven when the manifest was
    read; here every byte is compared with its checksum, and names and shapes with the recipe's model.

    Args:
        expected: parameter -> global shape, from the recipe's model.
        state_names: what the recipe's optimizer keeps; where any of it is there, all must be.

    Raises:
        CheckpointError: naming the file or tensor; also where a number is not finite.
    """
    kinds = _by_kind(source)
    if kinds.keys() & set(state_names):
        _require_all_kinds(source, kinds, state_names)
    if not kinds.keys() & {"weight", "ema"}:
        raise CheckpointError(f"holds no weights, neither weight nor ema; its kinds: {', '.join(kinds) or 'none'}")
    for kind, names in kinds.items():
        held = {name.removeprefix(f"{kind}/"): source.tensors[name][1] for name in names}
        _compare_names(kind, held, expected)
    if isinstance(source, EcditSource):
        for file in source.manifest.files:
            source.open_file(file)
    if isinstance(source, UniversalSource):
        source.verify_counts()
    found = sum_nonfinite((name, count) for name in source.tensors for count in _nonfinite_parts(source, name, tick))
    if found:
        raise CheckpointError(f"{tell_nonfinite(found)}; use a checkpoint from before")
    if source.nonfinite:
        raise CheckpointError(f"says that {tell_nonfinite(source.nonfinite)}, but all are; convert it anew")
    return total_bytes(source)


def _nonfinite_parts(source: CheckpointSource, name: str, tick: Tick) -> Iterator[int]:
    """Read all of a tensor, compared with its checksums; yield of each part how many numbers are not finite."""
    if isinstance(source, EcditSource):
        stored = source.manifest.tensors[name]
        for cut in stored.slices:
            yield source.count_nonfinite(stored, cut)
            tick(cut.box.numel * source.tensors[name][0].itemsize)
    else:
        for part in _parts(source, name):
            data = read_part(source, name, part)
            yield count_nonfinite(data)
            tick(data.nbytes)


def _require_all_kinds(source: CheckpointSource, held: Collection[str], state_names: Collection[str]) -> None:
    needed = ["weight", *state_names, *(["ema"] if isinstance(source, EcditSource) else [])]
    if lacking := [kind for kind in needed if kind not in held]:
        raise CheckpointError(f"holds {', '.join(held)}, but no {lacking[0]}; training cannot go on from it")


def differences(first: CheckpointSource, second: CheckpointSource, tick: Tick) -> Iterator[str]:
    """Yield a line for each way in which two checkpoints differ; none if they hold the same."""
    if first.step != second.step:
        yield f"step: {first.step} and {second.step}"
    for field, (ours, theirs) in changed_fields(_filled(first.meta), _filled(second.meta)).items():
        yield f"meta.{field}: {_shortened(ours)} and {_shortened(theirs)}"
    for name in sorted(first.tensors.keys() ^ second.tensors.keys()):
        yield f"{name}: only in the {'first' if name in first.tensors else 'second'}"
    for name in sorted(first.tensors.keys() & second.tensors.keys()):
        (dtype, shape), (other_dtype, other_shape) = first.tensors[name], second.tensors[name]
        if shape != other_shape:
            yield f"{name}: shape {list(shape)} and {list(other_shape)}"
            continue
        if dtype != other_dtype:
            yield f"{name}: {dtype} and {other_dtype}"
        different, largest = 0, 0.0
        for part in _parts(first, name):
            ours, theirs = read_part(first, name, part), read_part(second, name, part)
            tick(ours.nbytes)
            found, distance = _compare(ours, theirs)
            different, largest = different + found, max(largest, distance)
        if different:
            by = f"by up to {largest:.6g}" if largest else "in bits that are no distance: NaN, infinity, sign of zero"
            yield f"{name}: {different:,} of {_numel(first, name):,} numbers differ, {by}"


def _filled(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says, with the defaults of recipe fields that an older release did not know."""
    recipe = meta.get("recipe")
    return dict(meta) | ({"recipe": with_defaults(recipe)} if isinstance(recipe, dict) else {})


def total_bytes(source: CheckpointSource) -> int:
    """Return the bytes of all tensors."""
    return sum(_nbytes(source, name) for name in source.tensors)


def _compare(ours: Tensor, theirs: Tensor) -> tuple[int, float]:
    """Return how many numbers differ, and by how much at most where both are finite.

    Numbers of one type differ if any bit does; of two types, if their values do, with NaN equal to NaN.
    """
    if ours.dtype == theirs.dtype:
        differs = _bits(ours) != _bits(theirs)
    else:
        is_whole = not (ours.is_floating_point() or theirs.is_floating_point())
        ours, theirs = (data.to(torch.int64 if is_whole else torch.float64) for data in (ours, theirs))
        differs = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    if not differs.any():
        return 0, 0.0
    ours, theirs = ours[differs], theirs[differs]
    if not ours.is_floating_point():
        return len(ours), float(max(abs(a - b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)))
    distance = (ours.double() - theirs.double()).abs()
    finite = distance[distance.isfinite()]
    return len(ours), float(finite.max()) if len(finite) else 0.0


def _bits(data: Tensor) -> Tensor:
    """Return whole numbers that are equal where all bits are."""
    return data.contiguous().view(_WHOLE_NUMBERS[data.itemsize])


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}... ({len(text):,} characters)"


def _section(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return what a checkpoint of ours holds under `key`; another's may hold anything there."""
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def _by_kind(source: CheckpointSource) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in source.tensors:
        kinds.setdefault(name.split("/", 1)[0], []).append(name)
    return kinds


def _compare_names(kind: str, held: dict[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if name not in held:
            raise CheckpointError(f"{kind}/{name}: is missing; the recipe's model has it")
        if held[name] != shape:
            raise CheckpointError(f"{kind}/{name}: has shape {list(held[name])}, the recipe's model {list(shape)}")
    if surplus := sorted(held.keys() - expected.keys()):
        raise CheckpointError(f"{kind}/{surplus[0]}: is not in the recipe's model")


def _parts(source: CheckpointSource, name: str) -> Iterator[Box]:
    dtype, shape = source.tensors[name]
    return split_box(Box((0,) * len(shape), shape), dtype.itemsize)


def _numel(source: CheckpointSource, name: str) -> int:
    return math.prod(source.tensors[name][1])


def _nbytes(source: CheckpointSource, name: str) -> int:
    return _numel(source, name) * source.tensors[name][0].itemsize
