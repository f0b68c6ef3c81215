"""The loop on one stubbed rank: what is counted, when it reports, saves, stops and gives up, and what it measures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.sources.bad_sample import ReplacedSample
from ecdit_ds.errors import UnrecoverableError
from ecdit_ds.parallel.world import World
from ecdit_ds.training import trainer
from ecdit_ds.training.callbacks import Callback
from ecdit_ds.training.engine import StepResult
from ecdit_ds.training.metrics import count_bad_samples
from ecdit_ds.training.train_state import TrainProgress
from ecdit_ds.training.trainer import Trainer

BATCH = 8
WAITED_S, STEPPED_S = 3.0, 5.0
MakeRecipe = Callable[..., Recipe]


class OneRank(World):
    """The only rank; `others` more may be there that say no to everything, and whose numbers are zeros."""

    rank = property(lambda self: 0)
    size = property(lambda self: 1)

    def __init__(self, others: int = 0) -> None:
        self.others = others

    def share(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, values: Tensor) -> Tensor:
        return values

    def mean(self, values: Tensor) -> Tensor:
        return values / (1 + self.others)


class Told(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[list[dict[str, Any]]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.bad: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def on_report(self, records: list[dict[str, Any]]) -> None:
        self.reports.append(records)

    def on_evaluation(self, record: dict[str, Any]) -> None:
        self.evaluations.append(record)

    def on_bad_samples(self, samples: list[dict[str, Any]]) -> None:
        self.bad += samples

    def on_note(self, text: str) -> None:
        self.notes.append(text)


class Loop:
    """A trainer whose surroundings are stubs, and what happens to them, in order."""

    def __init__(self, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recipe, self.told, self.world = recipe, Told(), OneRank()
        self.events: list[Any] = []
        self.skipped: set[int] = set()
        self.bad_at: dict[int, tuple[ReplacedSample, ...]] = {}
        self.stop_at = self.clock = 0.0
        self.before, self.is_tp_leader, self.loss = count_bad_samples([]), True, 0.5
        self.callbacks: list[Callback] = [self.told]
        self.module, self.num_updates, self.step_now = nn.Linear(1, 1), 0, 0
        self.stop, self.status = SimpleNamespace(reason=None), SimpleNamespace(step=None, stop_reason=None)
        self.is_written, self.newest, self.keeps_all = False, None, None
        self.kept_all_at: dict[int, bool | None] = {}
        monkeypatch.setattr(trainer, "Checkpointer", lambda *_: self)
        monkeypatch.setattr(trainer.time, "perf_counter", lambda: self.clock)

    def fit(self, step: int = 0, **progress: int) -> bool:
        self.step_now, self.num_updates = step, progress.get("num_updates", step)
        given: Any = SimpleNamespace(
            device=torch.device("cpu"),
            checkpoints=Path("nowhere"),
            lease=None,
            resumed_from=None,
            data={},
            encoders={},
            faults=SimpleNamespace(at=lambda *_: None),
            status=self.status,
            bad_before=self.before,
            batches=self._batches,
            heldout_losses=lambda model: [self.loss],
            draw=None,
            scene_scores=None,
            flops_per_image=lambda at: 100.0 * (at + 1),
            stop=self.stop,
            is_tp_leader=self.is_tp_leader,
            peak_flops_per_s=1000.0,
        )
        started = TrainProgress(**{"step": step, "samples_seen": BATCH * step, "num_updates": step} | progress)
        engine: Any = self
        return Trainer(self.recipe, engine, self.world, given, self.callbacks).fit(started)

    def _batches(self, start: int) -> Iterator[list[Any]]:
        self.events.append(("batches from", start))
        for number in range(start // BATCH, self.recipe.train.max_steps):
            self.clock += WAITED_S
            batch = SimpleNamespace(replaced=self.bad_at.get(number + 1, ()))
            batch.to = lambda device, batch=batch: batch
            yield [batch]

    def step(self, micro_batches: Any, loss_of: Any, rate: float) -> StepResult:
        self.clock += STEPPED_S
        self.step_now += 1
        is_skipped = self.step_now in self.skipped
        self.num_updates += not is_skipped
        if self.step_now == self.stop_at:
            self.stop.reason = "SIGTERM"
        zero = torch.zeros(())
        return StepResult(loss=zero + 0.25, auxiliary_loss=zero, grad_norm=zero, is_skipped=is_skipped)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        yield

    def is_finite(self) -> bool:
        return True

    def start(self, progress: TrainProgress) -> None:
        self.events.append(("start", progress))
        self.kept_all_at[progress.step] = self.keeps_all

    def save_last(self, progress: TrainProgress, *, read_back: bool) -> None:
        self.events.append(("save_last", progress, read_back))

    def finish(self) -> None:
        self.events.append(("finish", self.step_now))

    def complain(self) -> None:
        self.events.append(("complain", self.step_now))

    def saved(self) -> list[tuple[str, int]]:
        """Return which kind of save came at which step."""
        return [(event[0], event[1].step) for event in self.events if event[0] in ("start", "save_last")]


@pytest.fixture
def loop(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Loop:
    """Return a loop of seven steps that reports each third and saves each fourth."""
    recipe = make_recipe(
        "train.max_steps=7",
        "train.log_every=3",
        "train.checkpoint_every=4",
        "train.evaluate_every=100",
        "train.sample_every=100",
        "train.max_skipped_steps=3",
        "sample.prompts=[]",
        "data.max_bad=0.01",
    )
    return Loop(recipe, monkeypatch)


def test_steps_samples_and_updates_are_counted_and_what_is_saved_says_them(loop: Loop) -> None:
    loop.skipped = {2, 3}
    assert loop.fit() is False
    assert [event for event in loop.events if event[0] in ("start", "save_last")] == [
        ("start", TrainProgress(step=4, samples_seen=32, num_updates=2)),
        ("save_last", TrainProgress(step=7, samples_seen=56, num_updates=5), True),
    ]
    records = [record for report in loop.told.reports for record in report]
    assert [(record["step"], record["samples_seen"]) for record in records] == [(n, BATCH * n) for n in range(1, 8)]
    assert [record["step"] for record in records if record["is_skipped"]] == [2, 3]
    assert loop.status.step == 7
    assert [event[1] for event in loop.events if event[0] == "complain"] == list(range(1, 8)), "a failed save is told"


def test_it_reports_where_it_is_asked_to_and_at_each_checkpoint_and_at_the_end(loop: Loop) -> None:
    loop.fit()
    assert [[record["step"] for record in report] for report in loop.told.reports] == [[1, 2, 3], [4], [5, 6], [7]]


def test_a_later_life_begins_at_its_samples_and_does_not_evaluate_what_is_not_new(loop: Loop) -> None:
    loop.fit(4, samples_seen=32, num_updates=2)
    assert loop.events[0] == ("batches from", 32)
    assert loop.events[-1][1] == TrainProgress(step=7, samples_seen=56, num_updates=5)
    assert [record["step"] for record in loop.told.evaluations] == [7]


def test_a_run_that_is_at_its_end_trains_nothing(loop: Loop) -> None:
    assert loop.fit(7) is False
    assert loop.events == [] and loop.told.reports == []


@pytest.mark.parametrize(("stop_at", "last"), [(1, 3), (4, 4), (5, 6)])
def test_a_wish_to_stop_is_heard_at_the_next_report_and_saved_at_once_without_reading_back(
    loop: Loop, stop_at: int, last: int
) -> None:
    loop.stop_at = stop_at
    assert loop.fit() is True
    (saved,) = [event for event in loop.events if event[0] == "save_last"]
    assert saved == ("save_last", TrainProgress(step=last, samples_seen=BATCH * last, num_updates=last), False)
    assert loop.step_now == last and ("start", last) not in loop.saved()
    assert "SIGTERM on rank 0" in loop.status.stop_reason and "SIGTERM" in loop.told.notes[-1]


def test_a_wish_to_stop_that_comes_with_the_last_step_ends_a_run_that_is_done(loop: Loop) -> None:
    loop.stop_at = 7
    assert loop.fit() is False
    assert loop.saved() == [("start", 4), ("save_last", 7)]


@pytest.mark.parametrize("others", [0, 1])
def test_a_save_is_published_at_a_report_once_all_ranks_have_written_it(loop: Loop, others: int) -> None:
    loop.is_written, loop.world = True, OneRank(others)
    loop.fit()
    assert [event[1] for event in loop.events if event[0] == "finish"] == ([] if others else [3, 4, 6, 7])


def test_skipped_steps_end_a_run_only_in_a_row_after_telling_of_them_and_finishing_the_save(loop: Loop) -> None:
    loop.skipped = {1, 2, 5, 6}
    loop.fit(0)
    loop.events.clear()
    loop.told.reports.clear()
    loop.skipped = {3, 4, 5}
    with pytest.raises(UnrecoverableError, match="step 5: 3 steps in a row"):
        loop.fit(0)
    assert [[record["step"] for record in report] for report in loop.told.reports] == [[1, 2, 3], [4], [5]]
    assert loop.events[-1] == ("finish", 5)


@pytest.mark.parametrize(("skipped", "keeps_all"), [(set(), False), ({4}, True), ({3, 4}, True), ({3}, False)])
def test_old_checkpoints_stay_from_the_first_step_that_is_skipped_until_one_is_not(
    loop: Loop, skipped: set[int], keeps_all: bool
) -> None:
    loop.skipped = skipped
    loop.fit()
    assert loop.kept_all_at == {4: keeps_all}


def bad(position: int) -> ReplacedSample:
    """Return a bad sample named after its position."""
    return ReplacedSample(position=position, set="a set", key=str(position), cause="not finite")


@pytest.mark.parametrize("is_tp_leader", [True, False])
def test_bad_samples_are_told_with_their_steps_by_the_ranks_that_count(loop: Loop, is_tp_leader: bool) -> None:
    loop.bad_at, loop.is_tp_leader = {1: (bad(7),), 2: (bad(8), bad(15)), 6: (bad(40),)}, is_tp_leader
    loop.fit()
    told = [(line["step"], line["position"]) for line in loop.told.bad]
    assert told == ([(1, 7), (2, 8), (2, 15), (6, 40)] if is_tp_leader else [])


@pytest.mark.parametrize(("earlier", "trained", "gives_up"), [(10, 4, True), (10, 200, False), (9, 4, False)])
def test_bad_samples_of_all_lives_end_a_run_where_they_are_too_many_of_all_that_was_read(
    loop: Loop, earlier: int, trained: int, gives_up: bool
) -> None:
    """With the one of this life, 11 or 10 of the first thousand samples, or of 1,600 and more."""
    lines = ['{"cause": "not finite", "key": "a"}'] * earlier
    loop.before, loop.bad_at = count_bad_samples(lines), {trained + 1: (bad(BATCH * trained),)}
    loop.recipe = replace(loop.recipe, train=replace(loop.recipe.train, max_steps=trained + 3))
    if not gives_up:
        assert loop.fit(trained) is False
        return
    with pytest.raises(UnrecoverableError, match=r"data\.max_bad: 11 of 59 samples read"):
        loop.fit(trained)
    assert loop.events[-1][0] == "finish"


def test_a_step_is_timed_with_its_wait_and_measured_by_the_flops_of_its_own_mask(loop: Loop) -> None:
    loop.fit()
    for record in (record for report in loop.told.reports for record in report):
        assert record["seconds"] == WAITED_S + STEPPED_S
        assert record["images_per_second"] == 1.0
        assert record["model_flops_per_second"] == 100.0 * record["step"]
        assert record["model_flops_utilization"] == pytest.approx(0.1 * record["step"])


def test_held_out_losses_that_are_not_finite_are_none_and_training_goes_on_in_training_mode(loop: Loop) -> None:
    loop.loss = float("nan")
    with pytest.raises(UnrecoverableError):  # at the end
        loop.fit()
    assert [record["step"] for record in loop.told.evaluations] == [0, 7]
    for record in loop.told.evaluations:
        assert record["heldout_loss"] is record["heldout_loss_ema"] is None
        assert record["heldout_loss_by_time"] == [None]
    assert loop.module.training


def test_an_evaluation_without_scenes_says_nothing_of_them(loop: Loop) -> None:
    loop.fit()
    assert len(loop.told.evaluations) == 2
    assert not any("scenes" in record for record in loop.told.evaluations)


def test_a_callback_that_cannot_write_is_told_of_once_and_the_others_go_on(
    loop: Loop, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Callback):
        def on_report(self, records: list[dict[str, Any]]) -> None:
            raise OSError(28, "No space left on device")

    loop.callbacks = [Full(), loop.told]
    loop.fit()
    assert capsys.readouterr().err.count("Full cannot write") == 1
    assert len(loop.told.reports) == 4
