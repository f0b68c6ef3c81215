"""The loop and its checkpoints with an engine that does as it is told: what is skipped, what breaks, and what stays."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.lease import claim
from ecdit_ds.checkpoint.manifest import read_manifest
from ecdit_ds.checkpoint.naming import list_checkpoints
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.writer import TensorShard, save_checkpoint
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import NonFiniteError, UnrecoverableError
from ecdit_ds.flow.objective import FlowBatch
from ecdit_ds.model.sharding import ShardSpec
from ecdit_ds.parallel.world import World
from ecdit_ds.runtime.exit_report import RunStatus, exit_summary
from ecdit_ds.runtime.fault_injection import Faults
from ecdit_ds.runtime.signals import StopSignal
from ecdit_ds.training.callbacks import Callback
from ecdit_ds.training.engine import DeepSpeedEngine, Fragment, StepResult
from ecdit_ds.training.metrics import BadSampleCounts
from ecdit_ds.training.setup import _restore
from ecdit_ds.training.trainer import Surroundings, Trainer

MakeRecipe = Callable[..., Recipe]
KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
SKIP = "skip"


class WorldOfOne(World):
    """The only process: all agree with it."""

    rank = property(lambda self: 0)
    size = property(lambda self: 1)

    def share(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def all_true(self, ok: bool) -> bool:
        return ok

    def sum(self, values: Tensor) -> Tensor:
        return values


class WorldWithAnother(WorldOfOne):
    """As if a second process answered no to all that it is asked."""

    def mean(self, values: Tensor) -> Tensor:
        return values / 2


def is_same(meta: Mapping[str, Any], folder: Path) -> None:
    """Accept what any run wrote."""


@dataclass
class ToldEngine:
    """Adds 1 to one weight a step; `script` says of which steps are skipped, and which break which kind of state."""

    script: dict[int, str] = field(default_factory=dict)
    module: nn.Module = field(default_factory=lambda: nn.Linear(1, 1))
    states: dict[str, Tensor] = field(default_factory=lambda: {kind: torch.zeros(1) for kind in KINDS})
    steps: int = 0
    num_updates: int = 0

    def step(self, *_: Any) -> StepResult:
        self.steps += 1
        what = self.script.get(self.steps, "")
        if what != SKIP:
            self.num_updates += 1
            self.states["weight"] += 1.0
        if what in KINDS:
            self.states[what].fill_(math.inf)  # by an update whose gradient was finite
        loss = torch.tensor(math.nan if what == SKIP else 1.0)
        return StepResult(loss=loss, auxiliary_loss=loss * 0, grad_norm=1.0, is_skipped=what == SKIP)

    def fragments(self) -> Iterator[Fragment]:
        shard = ShardSpec(global_shape=(1,), offset=(0,), is_tp_sharded=False)
        yield Fragment(name="a", shard=shard, local_shape=(1,), start=0, states=self.states, is_saved_by_this_rank=True)

    def is_finite(self) -> bool:
        return all(bool(state.isfinite().all()) for state in self.states.values())

    def restored(self, num_updates: int) -> None:
        self.num_updates = num_updates

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        yield


class Notes(Callback):
    """Keeps what a person would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.drawn: list[int] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_samples(self, step: int, images_BHWC: np.ndarray, captions: list[str]) -> None:
        self.drawn.append(step)


@dataclass
class Lives:
    """A run of a recipe in a folder, life after life."""

    recipe: Recipe
    root: Path
    notes: Notes = field(default_factory=Notes)
    status: RunStatus = field(default_factory=RunStatus)
    draw: Callable[[nn.Module], np.ndarray] = lambda _: np.zeros((2, 4, 4, 3), dtype=np.uint8)
    scores: Callable[[nn.Module], dict[str, Any]] | None = None
    losses: Callable[[], list[float]] = lambda: [1.0]
    world: World = field(default_factory=WorldOfOne)

    def live(self, script: dict[int, str], stop_at: int = 0) -> bool:
        """Go on from what the last life left, until something ends it; return whether that was a stop."""
        world, stop = self.world, StopSignal()
        told = ToldEngine(script)
        engine = cast(DeepSpeedEngine, told)
        progress, folder = _restore(list_checkpoints(self.root), self.root, engine, self.recipe, world, is_same)
        told.steps = progress.step
        self.status.checkpoints = self.root

        def batches(start: int) -> Iterator[list[FlowBatch]]:
            for step in range(start // self.recipe.train.global_batch_size + 1, self.recipe.train.max_steps + 1):
                stop.reason = "asked" if step == stop_at else stop.reason
                yield []

        around = Surroundings(
            device=torch.device("cpu"),
            checkpoints=self.root,
            lease=claim(self.root, f"1.{len(self.notes.notes)}.a"),
            resumed_from=folder,
            faults=Faults(rank=0),
            status=self.status,
            batches=batches,
            heldout_losses=lambda _: self.losses(),
            draw=self.draw,
            scene_scores=self.scores,
            flops_per_image=lambda _: 1.0,
            stop=stop,
            is_tp_leader=True,
            data={},
            encoders={},
            bad_before=BadSampleCounts(),
            peak_flops_per_s=None,
        )
        return Trainer(self.recipe, engine, world, around, [self.notes]).fit(progress)

    def held(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("step_*"))


@pytest.fixture
def make_lives(tmp_path: Path, make_recipe: MakeRecipe) -> Callable[..., Lives]:
    """Return `make_lives("train.x=y", ...)`: a run that saves at every second step and keeps two."""

    def make(*overrides: str) -> Lives:
        usual = (
            "train.max_steps=12",
            "train.checkpoint_every=2",
            "train.keep_checkpoints=2",
            "train.log_every=1",
            "train.sample_every=100",
            "train.evaluate_every=100",
            "train.async_save=false",
        )
        return Lives(make_recipe(*usual, *overrides), tmp_path)

    return make


def test_nothing_is_removed_while_steps_are_skipped_and_all_that_is_old_when_they_are_not(
    make_lives: Callable[..., Lives],
) -> None:
    lives, seen = make_lives("train.max_skipped_steps=8", "train.sample_every=10"), list[list[str]]()

    def look(_: nn.Module) -> np.ndarray:
        seen.append(lives.held())
        return np.zeros((2, 4, 4, 3), dtype=np.uint8)

    lives.draw = look
    assert not lives.live(dict.fromkeys(range(5, 12), SKIP))
    assert seen == [["step_2", "step_4", "step_6", "step_8"], ["step_10", "step_2", "step_4", "step_6", "step_8"]]
    assert lives.held() == ["step_10", "step_12"]


@pytest.mark.parametrize("saved", ["true", "false"])
def test_steps_skipped_in_one_life_count_in_the_next(make_lives: Callable[..., Lives], saved: str) -> None:
    lives = make_lives("train.max_skipped_steps=4", f"train.async_save={saved}")
    script = dict.fromkeys(range(4, 12), SKIP)
    assert lives.live(script, stop_at=6)  # after the third
    assert read_manifest(lives.root / "step_6").meta["skipped_in_a_row"] == 3
    with pytest.raises(UnrecoverableError, match=r"step 7: 4 steps in a row"):
        lives.live(script)


def test_steps_that_were_not_skipped_in_a_row_do_not_count(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives("train.max_skipped_steps=2")
    assert lives.live({3: SKIP, 5: SKIP, 6: ""}, stop_at=6)
    assert read_manifest(lives.root / "step_6").meta["skipped_in_a_row"] == 0
    assert not lives.live({7: SKIP, 9: SKIP})


@pytest.mark.parametrize(("last_update", "told"), [(12, ""), (7, ", the last 5 skipped")])
def test_a_run_whose_weights_predict_nothing_finite_gives_up_at_its_end_and_does_so_again(
    make_lives: Callable[..., Lives], last_update: int, told: str
) -> None:
    lives = make_lives("train.max_skipped_steps=8")
    lives.losses = lambda: [1.0, math.nan]
    for _ in range(2):
        with pytest.raises(UnrecoverableError) as gave_up:
            lives.live(dict.fromkeys(range(last_update + 1, 13), SKIP))
        message = str(gave_up.value)
        assert message.startswith(f"all 12 steps are done{told}, and the held-out loss is nan: ")
        older = (last_update - 1) // 2 * 2
        assert f"by step {last_update}; newest checkpoint from before it: {lives.root / f'step_{older}'};" in message
        assert "step_12" in lives.held()


@pytest.mark.parametrize("which", [0, 1], ids=["weights", "average"])
def test_neither_weights_nor_their_average_may_predict_what_is_not_finite(
    make_lives: Callable[..., Lives], which: int
) -> None:
    lives = make_lives()
    lives.live({})
    looked = iter([[math.inf], [1.0]] if which == 0 else [[1.0], [math.inf]])
    lives.losses = lambda: next(looked)
    with pytest.raises(UnrecoverableError, match="held-out loss is inf"):
        lives.live({})


@pytest.mark.parametrize("which", [0, 1], ids=["weights", "average"])
def test_the_last_look_of_a_life_judges_weights_and_their_average(make_lives: Callable[..., Lives], which: int) -> None:
    lives = make_lives()
    last = [[math.inf], [1.0]] if which == 0 else [[1.0], [math.inf]]
    looked = iter([[1.0], *last])  # the first look is at the weights alone
    lives.losses = lambda: next(looked)
    with pytest.raises(UnrecoverableError, match="held-out loss is inf"):
        lives.live({})


def test_a_run_with_a_bad_last_batch_and_good_weights_is_done_and_says_so(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives()
    for _ in range(2):
        assert not lives.live({12: SKIP})
        assert lives.notes.notes[-1].startswith("done at step 12, the last 1 skipped; newest checkpoint is step_12")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [7, 8, 12], ids=["between saves", "at a save", "at the end"])
def test_a_state_that_a_finite_gradient_broke_ends_the_run_unsaved_and_the_good_checkpoints_stay(
    make_lives: Callable[..., Lives], kind: str, step: int
) -> None:
    lives = make_lives()
    with pytest.raises(UnrecoverableError) as gave_up:
        lives.live({step: kind})
    good = (step - 1) // 2 * 2
    assert f"step {step}: 1 numbers of 1 tensors are not finite ({kind}/a)" in str(gave_up.value)
    assert f"go on from step_{good}" in str(gave_up.value)
    assert sorted(lives.held()) == sorted([f"step_{good - 2}", f"step_{good}"])
    assert exit_summary(lives.status, "unrecoverable", "x").endswith(str(lives.root / f"step_{good}"))


def test_a_stop_that_one_rank_is_asked_for_stops_and_saves(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives("train.checkpoint_every=100")
    lives.world = WorldWithAnother()
    assert lives.live({}, stop_at=5)
    assert lives.held() == ["step_5"]


def test_a_stop_does_not_save_a_broken_state(make_lives: Callable[..., Lives]) -> None:
    lives = make_lives()
    with pytest.raises(UnrecoverableError):
        lives.live({5: "weight"}, stop_at=5)
    assert lives.held() == ["step_2", "step_4"]


def test_a_checkpoint_that_turned_out_broken_is_published_for_people_and_ends_the_run(
    make_lives: Callable[..., Lives], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Past the look at the report: what the writer finds is the second net.
    monkeypatch.setattr(ToldEngine, "is_finite", lambda _: True)
    lives = make_lives()
    with pytest.raises(UnrecoverableError, match=r"step_8: 1 numbers of 1 tensors are not finite \(ema/a\)"):
        lives.live({7: "ema"})
    assert lives.held() == ["step_4", "step_6", "step_8"]
    assert (lives.root / "latest").read_text() == "step_6\n"
    assert exit_summary(lives.status, "unrecoverable", "x").endswith(str(lives.root / "step_6"))


def save_state(root: Path, recipe: Recipe, step: int, broken: str = "", *, is_told: bool = True) -> Path:
    """Save a checkpoint of the told engine's state; `is_told` False as the first releases did, which did not count."""
    pieces = [
        TensorShard(
            name=f"{kind}/a",
            global_shape=(1,),
            box=Box((0,), (1,)),
            data=torch.tensor([math.nan if kind == broken else float(step)]),
        )
        for kind in KINDS
    ]
    meta = {"recipe": recipe.to_dict(), "samples_seen": 8 * step, "num_updates": step}
    with pytest.MonkeyPatch.context() as patch:
        if not is_told:
            patch.setattr("ecdit_ds.checkpoint.writer.sum_nonfinite", lambda _: None)
        return save_checkpoint(root, step, pieces, meta, SoloPeers())


@pytest.mark.parametrize("is_told", [True, False], ids=["flagged", "by a release without flags"])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_falls_back_to_the_newest_finite_checkpoint_and_says_so(
    make_lives: Callable[..., Lives], capsys: pytest.CaptureFixture[str], kind: str, is_told: bool
) -> None:
    lives = make_lives()
    save_state(lives.root, lives.recipe, 2)
    save_state(lives.root, lives.recipe, 4, kind, is_told=is_told)
    lives.live({})
    said = capsys.readouterr().out
    assert f"rejected {lives.root / 'step_4'}: 1 numbers of 1 tensors are not finite ({kind}/a)" in said
    assert f"goes on from {lives.root / 'step_2'} at step 2" in said
    assert {"step_10", "step_12"} <= set(lives.held())


@pytest.mark.parametrize("is_told", [True, False], ids=["flagged", "by a release without flags"])
def test_going_on_from_nothing_but_a_broken_checkpoint_is_refused(
    make_lives: Callable[..., Lives], tmp_path: Path, refusal_of: Callable[..., str], is_told: bool
) -> None:
    lives = make_lives()
    broken = save_state(tmp_path / "other", lives.recipe, 4, "ema", is_told=is_told)
    engine = cast(DeepSpeedEngine, ToldEngine())
    message = refusal_of(lambda: _restore([broken], lives.root, engine, lives.recipe, WorldOfOne(), is_same))
    assert f"{broken}: 1 numbers of 1 tensors are not finite (ema/a)" in message
    assert broken.is_dir()


def test_pictures_that_are_not_finite_cost_a_grid_and_a_score_and_not_the_run(
    make_lives: Callable[..., Lives],
) -> None:
    def fail(_: nn.Module) -> Any:
        raise NonFiniteError("2 of 2 latents are not finite")

    lives = make_lives("train.sample_every=6", "train.evaluate_every=6")
    lives.draw = lives.scores = fail
    assert not lives.live({})
    told = [note for note in lives.notes.notes if "2 of 2 latents are not finite" in note]
    assert [note.split(":")[0] for note in told] == ["step 6", "step 6", "step 12", "step 12"]
    assert lives.notes.drawn == []
