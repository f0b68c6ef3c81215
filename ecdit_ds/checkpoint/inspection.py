"""What is in a checkpoint, whether it is whole, and how two differ."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.sources import EcditSource, Source, Tick, parts_of
from ecdit_ds.errors import CheckpointError


def describe(source: Source) -> list[str]:
    """Return lines: step, recipe, kinds with their sizes, files and slices."""
    meta, recipe = source.meta, source.meta.get("recipe", {})
    model, parallel = recipe.get("model", {}), recipe.get("parallel", {})
    lines = [
        f"step         {source.step}, {meta.get('samples_seen', '?')} samples seen",
        f"recipe       {recipe.get('name', '?')}: {model.get('num_layers', '?')} layers of "
        f"{model.get('hidden_size', '?')}, {model.get('ffn', '?')}, {model.get('num_experts', '?')} experts",
        f"written by   parallel.tp {parallel.get('tp', '?')}, parallel.ep {parallel.get('ep', '?')}; "
        "any layout reads it",
    ]
    for kind, names in _by_kind(source).items():
        numel = sum(_numel(source, name) for name in names)
        nbytes = sum(_nbytes(source, name) for name in names)
        dtypes = ", ".join(sorted({str(source.tensors[name][0]).removeprefix("torch.") for name in names}))
        lines.append(f"{kind:<12} {len(names)} tensors, {numel:,} numbers, {nbytes:,} bytes, {dtypes}")
    if isinstance(source, EcditSource):
        slices = sum(len(stored.slices) for stored in source.manifest.tensors.values())
        size = sum(file.size_bytes for file in source.manifest.files.values())
        lines.append(f"files        {len(source.manifest.files)} with {slices} slices, {size:,} bytes")
    return lines


def verify(source: Source, expected: Mapping[str, tuple[int, ...]], tick: Tick) -> int:
    """Check everything there is to check and return the bytes of tensors that were read.

    That slices tile each tensor, without gap or overlap, every expert's included, was proven when the manifest was
    read; here every byte is compared with its checksum, and names and shapes with the recipe's model.

    Args:
        expected: parameter -> global shape, from the recipe's model.

    Raises:
        CheckpointError: naming the file or tensor.
    """
    for kind, names in _by_kind(source).items():
        held = {name.removeprefix(f"{kind}/"): source.tensors[name][1] for name in names}
        _compare_names(kind, held, expected)
    total = 0
    for name in source.tensors:
        if isinstance(source, EcditSource):
            stored = source.manifest.tensors[name]
            for cut in stored.slices:
                source.verify_slice(stored, cut)
                tick(cut.box.numel * source.tensors[name][0].itemsize)
        else:
            for part in _parts(source, name):
                tick(source.read(name, part).nbytes)
        total += _nbytes(source, name)
    return total


def differences(first: Source, second: Source, tick: Tick) -> Iterator[str]:
    """Yield a line for each way in which two checkpoints differ; none if they hold the same."""
    if first.step != second.step:
        yield f"step: {first.step} and {second.step}"
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
            ours, theirs = first.read(name, part), second.read(name, part)
            tick(ours.nbytes)
            if dtype != other_dtype or not _same_bits(ours, theirs):
                distance = (ours.double() - theirs.double()).abs()
                different += int((distance != 0).sum())
                largest = max(largest, float(distance.max()))
        if different:
            yield f"{name}: {different:,} of {_numel(first, name):,} numbers differ, by up to {largest:.3g}"


def total_bytes(source: Source) -> int:
    """Return the bytes of all tensors."""
    return sum(_nbytes(source, name) for name in source.tensors)


def _same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.contiguous().flatten().view(torch.uint8), theirs.contiguous().flatten().view(torch.uint8))


def _by_kind(source: Source) -> dict[str, list[str]]:
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


def _parts(source: Source, name: str) -> Iterator[Box]:
    dtype, shape = source.tensors[name]
    return parts_of(Box((0,) * len(shape), shape), dtype.itemsize)


def _numel(source: Source, name: str) -> int:
    return torch.Size(source.tensors[name][1]).numel()


def _nbytes(source: Source, name: str) -> int:
    return _numel(source, name) * source.tensors[name][0].itemsize
