"""What travels from a loader's worker in one block of memory is what was there."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ecdit_ds.data.collate import pack_tensors
from ecdit_ds.data.latents.dataset import LatentDataset, Samples
from ecdit_ds.data.loader import training_batches
from ecdit_ds.data.mixture import Mixture
from tests.helpers.made_sets import write_set


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part of a batch."""

    mask: Tensor
    names: tuple[str, ...] = ("a", "b")
    nothing: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A batch."""

    numbers: Tensor
    inner: Inner
    counts: Tensor
    empty: Tensor = field(default_factory=lambda: torch.empty(3, 0, 2))


def outer() -> Outer:
    """Return a batch of several dtypes, one of them no multiple of its neighbour's bytes."""
    inner = Inner(mask=torch.tensor([True, False, True]))
    return Outer(numbers=torch.randn(3, 5).to(torch.bfloat16), inner=inner, counts=torch.arange(6).view(2, 3).T)


def test_numbers_shapes_and_all_else_are_the_same_in_one_block() -> None:
    batch = outer()
    packed = pack_tensors(batch)
    pairs = [(packed.numbers, batch.numbers), (packed.inner.mask, batch.inner.mask), (packed.counts, batch.counts)]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert packed.empty.shape == (3, 0, 2)
    assert packed.inner.names == ("a", "b") and packed.inner.nothing is None
    assert len({ours.untyped_storage().data_ptr() for ours, _ in pairs}) == 1


def test_writing_to_one_tensor_changes_no_other() -> None:
    batch = outer()
    packed = pack_tensors(batch)
    packed.inner.mask.fill_(True)
    packed.numbers.fill_(7.0)
    assert torch.equal(packed.counts, batch.counts) and not batch.inner.mask.all()
    assert packed.inner.mask.all() and (packed.numbers == 7.0).all()


def test_what_is_no_dataclass_comes_back_as_it_is() -> None:
    assert pack_tensors(["a"]) == ["a"] and pack_tensors(Inner) is Inner


def test_a_batch_from_a_worker_is_in_one_block(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [((3, 4, 4), 8)], dtype="bfloat16")
    mixture = Mixture([LatentDataset(folder)], seed=0, global_batch_size=4)
    read: list[list[Samples]] = []
    for workers in (0, 1):
        steps = training_batches(
            mixture,
            micro_batch_size=4,
            dp_rank=0,
            dp_size=1,
            start_sample=0,
            end_sample=8,
            num_workers=workers,
            transform=as_read,
        )
        read.append([batch for step in steps for batch in step])
    for alone, travelled in zip(*read, strict=True):
        for name, values in vars(alone).items():
            theirs = getattr(travelled, name)
            assert torch.equal(theirs, values) if isinstance(values, Tensor) else theirs == values, name
        tensors = [values for values in vars(travelled).values() if isinstance(values, Tensor) and values.numel()]
        assert len(tensors) > 3 and len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def as_read(samples: Samples) -> Samples:
    """Leave a micro-batch as it is."""
    return samples
