"""A run that goes on by a changed recipe says which scheduled numbers jump, and both of them; and no other run does."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ecdit_ds import train
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.training.optimizer import learning_rate
from ecdit_ds.training.setup import _report_resume
from ecdit_ds.training.train_state import TrainProgress, schedule_jumps
from tests.helpers.forked import in_a_copy

MakeRecipe = Callable[..., Recipe]
COSINE = ("optimizer.schedule=cosine", "optimizer.learning_rate=0.002", "optimizer.warmup_steps=50")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("old", "new"), [(300, 600), (600, 300)])
def test_a_decaying_run_of_another_length_tells_both_rates_of_the_next_step(
    make_recipe: MakeRecipe, schedule: str, old: int, new: int
) -> None:
    former, now = (make_recipe(*COSINE, f"optimizer.schedule={schedule}", f"train.max_steps={n}") for n in (old, new))
    (line,) = schedule_jumps(former.to_dict(), now, 250)
    for recipe in (former, now):
        assert f"{learning_rate(250, recipe.train.max_steps, recipe.optimizer):.6g} " in line
    assert "at step 251: " in line and f"train.max_steps was {old} and is {new}" in line


def test_the_rate_of_a_finished_run_that_is_made_longer_jumps_too(make_recipe: MakeRecipe) -> None:
    former, now = make_recipe(*COSINE, "train.max_steps=300"), make_recipe(*COSINE, "train.max_steps=600")
    (line,) = schedule_jumps(former.to_dict(), now, 300)
    assert "learning rate jumps at step 301: 0 as" in line


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        (("train.max_steps=600", "optimizer.schedule=constant"), 250),
        (("train.max_steps=600",), 20),
        (("train.log_every=7", "train.micro_batch_size=2", "sample.num_steps=9"), 250),
        (("train.max_steps=250",), 250),
    ],
    ids=["constant", "warm-up", "not scheduled", "nothing left to train"],
)
def test_a_run_whose_next_step_stays_as_it_was_says_nothing(
    make_recipe: MakeRecipe, changes: tuple[str, ...], step: int
) -> None:
    own = [change for change in changes if change.startswith("optimizer.")]
    former = make_recipe(*COSINE, "train.max_steps=300", *own)
    assert schedule_jumps(former.to_dict(), make_recipe(*COSINE, "train.max_steps=300", *changes), step) == []


@pytest.mark.parametrize(
    ("old", "new", "step", "told"),
    [
        ("null", "4", 6, "0.5 as it was begun, 0 from here"),
        ("4", "null", 6, "0 as it was begun, 0.5 from here"),
        ("4", "6", 5, "0 as it was begun, 0.5 from here"),
        ("8", "9", 5, None),
    ],
)
def test_a_mask_that_ends_elsewhere_is_told_where_it_changes_the_next_step(
    make_recipe: MakeRecipe, old: str, new: str, step: int, told: str | None
) -> None:
    masked = ("model.decoder_layers=1", "train.mask_ratio=0.5", "train.max_steps=20")
    former, now = (make_recipe(*masked, f"train.unmasked_from_step={n}") for n in (old, new))
    lines = schedule_jumps(former.to_dict(), now, step)
    assert len(lines) == (told is not None)
    for line in lines:
        assert str(told) in line and "train.unmasked_from_step was" in line


def test_resuming_prints_the_jump(
    make_recipe: MakeRecipe, save_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path, make_recipe(*COSINE, "train.max_steps=300"), step=250)
    progress = TrainProgress(step=250, samples_seen=2000, num_updates=240)  # ten were skipped
    _report_resume(folder, progress, {}, tmp_path, make_recipe(*COSINE, "train.max_steps=600"))
    goes_on, jump = capsys.readouterr().out.splitlines()
    assert goes_on.endswith("at step 250") and jump.startswith("learning rate jumps at step 251: ")


def test_a_dry_run_says_where_the_run_would_go_on_and_what_jumps(
    make_recipe: MakeRecipe,
    save_model: Callable[..., Path],
    tiny_recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    save_model(tmp_path / "run" / "checkpoints", make_recipe(*COSINE, "train.max_steps=300"), step=250)

    def dry_run(*overrides: str) -> tuple[int, str, str]:
        sets = [part for override in (*COSINE, *overrides) for part in ("--set", override)]
        command = ["--dry-run", "--config", str(tiny_recipe_file), "--output", str(tmp_path / "run"), *sets]
        return in_a_copy(lambda: train.main(command))

    code, out, err = dry_run("train.max_steps=600")
    assert (code, err) == (0, "")
    assert "resume       goes on from" in out and "learning rate jumps at step 251: " in out
    code, out, err = dry_run("train.max_steps=600", "optimizer.learning_rate=0.1")
    assert code == 2 and "belongs to another recipe (optimizer.learning_rate: 0.002 there, 0.1 now)" in err
