"""Saving on a real disk: any cut is read back under any other, and a failed save leaves the older checkpoints only.

Several writers are threads that agree through a real barrier.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box, flat_range_boxes, shifted
from ecdit_ds.checkpoint.manifest import read_manifest
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.writer import Save, TensorShard, save_checkpoint
from ecdit_ds.errors import CheckpointError
from ecdit_ds.seeding import parameter_generator, sample_rng

NUM_WRITERS = 3


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


@dataclass
class Room:
    """What the threads of one save share."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(NUM_WRITERS, timeout=20))
    said: list[str] = field(default_factory=lambda: [""] * NUM_WRITERS)


@dataclass
class ThreadPeers:
    """One thread's view of the room; what is said crosses as JSON text, as it may between processes."""

    rank: int
    room: Room
    size: int = NUM_WRITERS

    def _exchange(self, obj: Any) -> list[Any]:
        self.room.said[self.rank] = json.dumps(obj)
        self.room.barrier.wait()
        heard = [json.loads(text) for text in self.room.said]
        self.room.barrier.wait()
        return heard

    def gather(self, obj: Any) -> list[Any] | None:
        heard = self._exchange(obj)
        return heard if self.rank == 0 else None

    def all_true(self, ok: bool) -> bool:
        return all(self._exchange(ok))

    def broadcast(self, obj: Any) -> Any:
        return self._exchange(obj)[0]


def save_together(
    root: Path, step: int, pieces_of: Callable[[int], Iterator[TensorShard]]
) -> list[Path | CheckpointError]:
    """Save from NUM_WRITERS threads and return each one's result or error."""
    room = Room()

    def write(rank: int) -> Path | CheckpointError:
        try:
            return save_checkpoint(root, step, pieces_of(rank), {"samples_seen": 640}, ThreadPeers(rank, room))
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return list(pool.map(write, range(NUM_WRITERS)))


def whole(name: str, data: Tensor) -> TensorShard:
    shape = tuple(data.shape)
    return TensorShard(name=name, global_shape=shape, box=Box((0,) * len(shape), shape), data=data)


def fragments(name: str, tensor: Tensor, seed: int) -> list[TensorShard]:
    """Cut a tensor along one axis, then each half's flat memory at random places, as tensor parallelism and ZeRO do."""
    rng, shape = sample_rng(seed, 0, name), tuple(tensor.shape)
    axis = int(rng.integers(len(shape))) if shape else None
    middle = int(rng.integers(shape[axis] + 1)) if axis is not None else 0
    halves = tensor.tensor_split([middle], dim=axis) if axis is not None else (tensor,)
    pieces = []
    for local, start in zip(halves, (0, middle), strict=False):
        flat, origin = local.contiguous().reshape(-1), tuple(start if i == axis else 0 for i in range(len(shape)))
        cuts = sorted(map(int, rng.integers(0, flat.numel() + 1, 3)))
        for begin, end in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
            for box, position in flat_range_boxes(tuple(local.shape), begin, end):
                data = flat[begin:end][position : position + box.numel].view(box.shape)
                pieces.append(TensorShard(name=name, global_shape=shape, box=shifted(box, origin), data=data))
    return pieces


def bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=parameter_generator(0, name))

    return {
        "experts.w1": draw("w1", 4, 6, 5),
        "experts.w1.ema": draw("ema", 4, 6, 5).bfloat16(),
        "bias": draw("bias", 11).half(),
        "temperature": draw("temperature").double(),
        "step_count": torch.arange(7),
    }


@pytest.mark.parametrize("seed", range(5))
def test_three_writers_any_cut_is_read_back_bitwise_under_another_cut(
    tmp_path: Path, tensors: dict[str, Tensor], seed: int
) -> None:
    pieces = [piece for name, tensor in tensors.items() for piece in fragments(name, tensor, seed)]
    results = save_together(tmp_path, 7, lambda rank: iter(pieces[rank::NUM_WRITERS]))
    assert results == [tmp_path / "step_7"] * NUM_WRITERS
    reader = Reader(tmp_path / "step_7")
    assert (reader.manifest.step, reader.manifest.meta) == (7, {"samples_seen": 640})
    for name, tensor in tensors.items():
        reader.expect(name, tuple(tensor.shape))
        for piece in fragments(name, tensor, seed + 100):
            out = torch.zeros_like(piece.data)
            reader.read_into(name, piece.box, out)
            assert bits(out) == bits(piece.data)


def test_an_empty_tensor_and_a_writer_without_pieces_are_fine(tmp_path: Path) -> None:
    pieces = [[whole("empty", torch.zeros(0, 3))], [whole("w", torch.ones(2))], []]
    assert save_together(tmp_path, 1, lambda rank: iter(pieces[rank])) == [tmp_path / "step_1"] * NUM_WRITERS
    Reader(tmp_path / "step_1").verify()


def test_every_writer_learns_what_is_not_finite_in_any_part_by_global_tensor(tmp_path: Path) -> None:
    def part(start: int, *numbers: float) -> TensorShard:
        data = torch.tensor(numbers)
        return TensorShard(name="w", global_shape=(6,), box=Box((start,), (len(numbers),)), data=data)

    def pieces_of(sound: bool, rank: int) -> list[TensorShard]:
        nan, inf = (0.0, 0.0) if sound else (float("nan"), float("inf"))
        return [[part(0, nan, 1.0), whole("v", torch.ones(3))], [part(2, 1.0)], [part(3, 1.0, inf, nan)]][rank]

    def publish(step: int, sound: bool) -> list[dict[str, int]]:
        room = Room()

        def work(rank: int) -> dict[str, int]:
            save = Save(tmp_path, step, pieces_of(sound, rank), {}, ThreadPeers(rank, room))
            save.write(read_back=False)
            save.publish()
            return save.nonfinite

        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            return list(pool.map(work, range(NUM_WRITERS)))

    assert publish(1, sound=True) == [{}] * NUM_WRITERS
    assert publish(2, sound=False) == [{"w": 3}] * NUM_WRITERS
    assert read_manifest(tmp_path / "step_1").nonfinite == {}
    assert read_manifest(tmp_path / "step_2").nonfinite == {"w": 3}
    assert (tmp_path / "latest").read_text() == "step_1\n"


def test_whole_number_keys_of_meta_do_not_spoil_the_checksum(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, [], {"losses": {9: 0.5, 10: 0.25}}, SoloPeers())
    assert read_manifest(tmp_path / "step_1").meta == {"losses": {"9": 0.5, "10": 0.25}}


def save(root: Path, step: int) -> Path:
    return save_checkpoint(root, step, [whole("w", torch.arange(6.0) + step)], {}, SoloPeers())


def raising(pieces: list[TensorShard], error: Exception) -> Iterator[TensorShard]:
    yield from pieces
    raise error


@pytest.mark.parametrize("rank", range(NUM_WRITERS))
@pytest.mark.parametrize("error", [OSError("lost device"), RuntimeError("bad stream"), KeyError("moment")], ids=type)
def test_one_failing_writer_fails_all_with_its_reason_and_leaves_nothing(
    tmp_path: Path, rank: int, error: Exception
) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)

    def pieces_of(writer: int) -> Iterator[TensorShard]:
        held = [whole(f"w{writer}", torch.ones(4))]
        return raising(held, error) if writer == rank else iter(held)

    results = save_together(tmp_path, 2, pieces_of)
    assert len({str(result) for result in results}) == 1
    assert all(isinstance(result, CheckpointError) for result in results)
    assert re.search(rf"step_2: not saved: writer {rank}: {type(error).__name__}: .*{error.args[0]}", str(results[0]))
    assert contents(tmp_path) == before
    assert folders(tmp_path) == ["step_1"]


@pytest.mark.parametrize(
    ("second", "fault"),
    [
        (
            TensorShard(name="w", global_shape=(6,), box=Box((4,), (2,)), data=torch.ones(2)),
            "element .3. .* in no slice",
        ),
        (
            TensorShard(name="w", global_shape=(6,), box=Box((2,), (4,)), data=torch.ones(4)),
            "element .2. .* in 2 slices",
        ),
        (TensorShard(name="w", global_shape=(7,), box=Box((3,), (4,)), data=torch.ones(4)), "for one writer"),
        (TensorShard(name="w", global_shape=(6,), box=Box((3,), (3,)), data=torch.ones(3).half()), "for one writer"),
        (TensorShard(name="v", global_shape=(1,), box=Box((0,), (1,)), data=torch.ones(1) * 1j), "is complex64"),
    ],
    ids=["gap", "overlap", "shape", "dtype", "unknown dtype"],
)
def test_pieces_that_do_not_make_whole_tensors_are_never_published(
    tmp_path: Path, second: TensorShard, fault: str
) -> None:
    first = TensorShard(name="w", global_shape=(6,), box=Box((0,), (3,)), data=torch.ones(3))
    pieces = [[first], [second], []]
    results = save_together(tmp_path, 2, lambda rank: iter(pieces[rank]))
    assert all(re.search(f"tensor [wv].*{fault}", str(result)) for result in results)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [torch.ones(5), torch.ones(4, 6)[:, :3]])
def test_a_piece_must_be_contiguous_and_fill_its_box(data: Tensor) -> None:
    with pytest.raises(ValueError, match="is not a contiguous"):
        TensorShard(name="w", global_shape=(4, 3), box=Box((0, 0), (4, 3)), data=data)


@pytest.mark.parametrize("meta", [{"loss": float("nan")}, {"path": Path("x")}])
def test_meta_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path, meta: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not JSON"):
        Save(tmp_path, 1, [whole("w", torch.ones(4))], meta, SoloPeers())
    assert list(tmp_path.iterdir()) == []


def test_a_valid_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="step_1: already holds a valid checkpoint"):
        save_checkpoint(tmp_path, 1, [whole("w", torch.zeros(6))], {}, SoloPeers())
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_of_the_same_step_is_moved_aside(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "manifest.json").write_text("{}")
    save(tmp_path, 1)
    Reader(tmp_path / "step_1").verify()
    [aside] = tmp_path.glob("step_1.damaged-*")
    assert (aside / "manifest.json").read_text() == "{}"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; needs the right to mount."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no right to mount here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("bytes_each", [2_000_000, 450_000], ids=["too large", "large together"])
def test_a_full_disk_is_found_before_writing_and_the_next_smaller_save_works(tiny_disk: Path, bytes_each: int) -> None:
    save(tiny_disk, 1)
    before = contents(tiny_disk)
    results = save_together(
        tiny_disk, 2, lambda rank: iter([whole(f"w{rank}", torch.ones(bytes_each, dtype=torch.uint8))])
    )
    told = f"the disk is full: {NUM_WRITERS * bytes_each} bytes needed"
    assert all(told in str(result) and "found before writing" in str(result) for result in results)
    assert contents(tiny_disk) == before
    save(tiny_disk, 2)
    Reader(tiny_disk / "step_2").verify()


@pytest.mark.parametrize("writer", range(NUM_WRITERS))
def test_damage_is_found_in_whichever_writers_file_it_is(tmp_path: Path, writer: int) -> None:
    """All files have one slice, under the same key."""
    save_together(
        tmp_path,
        1,
        lambda rank: iter(
            [TensorShard(name="w", global_shape=(9,), box=Box((3 * rank,), (3,)), data=rank + torch.ones(3))]
        ),
    )
    folder = tmp_path / "step_1"
    shard = folder / f"shard-0000{writer}.safetensors"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    reads = [
        lambda reader: reader.verify(),
        lambda reader: reader.read_into("w", Box((0,), (9,)), torch.empty(9)),
        lambda reader: reader.read_into("w", Box((1,), (7,)), torch.empty(7)),
    ]
    for read in reads:
        with pytest.raises(CheckpointError, match=rf"{shard.name}: w#0 has checksum"):
            read(Reader(folder))
    shard.write_bytes(sound[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: has {len(sound) - 1} bytes where"):
        Reader(folder)
