"""What the loop hands to whom: the rate of each step, and the weights that held-out losses and pictures are of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.training import trainer
from ecdit_ds.training.callbacks import Callback
from ecdit_ds.training.engine import StepResult
from ecdit_ds.training.optimizer import learning_rate
from ecdit_ds.training.train_state import TrainProgress
from ecdit_ds.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
RAW, AVERAGED = 1.0, 2.0
DECAYING = ("optimizer.schedule=cosine", "optimizer.warmup_steps=3", "train.max_steps=9", "train.max_skipped_steps=9")


class Engine:
    """Notes the rates that it is given; its one weight is RAW, or AVERAGED where it is asked to be."""

    def __init__(self, skipped: tuple[int, ...] = ()) -> None:
        self.module = nn.Linear(1, 1)
        self.module.weight.data.fill_(RAW)
        self.rates: list[float] = []
        self.num_updates, self._skipped = 0, skipped

    def step(self, micro_batches: Any, loss_of: Any, rate: float) -> StepResult:
        """Take no step, at this rate."""
        is_skipped = len(self.rates) in self._skipped
        self.rates.append(rate)
        self.num_updates += not is_skipped
        zero = torch.zeros(())
        return StepResult(loss=zero, auxiliary_loss=zero, grad_norm=zero, is_skipped=is_skipped)

    def is_finite(self) -> bool:
        """Return that nothing broke."""
        return True

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Be the average for a while."""
        self.module.weight.data.fill_(AVERAGED)
        yield
        self.module.weight.data.fill_(RAW)


class World:
    """One rank."""

    rank, size = 0, 1

    def mean(self, value: Any) -> Any:
        return value


class Seen(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.evaluations: list[dict[str, Any]] = []
        self.pictures: list[tuple[int, float]] = []

    def on_evaluation(self, record: dict[str, Any]) -> None:
        self.evaluations.append(record)

    def on_samples(self, step: int, images_BHWC: np.ndarray, captions: list[str]) -> None:
        self.pictures.append((step, float(images_BHWC.mean())))


class Saver:
    """Saves nothing."""

    newest, is_written = None, False

    def __init__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[float], Seen, list[dict[str, Any]]]]:
    """Return `train(recipe, engine, from_step)`: the real loop, and what engine, callbacks and the log were told."""
    monkeypatch.setattr(trainer, "Checkpointer", Saver)
    monkeypatch.setattr(trainer, "RoutingProbe", lambda module: SimpleNamespace(latest=dict))
    logged: list[dict[str, Any]] = []

    class Log:
        def record(self, facts: dict[str, Any], *_: Any) -> None:
            logged.append(facts)

        def flush(self, world: Any, flags: tuple[bool, ...]) -> tuple[list[Any], tuple[int, ...]]:
            return [], (0,) * len(flags)

    monkeypatch.setattr(trainer, "MetricLog", Log)

    def value_of(model: nn.Module) -> float:
        assert isinstance(model, nn.Linear) and not model.training, "held-out numbers are of a model in eval mode"
        return float(model.weight.detach())

    def run(recipe: Recipe, engine: Engine, from_step: int = 0) -> tuple[list[float], Seen, list[dict[str, Any]]]:
        seen = Seen()
        batch = recipe.train.global_batch_size
        given: Any = SimpleNamespace(
            device=torch.device("cpu"),
            checkpoints=Path("nowhere"),
            lease=None,
            resumed_from=None,
            data={},
            encoders={},
            faults=SimpleNamespace(at=lambda *_: None),
            status=SimpleNamespace(step=None),
            bad_before=None,
            batches=lambda start: [[] for _ in range(recipe.train.max_steps - start // batch)],
            heldout_losses=lambda model: [value_of(model)],
            draw=lambda model: np.full((1, 4, 4, 3), value_of(model)),
            scene_scores=lambda model: {"overall": value_of(model)},
            flops_per_image=lambda step: 1.0,
            stop=SimpleNamespace(reason=None),
            is_tp_leader=True,
            peak_flops_per_s=None,
        )
        progress = TrainProgress(step=from_step, samples_seen=from_step * batch, num_updates=from_step)
        Trainer(recipe, engine, World(), given, [seen]).fit(progress)  # type: ignore[arg-type]
        return engine.rates, seen, logged

    return run


@pytest.mark.parametrize("from_step", [0, 2, 5])
@pytest.mark.parametrize("skipped", [(), (0, 1), (2,)])
def test_step_n_is_taken_at_the_rate_of_step_n_also_after_resuming_and_after_skips(
    train: Any, make_recipe: MakeRecipe, from_step: int, skipped: tuple[int, ...]
) -> None:
    recipe = make_recipe(*DECAYING)
    wanted = [learning_rate(step, 9, recipe.optimizer) for step in range(from_step, 9)]
    assert len(set(wanted)) > 3
    rates, _, logged = train(recipe, Engine(skipped), from_step)
    assert rates == wanted
    assert [(facts["step"], facts["learning_rate"]) for facts in logged] == list(
        zip(range(from_step + 1, 10), wanted, strict=True)
    )


def test_held_out_losses_are_of_both_weights_and_scores_and_grids_of_the_average(
    train: Any, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe("train.evaluate_every=2", "train.sample_every=2", "train.max_steps=4")
    engine = Engine()
    _, seen, _ = train(recipe, engine)
    first, *later = seen.evaluations
    assert (first["step"], first["heldout_loss"], first["heldout_loss_ema"]) == (0, RAW, RAW), "there is no average yet"
    assert [record["step"] for record in later] == [2, 4]
    for record in later:
        assert (record["heldout_loss"], record["heldout_loss_ema"]) == (RAW, AVERAGED)
        assert record["heldout_loss_by_time"] == [RAW]
        assert record["scenes"] == {"overall": AVERAGED}
    assert seen.pictures == [(2, AVERAGED), (4, AVERAGED)]
    assert float(engine.module.weight.detach()) == RAW and engine.module.training


def test_a_recipe_without_prompts_draws_nothing(train: Any, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.max_steps=4")
    _, seen, _ = train(replace(recipe, sample=replace(recipe.sample, prompts=())), Engine())
    assert seen.pictures == []
