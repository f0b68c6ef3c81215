"""A run's folder: one run at a time, one recipe, nothing overwritten, and logs that fit the step it goes on from."""

import fcntl
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

import psutil
import pytest

from ecdit_ds.checkpoint.naming import MANIFEST_NAME
from ecdit_ds.config.deepspeed_json import PROFILE_NAME
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.errors import CheckpointError, ConfigError
from ecdit_ds.training import run_dir as run_folder
from ecdit_ds.training.run_dir import RunDir
from ecdit_ds.training.setup import _claim

MakeRecipe = Callable[..., Recipe]
RefusalOf = Callable[[Callable[[], object]], str]


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    """Return an empty folder for a run."""
    (tmp_path / "run").mkdir()
    return RunDir(path=tmp_path / "run")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a moment, not ten seconds, for a lock that is held."""
    monkeypatch.setattr(run_folder, "_LOCK_PATIENCE_S", 0.3)


def add_checkpoint(root: Path, step: int) -> Path:
    """Make a folder that goes for a checkpoint where only names and the manifest's presence are looked at."""
    checkpoint = root / f"step_{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST_NAME).write_text("{}", encoding="ascii")
    return checkpoint


def hold_lock(path: Path, told: Connection) -> None:
    """Lock a folder, start a process as a loader starts its workers, and wait."""
    handle = RunDir(path=path).lock("12.0.a")
    worker = multiprocessing.get_context("fork").Process(target=signal.pause)
    worker.start()
    told.send(worker.pid)
    signal.pause()
    handle.close()


@pytest.mark.usefixtures("impatient")
def test_a_second_process_is_refused_with_the_holders_number_until_the_holder_is_killed(
    folder: RunDir, refusal_of: RefusalOf
) -> None:
    here, there = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold_lock, args=(folder.path, there))
    holder.start()
    assert here.poll(20), "the holder did not lock"
    worker = psutil.Process(here.recv())
    try:
        message = refusal_of(lambda: folder.lock("12.0.a"))
        assert message.startswith(f"--output {folder.path}: ")
        assert f"(process {holder.pid})" in message

        folder.lock("12.1.b").close()  # unless the scheduler itself has given up on the holder
        os.kill(holder.pid or 0, signal.SIGKILL)
        holder.join()
        assert worker.is_running()
        with folder.lock("12.1.b") as handle:
            handle.seek(0)
            assert handle.read() == f"{os.getpid()} 12.1.b"
    finally:
        holder.kill()
        worker.kill()


def test_the_same_folder_can_be_locked_again_once_the_first_run_is_over(folder: RunDir) -> None:
    folder.lock("12.0.a").close()
    with folder.lock("12.1.b") as handle:
        assert not handle.closed


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """Return what is below a folder: content of files, None of folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("found", ["nothing", "nothing, two deep", "an empty folder", "a run", "a run without marks"])
def test_a_start_that_is_refused_leaves_the_folder_as_it_was(tmp_path: Path, tiny_recipe: Recipe, found: str) -> None:
    folder = RunDir(path=tmp_path / "runs" / "mine" if found == "nothing, two deep" else tmp_path / "mine")
    if "nothing" not in found:
        folder.path.mkdir()
    if "run" in found:
        folder.begin(tiny_recipe, step=0)
    if found == "a run":
        (folder.path / ".lock").write_text("4000000 12.0.a")
        (folder.path / ".attempt").write_text("12.0.a\n")
    before = everything_in(tmp_path)
    with ExitStack() as undo:
        _claim(folder, tiny_recipe, "auto", "12.1.b", [], undo)
        assert (folder.path / ".lock").read_text() == f"{os.getpid()} 12.1.b"
        assert (folder.path / ".attempt").read_text() == "12.1.b\n"
    assert everything_in(tmp_path) == before


def test_a_refused_start_takes_no_folder_away_that_another_one_uses(tmp_path: Path, tiny_recipe: Recipe) -> None:
    folder = RunDir(path=tmp_path / "runs" / "mine")
    with ExitStack() as undo:
        _claim(folder, tiny_recipe, "auto", "a", [], undo)
        (tmp_path / "runs" / "another").mkdir()
        (folder.path / "slurm").mkdir()
    assert everything_in(tmp_path) == {"runs": None, "runs/another": None, "runs/mine": None, "runs/mine/slurm": None}


def test_who_waited_for_a_lock_that_a_refused_start_took_away_has_the_one_that_others_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunDir(path=tmp_path / "runs" / "mine")
    refused, lockf = ExitStack(), fcntl.lockf
    folder.lock("a", refused)

    def lock_after_the_other_left(handle: IO[str], how: int) -> None:
        refused.close()  # takes away file and folders, which are there again for the second try
        lockf(handle, how)

    monkeypatch.setattr("fcntl.lockf", lock_after_the_other_left)
    with folder.lock("b") as handle:
        assert os.path.samefile(handle.fileno(), folder.path / ".lock")
        assert (folder.path / ".lock").read_text() == f"{os.getpid()} b"


def test_a_folder_that_a_refused_start_takes_away_just_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, make, takes_away = RunDir(path=tmp_path / "mine"), run_folder.make_folders, [True]

    def make_and_lose(path: Path) -> None:
        make(path)
        if takes_away.pop():
            path.rmdir()
            takes_away.append(False)

    monkeypatch.setattr(run_folder, "make_folders", make_and_lose)
    folder.lock("a").close()
    assert (folder.path / ".lock").is_file()


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, refusal_of: RefusalOf, place: str) -> None:
    (tmp_path / "file").write_text("mine", encoding="ascii")
    assert refusal_of(lambda: RunDir(path=tmp_path / place).lock("a")).startswith(f"--output {tmp_path / place}: ")
    assert (tmp_path / "file").read_text(encoding="ascii") == "mine"


def test_a_folder_is_new_until_begun_and_then_the_recipes(folder: RunDir, tiny_recipe: Recipe) -> None:
    folder.check_recipe(tiny_recipe)
    folder.begin(tiny_recipe, step=0)
    folder.check_recipe(tiny_recipe)
    assert load_recipe(str(folder.recipe)) == tiny_recipe


def test_a_lock_alone_makes_a_folder_no_ones(folder: RunDir, tiny_recipe: Recipe) -> None:
    folder.lock("12.0.a").close()
    folder.check_recipe(tiny_recipe)


@pytest.mark.parametrize("name", [".attempt", "slurm", "recipe.yaml.tmp"])
def test_what_the_start_of_a_job_leaves_makes_a_folder_no_ones(folder: RunDir, tiny_recipe: Recipe, name: str) -> None:
    (folder.path / name).mkdir()
    folder.check_recipe(tiny_recipe)


def test_another_recipe_is_refused_with_every_changed_field_and_both_values(
    folder: RunDir, make_recipe: MakeRecipe, refusal_of: RefusalOf
) -> None:
    folder.begin(make_recipe(), step=0)
    before = folder.recipe.read_bytes()
    other = make_recipe("model.hidden_size=64", "train.seed=3", "train.max_steps=100")
    message = refusal_of(lambda: folder.check_recipe(other))
    assert message.startswith(f"{folder.path}: ")
    assert "model.hidden_size: 32 there, 64 now" in message
    assert "train.seed: 0 there, 3 now" in message
    assert "max_steps" not in message
    assert folder.recipe.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    ["train.max_steps=9", "train.micro_batch_size=2", "parallel.ep=2", "sample.prompts=[a]", "data.num_workers=1"],
)
def test_what_does_not_change_the_training_may_change(folder: RunDir, make_recipe: MakeRecipe, change: str) -> None:
    folder.begin(make_recipe(), step=0)
    changed = make_recipe(change)
    folder.check_recipe(changed)
    folder.begin(changed, step=0)
    assert load_recipe(str(folder.recipe)) == changed


def test_files_of_no_run_are_refused_and_one_is_named(
    folder: RunDir, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    for name in ("thesis.tex", "photo.png"):
        (folder.path / name).touch()
    message = refusal_of(lambda: folder.check_recipe(tiny_recipe))
    assert message.startswith(f"--output {folder.path}: ")
    assert "2 files" in message
    assert "photo.png" in message


def test_a_run_that_lost_its_recipe_goes_on_from_its_checkpoints(
    folder: RunDir, tiny_recipe: Recipe, save_model: Callable[..., Path]
) -> None:
    saved = save_model(folder.checkpoints, tiny_recipe, 3)
    folder.metrics.write_text('{"step": 3}\n')
    with ExitStack() as undo:
        _, candidates = _claim(folder, tiny_recipe, "auto", "a", [], undo)
    assert candidates == [saved]


def test_a_run_that_lost_its_recipe_and_its_checkpoints_is_refused_as_what_it_is(
    folder: RunDir, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    folder.metrics.write_text('{"step": 3}\n')
    (folder.checkpoints / "step_3").mkdir(parents=True)
    message = refusal_of(lambda: folder.check_recipe(tiny_recipe))
    assert message.startswith(f"--output {folder.path}: recipe.yaml is lost, and no checkpoint")
    assert "put either back, or choose another folder" in message


@pytest.mark.parametrize("content", [b"a: [1, 2", b"\xff\xfe", b"name: a\nname: b\n"])
def test_a_damaged_recipe_is_named(folder: RunDir, tiny_recipe: Recipe, refusal_of: RefusalOf, content: bytes) -> None:
    folder.recipe.write_bytes(content)
    message = refusal_of(lambda: folder.check_recipe(tiny_recipe))
    assert message.startswith(f"{folder.recipe}: cannot be read")
    assert folder.recipe.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"[]", b"name: tiny\n"])
def test_a_recipe_that_lacks_its_sections_is_refused(folder: RunDir, tiny_recipe: Recipe, content: bytes) -> None:
    folder.recipe.write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError)) as refused:
        folder.check_recipe(tiny_recipe)
    assert str(refused.value).startswith(str(folder.path))


def test_auto_tries_the_newest_checkpoint_first_and_starts_afresh_without_any(folder: RunDir) -> None:
    assert folder.candidates("auto") == []
    written = [add_checkpoint(folder.checkpoints, step) for step in (9, 100, 20)]
    assert folder.candidates("auto") == [written[1], written[2], written[0]]


def test_never_is_refused_in_a_folder_that_holds_a_run(folder: RunDir, refusal_of: RefusalOf) -> None:
    assert folder.candidates("never") == []
    folder.metrics.write_text("{}\n", encoding="ascii")
    assert "--resume never" in refusal_of(lambda: folder.candidates("never"))
    folder.metrics.unlink()
    add_checkpoint(folder.checkpoints, 5)
    message = refusal_of(lambda: folder.candidates("never"))
    assert str(folder.path) in message
    assert "--output" in message


def test_a_path_may_be_a_checkpoint_or_a_run_with_checkpoints(folder: RunDir, tmp_path: Path) -> None:
    other = tmp_path / "other"
    old, new = (add_checkpoint(other / "checkpoints", step) for step in (4, 8))
    assert folder.candidates(str(other)) == [new, old]
    assert folder.candidates(str(old)) == [old]


def test_a_path_to_nothing_is_refused(folder: RunDir, tmp_path: Path, refusal_of: RefusalOf) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for path in (tmp_path / "nowhere", tmp_path / "empty", tmp_path / "empty" / "checkpoints"):
        assert refusal_of(lambda path=path: folder.candidates(str(path))).startswith(f"--resume {path}: ")  # type: ignore[misc]


def test_a_path_that_would_overwrite_newer_checkpoints_is_refused(
    folder: RunDir, tmp_path: Path, refusal_of: RefusalOf
) -> None:
    older, newest = (add_checkpoint(folder.checkpoints, step) for step in (10, 20))
    message = refusal_of(lambda: folder.candidates(str(older)))
    assert message.startswith(f"--resume {older}: ")
    assert "step_20" in message
    assert folder.candidates(str(newest)) == [newest, older]
    assert folder.candidates(str(folder.path)) == [newest, older]
    linked = RunDir(path=tmp_path / "link")
    linked.path.symlink_to(folder.path)
    for run, asked in ((folder, linked.checkpoints / older.name), (linked, older)):
        assert "step_20" in refusal_of(lambda run=run, asked=asked: run.candidates(str(asked)))  # type: ignore[misc]


def test_a_damaged_checkpoint_that_was_set_aside_keeps_nobody_from_the_others(folder: RunDir) -> None:
    own = add_checkpoint(folder.checkpoints, 5)
    add_checkpoint(folder.checkpoints, 7).rename(folder.checkpoints / "step_7.damaged-1f")
    assert folder.candidates("auto") == [own]


def test_a_copied_checkpoint_with_zeros_in_its_name_is_none_of_the_runs_and_alone_it_is_named(
    folder: RunDir, refusal_of: RefusalOf
) -> None:
    copy = add_checkpoint(folder.checkpoints, 7).rename(folder.checkpoints / "step_0007")
    message = refusal_of(lambda: folder.candidates("auto"))
    assert message == f"{copy}: is a checkpoint by another name; name it step_7, and the run goes on from it"
    own = add_checkpoint(folder.checkpoints, 7)
    assert folder.candidates("auto") == [own]


def test_a_folder_with_checkpoints_of_its_own_goes_on_from_them_whatever_path_it_began_from(
    folder: RunDir, tmp_path: Path
) -> None:
    foreign = add_checkpoint(tmp_path / "other" / "checkpoints", 3)
    assert folder.candidates(str(foreign)) == [foreign]
    own = add_checkpoint(folder.checkpoints, 10)
    assert folder.candidates(str(foreign)) == [own]


@pytest.mark.parametrize("log", ["metrics", "evaluations"])
@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', '{"step": 3, "loss": 0.5}'])
def test_beginning_keeps_lines_up_to_the_step_byte_for_byte(
    folder: RunDir, tiny_recipe: Recipe, log: str, torn: str
) -> None:
    path: Path = getattr(folder, log)
    kept = '{"step":1,  "loss": 1e-05}\n{"loss": null, "step": 2}\n'
    path.write_text(kept + '{"step": 4, "loss": 0.5}\n' + torn, encoding="ascii")
    folder.begin(tiny_recipe, step=2)
    assert path.read_text(encoding="ascii") == kept


def test_beginning_at_the_last_step_changes_no_line(folder: RunDir, tiny_recipe: Recipe) -> None:
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 6))
    folder.metrics.write_text(lines, encoding="ascii")
    folder.begin(tiny_recipe, step=5)
    assert folder.metrics.read_text(encoding="ascii") == lines


def test_a_fresh_start_keeps_no_line_of_a_life_that_left_no_checkpoint(folder: RunDir, tiny_recipe: Recipe) -> None:
    for log in (folder.metrics, folder.evaluations):
        log.write_text('{"step": 0}\n{"step": 1}\n', encoding="ascii")
    folder.begin(tiny_recipe, step=0)
    assert [log.read_text(encoding="ascii") for log in (folder.metrics, folder.evaluations)] == ["", ""]


@pytest.mark.parametrize("lost", ["removed", "unmounted", "file", "damaged"])
def test_a_run_whose_checkpoints_are_lost_from_sight_is_never_begun_again_in_silence(
    folder: RunDir, tiny_recipe: Recipe, lost: str
) -> None:
    folder.begin(tiny_recipe, step=0)
    steps = range(1, 2 * tiny_recipe.train.checkpoint_every + 2)
    lines = "".join(json.dumps({"step": step}) + "\n" for step in steps)
    folder.metrics.write_text(lines)
    if lost == "unmounted":
        folder.checkpoints.symlink_to(folder.path / "not-mounted")
    elif lost == "file":
        folder.checkpoints.touch()
    elif lost == "damaged":
        (folder.checkpoints / "step_5.damaged-1f").mkdir(parents=True)

    def start() -> None:
        folder.candidates("auto")
        folder.begin(tiny_recipe, step=0)

    with pytest.raises(CheckpointError, match=str(folder.path)):
        start()
    assert folder.metrics.read_text() == lines


def test_a_run_that_may_not_have_published_a_checkpoint_yet_begins_again(folder: RunDir, tiny_recipe: Recipe) -> None:
    last = 2 * tiny_recipe.train.checkpoint_every  # the first is published before the next step
    folder.metrics.parent.mkdir(exist_ok=True)
    folder.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, last + 1)))
    folder.begin(tiny_recipe, step=0)
    assert folder.metrics.read_text() == ""


def test_beginning_removes_interrupted_saves_and_nothing_else(folder: RunDir, tiny_recipe: Recipe) -> None:
    add_checkpoint(folder.checkpoints, 2)
    for name in ("step_4.tmp-ab", ".trash-step_1", "notes"):
        (folder.checkpoints / name).mkdir()
    folder.begin(tiny_recipe, step=2)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["notes", "step_2"]
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoints", "recipe.yaml"]


def test_beginning_gives_the_bad_samples_up_to_the_step_and_drops_later_ones(
    folder: RunDir, tiny_recipe: Recipe
) -> None:
    lines = [json.dumps({"step": step, "key": "a", "cause": "not finite"}) + "\n" for step in (1, 2, 2, 3)]
    folder.bad_samples.write_text("".join(lines), encoding="ascii")
    assert folder.begin(tiny_recipe, step=2) == lines[:3]
    assert folder.bad_samples.read_text(encoding="ascii") == "".join(lines[:3])


def test_what_deepspeed_writes_by_its_own_name_is_made_anew_and_follows_no_link(
    folder: RunDir, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder.path.mkdir(exist_ok=True)
    for link in (os.symlink, os.link):
        link(victim, folder.path / PROFILE_NAME)
        folder.begin(tiny_recipe, step=0)
        assert not (folder.path / PROFILE_NAME).exists()
    assert victim.read_text() == "mine"
