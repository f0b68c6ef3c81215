"""What a save holds while training goes on: every number as it was at the saved step, whenever it is written."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.lease import claim
from ecdit_ds.checkpoint.naming import list_checkpoints, step_of
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.writer import Save, save_checkpoint
from ecdit_ds.errors import CheckpointError, RankLostError, StaleRunError
from ecdit_ds.model.sharding import ShardSpec
from ecdit_ds.parallel.world import World
from ecdit_ds.runtime.fault_injection import Fault, Faults
from ecdit_ds.training import checkpointer as saver_module
from ecdit_ds.training.checkpointer import Checkpointer
from ecdit_ds.training.ema import ShardedEMA
from ecdit_ds.training.engine import DeepSpeedEngine, Fragment
from ecdit_ds.training.train_state import (
    TrainProgress,
    check_same_data,
    load_snapshot,
    local_shards,
    progress_of,
    rejection_of,
)
from tests.conftest import MakeRecipe

SHAPES = {"a.weight": (4, 3), "b.weight": (2, 3, 2), "c.bias": (5,)}
KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
DATA = {"sets": ["of made-up numbers"]}
ENCODERS = {"image": {"kind": "none"}}


class FlatEngine:
    """One flat tensor of some elements of all parameters, with torch's AdamW and the average, as a rank of ZeRO has."""

    def __init__(
        self,
        ranges: dict[str, tuple[int, int]],
        *,
        tp_cut: tuple[int, int] = (0, 1),
        seed: int = 0,
        is_writer: bool = True,
    ) -> None:
        """Hold elements [start, stop) of each local tensor; of `a.weight` part `tp_cut[0]` of `tp_cut[1]`, by rows."""
        self._ranges, self._tp_cut, self._is_writer = ranges, tp_cut, is_writer
        self._draws = torch.Generator().manual_seed(seed)
        numel = sum(stop - start for start, stop in ranges.values())
        self.flat = torch.randn(numel, generator=self._draws)
        self.optimizer = torch.optim.AdamW([self.flat], lr=0.1)
        self.ema = ShardedEMA([self.flat], decay=0.9)
        self.step()

    def step(self) -> None:
        """Change every number in place, as an optimizer does."""
        self.flat.grad = torch.randn(self.flat.shape, generator=self._draws)
        self.optimizer.step()
        self.ema.update([self.flat])

    def fragments(self) -> Iterator[Fragment]:
        state, at = self.optimizer.state[self.flat], 0
        whole = {"weight": self.flat.data, "ema": self.ema.averages[0]} | {kind: state[kind] for kind in KINDS[2:]}
        for name, (start, stop) in self._ranges.items():
            index, count = self._tp_cut if name == "a.weight" else (0, 1)
            rows, *rest = SHAPES[name]
            yield Fragment(
                name=name,
                shard=ShardSpec(global_shape=SHAPES[name], offset=(index * rows // count, *(0 for _ in rest))),
                local_shape=(rows // count, *rest),
                start=start,
                states={kind: values.narrow(0, at, stop - start) for kind, values in whole.items()},
                is_saved_by_this_rank=self._is_writer,
            )
            at += stop - start

    def held(self) -> dict[str, Tensor]:
        """Return copies of all that is to be saved, by name."""
        return {
            f"{kind}/{fragment.name}": values.clone()
            for fragment in self.fragments()
            for kind, values in fragment.states.items()
        }


def whole_engine(**changes: Any) -> FlatEngine:
    """Return an engine that holds all of everything."""
    return FlatEngine({name: (0, torch.Size(shape).numel()) for name, shape in SHAPES.items()}, **changes)


def stored(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, flat."""
    reader = Reader(folder)
    found = {name: torch.empty(tensor.shape) for name, tensor in reader.manifest.tensors.items()}
    for name, out in found.items():
        reader.read_into(name, Box((0,) * out.dim(), tuple(out.shape)), out)
    return {name: out.flatten() for name, out in found.items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare all tensors bitwise."""
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


class Gate:
    """Holds threads that write, each until somebody waits for it."""

    def __init__(self) -> None:
        self._doors: dict[int, threading.Event] = {}

    def hold(self, step: int) -> None:
        """Wait, in the thread that writes the checkpoint of a step."""
        assert self._doors.setdefault(step, threading.Event()).wait(60)

    def open(self) -> None:
        """Let go whoever is held now."""
        for door in list(self._doors.values()):
            door.set()


class Alone(SoloPeers):
    """A world of one process, which opens the gate when it waits for its writer; asks nobody."""

    def __init__(self, gate: Gate, *, is_patient: bool = False) -> None:
        self._gate, self._is_patient = gate, is_patient
        self.num_waits = 0

    def share(self, value: Any) -> list[Any]:
        return [value]

    def all_true(self, ok: bool) -> bool:
        if not ok:  # so asks who waits for a writer
            self.num_waits += 1
            if not self._is_patient:
                self._gate.open()
        return ok


class FaultsAtGate(Faults):
    """Holds the writer at a moment."""

    gate: Gate | None = None
    moment: str | None = None

    def at(self, moment: str, step: int) -> None:
        super().at(moment, step)
        if self.gate is not None and moment == self.moment:
            self.gate.hold(step)


Make = Callable[..., tuple[Checkpointer, FlatEngine, list[str]]]


@pytest.fixture
def make_saver(tmp_path: Path, make_recipe: MakeRecipe) -> Make:
    """Return `make_saver("train.x=y", ..., faults=, world=, verified=)`: a saver, its engine, and what it noted."""

    def make(
        *overrides: str, faults: Faults | None = None, world: SoloPeers | None = None, verified: Path | None = None
    ) -> tuple[Checkpointer, FlatEngine, list[str]]:
        engine, notes = whole_engine(), list[str]()
        made = Checkpointer(
            tmp_path / "checkpoints",
            make_recipe(*overrides),
            cast(DeepSpeedEngine, engine),
            cast(World, world or Alone(Gate())),
            claim(tmp_path, "12.0.a"),
            faults or Faults(rank=0),
            verified,
            notes.append,
            DATA,
            ENCODERS,
        )
        return made, engine, notes

    return make


def after(step: int) -> TrainProgress:
    """Return how far a run is after a step."""
    return TrainProgress(step=step, samples_seen=8 * step, num_updates=step - 1, skipped_in_a_row=1)


@pytest.mark.parametrize("moment", ["before it writes", "mid-shard"])
def test_each_save_holds_its_own_step_though_training_and_the_next_save_go_on_before_it_is_written(
    make_saver: Make, tmp_path: Path, make_recipe: MakeRecipe, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "_LOOK_EVERY_S", 0.05)
    gate, faults = Gate(), FaultsAtGate(rank=0)
    faults.gate, faults.moment = gate, moment
    if moment == "before it writes":
        write = Save.write

        def held(save: Save, *, read_back: bool) -> None:
            gate.hold(save.step)
            write(save, read_back=read_back)

        monkeypatch.setattr(Save, "write", held)
    saver, engine, notes = make_saver(faults=faults, world=Alone(gate))
    wanted = {}
    for step in (1, 2, 3):
        wanted[step] = engine.held()
        saver.start(after(step))
        assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == [
            f"step_{done}" for done in range(step - 1, 0, -1)
        ][:2]
        if step == 2:
            assert_equal(stored(tmp_path / "checkpoints" / "step_1"), wanted[1])
        for _ in range(3):
            engine.step()
        assert not saver.is_written, "training went on while the writer was held"
    assert all(not torch.equal(engine.held()[name], values) for name, values in wanted[3].items())
    saver.finish()
    assert saver.is_written and saver.newest == tmp_path / "checkpoints" / "step_3"
    for step in (2, 3):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        assert_equal(stored(folder), wanted[step])
        counts = {"samples_seen": 8 * step, "num_updates": step - 1, "skipped_in_a_row": 1}
        assert Reader(folder).manifest.meta == counts | {
            "data": DATA,
            "encoders": ENCODERS,
            "recipe": make_recipe().to_dict(),
        }
    assert [note.split(": held up")[0] for note in notes] == [
        f"saved {tmp_path / 'checkpoints'}/step_{step}" for step in (1, 2, 3)
    ]


def test_without_saving_in_the_background_it_is_published_at_once(make_saver: Make, tmp_path: Path) -> None:
    saver, engine, _ = make_saver("train.async_save=false")
    saver.start(after(1))
    assert_equal(stored(tmp_path / "checkpoints" / "step_1"), engine.held())
    engine.step()
    saver.save_last(after(2), read_back=True)
    assert_equal(stored(tmp_path / "checkpoints" / "step_2"), engine.held())


def test_only_what_was_read_back_is_the_newest_that_is_known_to_be_good(make_saver: Make, tmp_path: Path) -> None:
    saver, _, _ = make_saver()
    for step in (1, 2):
        saver.start(after(step))
    saver.save_last(after(3), read_back=False)
    assert saver.newest == tmp_path / "checkpoints" / "step_2"
    saver.save_last(after(4), read_back=True)
    assert saver.newest == tmp_path / "checkpoints" / "step_4"


def test_as_many_checkpoints_stay_as_the_recipe_says_and_one_that_was_not_read_back_pushes_none_out(
    make_saver: Make, tmp_path: Path
) -> None:
    saver, _, _ = make_saver("train.keep_checkpoints=3", "train.keep_every=4")
    for step in (2, 4, 6, 8, 10):
        saver.start(after(step))
    saver.finish()
    assert list(map(step_of, list_checkpoints(tmp_path / "checkpoints"))) == [10, 8, 6, 4]
    saver.save_last(after(12), read_back=False)
    assert list(map(step_of, list_checkpoints(tmp_path / "checkpoints"))) == [12, 10, 8, 6, 4]


def test_the_checkpoint_that_a_run_goes_on_from_counts_among_those_that_stay(make_saver: Make, tmp_path: Path) -> None:
    first, _, _ = make_saver()
    for step in (2, 4):
        first.save_last(after(step), read_back=False)
    saver, _, _ = make_saver("train.keep_checkpoints=2", verified=tmp_path / "checkpoints" / "step_4")
    assert saver.newest == tmp_path / "checkpoints" / "step_4"
    saver.save_last(after(6), read_back=True)
    assert list(map(step_of, list_checkpoints(tmp_path / "checkpoints"))) == [6, 4]


def test_what_failed_is_told_once_and_the_next_save_is_whole(
    make_saver: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = Fault(action="full", moment="mid-shard", step=1)
    saver, engine, notes = make_saver(faults=Faults(rank=0, faults=(fault,)))
    saver.start(after(1))
    while not saver.is_written:
        time.sleep(0.001)
    for _ in range(2):
        saver.complain()
    saver.finish()
    assert len(notes) == 1 and "step 1: not saved, training goes on: " in notes[0]
    told = capsys.readouterr().err
    assert told.count("rank 0: step 1 will not be saved: ") == 1 and "the disk is full" in told
    saver.start(after(2))
    saver.finish()
    assert_equal(stored(tmp_path / "checkpoints" / "step_2"), engine.held())


def test_an_attempt_that_was_taken_over_ends(make_saver: Make, tmp_path: Path) -> None:
    saver, _, _ = make_saver()
    saver.start(after(1))
    claim(tmp_path, "12.1.b")
    with pytest.raises(StaleRunError, match=r"attempt 12\.1\.b has taken over"):
        saver.finish()


def test_a_writer_is_waited_for_as_many_minutes_as_the_recipe_says(
    make_saver: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "_LOOK_EVERY_S", 0.01)
    gate, faults = Gate(), FaultsAtGate(rank=0)
    faults.gate, faults.moment = gate, "mid-shard"
    world = Alone(gate, is_patient=True)
    saver, _, _ = make_saver("train.save_timeout_minutes=0.001", faults=faults, world=world)
    saver.start(after(1))
    with pytest.raises(RankLostError, match=r"ranks 0 have not written their part within 0\.001 minutes"):
        saver.finish()
    assert world.num_waits == 6  # of a hundredth of a second
    gate.open()


def test_a_writer_that_ends_after_the_last_look_was_not_too_late(
    make_saver: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Alone):
        def all_true(self, ok: bool) -> bool:
            super().all_true(ok)
            if self.num_waits == 6:
                gate.open()
                for writer in (thread for thread in threading.enumerate() if thread.name == "checkpoint"):
                    writer.join()
            return ok

    monkeypatch.setattr(saver_module, "_LOOK_EVERY_S", 0.01)
    gate, faults = Gate(), FaultsAtGate(rank=0)
    faults.gate, faults.moment = gate, "mid-shard"
    saver, _, notes = make_saver("train.save_timeout_minutes=0.001", faults=faults, world=Late(gate, is_patient=True))
    saver.start(after(1))
    saver.finish()
    assert saver.newest is not None and len(notes) == 1


@pytest.mark.parametrize("error", [CheckpointError("not now"), OSError("not now")])
def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_training_goes_on(
    make_saver: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(saver_module, "apply_retention", refuse)
    saver, _, notes = make_saver()
    saver.start(after(1))
    saver.finish()
    assert saver.newest is not None and notes[1:] == ["an old checkpoint stays: not now"]


def test_ranks_that_hold_parts_of_slices_give_a_checkpoint_that_another_layout_reads(tmp_path: Path) -> None:
    """Two tensor-parallel slices, each in two flat ranges that begin within rows, are read as two other ranges."""
    engines = [
        FlatEngine({"a.weight": (0, 4), "b.weight": (0, 5)}, tp_cut=(0, 2), seed=1),
        FlatEngine({"a.weight": (4, 6), "b.weight": (5, 12), "c.bias": (0, 5)}, tp_cut=(0, 2), seed=2),
        FlatEngine({"a.weight": (0, 6)}, tp_cut=(1, 2), seed=3),
    ]
    pieces = [piece for engine in engines for piece in local_shards(cast(DeepSpeedEngine, engine))]
    folder = save_checkpoint(tmp_path, 5, pieces, {"samples_seen": 40, "num_updates": 4}, SoloPeers())
    first, second, third = (engine.held() for engine in engines)
    wanted = {
        name: torch.cat([part[name] for part in (first, second, third) if name in part])
        for name in (f"{kind}/{parameter}" for kind in KINDS for parameter in SHAPES)
    }
    assert_equal(stored(folder), wanted)
    others = [
        FlatEngine({"a.weight": (0, 7), "b.weight": (0, 11), "c.bias": (0, 1)}, seed=4),
        FlatEngine({"a.weight": (7, 12), "b.weight": (11, 12), "c.bias": (1, 5)}, seed=5),
    ]
    for engine in others:
        progress = load_snapshot(Reader(folder), cast(DeepSpeedEngine, engine))
        assert progress == TrainProgress(step=5, samples_seen=40, num_updates=4)
    halves = [engine.held() for engine in others]
    assert_equal({name: torch.cat([half[name] for half in halves]) for name in wanted}, wanted)


COUNTS = {"samples_seen": 40, "num_updates": 4, "skipped_in_a_row": 1}


def save_whole(root: Path, engine: FlatEngine, **meta: Any) -> Reader:
    """Save all that an engine holds, and open what was saved."""
    pieces = local_shards(cast(DeepSpeedEngine, engine))
    return Reader(save_checkpoint(root, 5, pieces, COUNTS | meta, SoloPeers()))


def test_a_rank_that_writes_nothing_reads_all_it_holds(tmp_path: Path) -> None:
    engine, copy = whole_engine(seed=1), whole_engine(seed=2, is_writer=False)
    assert list(local_shards(cast(DeepSpeedEngine, copy))) == []
    load_snapshot(save_whole(tmp_path, engine), cast(DeepSpeedEngine, copy))
    assert_equal(copy.held(), engine.held())


def test_a_model_of_another_shape_takes_nothing_though_all_it_asks_for_is_there(tmp_path: Path) -> None:
    reader = save_whole(tmp_path, whole_engine())
    half = FlatEngine({"a.weight": (0, 6)}, tp_cut=(0, 2))
    load_snapshot(reader, cast(DeepSpeedEngine, half))
    half = FlatEngine({"a.weight": (0, 6)})
    fragment = next(half.fragments())
    small = replace(fragment, local_shape=(2, 3), shard=ShardSpec(global_shape=(2, 3), offset=(0, 0)))
    half.fragments = lambda: iter([small])  # type: ignore[method-assign]
    before = half.held()
    with pytest.raises(CheckpointError, match=r"weight/a\.weight has shape \[4, 3\], the model needs \[2, 3\]"):
        load_snapshot(reader, cast(DeepSpeedEngine, half))
    assert_equal(half.held(), before)


@pytest.mark.parametrize("place", [-1, -200])
def test_damage_that_a_run_would_go_on_from_is_found_wherever_it_is(tmp_path: Path, place: int) -> None:
    reader = save_whole(tmp_path, whole_engine())
    [shard] = reader.folder.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: .* has checksum .*: damaged"):
        load_snapshot(Reader(reader.folder), cast(DeepSpeedEngine, whole_engine()))


@pytest.mark.parametrize("name", sorted(COUNTS))
@pytest.mark.parametrize("count", [None, -1, True, 1.0, "3", 2**63])
def test_a_run_goes_on_from_whole_counts_alone(tmp_path: Path, name: str, count: object) -> None:
    reader = save_whole(tmp_path, whole_engine(), **{name: count})
    with pytest.raises(CheckpointError, match=rf"says {name}: {count!r}, not a whole number from 0 on"):
        progress_of(reader)


@pytest.mark.parametrize(
    ("meta", "number", "said"),
    [
        ({"recipe": {}}, 1.0, None),
        ({"recipe": {}, "samples_seen": -1}, 1.0, "says samples_seen: -1"),
        ({"recipe": {}}, float("nan"), "are not finite"),
        ({}, 1.0, "has no recipe"),
        ({"recipe": "a"}, 1.0, "no recipe"),
    ],
)
def test_what_a_run_cannot_go_on_from_is_told_by_the_manifest_alone(
    tmp_path: Path, meta: dict[str, Any], number: float, said: str | None
) -> None:
    engine = whole_engine()
    engine.flat[-1] = number
    folder, compared = save_whole(tmp_path, engine, **meta).folder, list[Any]()
    fault = rejection_of(folder, lambda *what: compared.append(what))
    assert fault is None if said is None else said in str(fault)
    assert compared == ([(COUNTS | meta, folder)] if said is None else [])


def test_a_recipe_without_a_model_in_a_manifest_is_passed_over_as_damage_is(tmp_path: Path) -> None:
    folder = save_whole(tmp_path, whole_engine(), recipe={"name": "a", "model": None}).folder
    fault = rejection_of(folder, lambda *_: pytest.fail("it is of no recipe that could be compared"))
    assert fault == f"{folder}: its manifest's recipe has no model"


def test_a_run_goes_on_with_the_samples_it_was_trained_on_alone(tmp_path: Path) -> None:
    check_same_data(DATA, DATA, tmp_path)
    check_same_data(None, DATA, tmp_path)  # a converted one does not say
    check_same_data(DATA, {}, tmp_path)  # of digit scenes the recipe says it all
    with pytest.raises(CheckpointError, match="was trained on other samples"):
        check_same_data(DATA, {"sets": ["of others"]}, tmp_path)


def test_a_writer_that_ended_without_a_word_publishes_nothing(tmp_path: Path) -> None:
    save = Save(tmp_path, 1, local_shards(cast(DeepSpeedEngine, whole_engine())), {}, SoloPeers())
    with pytest.raises(CheckpointError, match="the writer ended without a word"):
        save.publish()
    assert list(tmp_path.iterdir()) == []
