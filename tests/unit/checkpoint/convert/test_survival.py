"""A conversion shares its folder with nobody, survives a kill, follows no link, and touches only what is its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ecdit_ds.checkpoint.convert import file_plan as plans
from ecdit_ds.checkpoint.convert.workspace import Workspace, workspace
from tests.helpers.convert_tool import Run, save_shared, save_tensors, tool_runner

TENSORS = {f"weight/{name}": torch.arange(12.0).reshape(3, 4) + i for i, name in enumerate("abcd")}
HOLDS_THE_FOLDER = """
import sys, time
from pathlib import Path
from ecdit_ds.checkpoint.convert.workspace import workspace
with workspace(Path(sys.argv[1]), {"shard-00000.safetensors"}) as space:
    (space.files / "shard-00000.safetensors").write_text("begun")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return tool_runner(capsys)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tensors(tmp_path / "run" / "checkpoints", TENSORS)


def interrupted(run: Run, patch: pytest.MonkeyPatch, *command: object) -> None:
    """Run a conversion up to the moment at which it would publish."""

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with patch.context() as context:
        context.setattr(Workspace, "publish", stop)
        code, _, err = run(*command)
        assert (code, err) == (130, "interrupted; the same command goes on from there\n")


def test_a_second_conversion_to_one_place_is_refused_until_the_first_ends_even_by_a_kill(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    root = Path(__file__).resolve().parents[4]
    command = [sys.executable, "-c", HOLDS_THE_FOLDER, str(tmp_path / "new")]
    first = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")
        assert code == 2 and "another conversion is at work there" in err and len(err.splitlines()) == 1
        assert (tmp_path / "new.partial" / "files" / "shard-00000.safetensors").read_text() == "begun"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")[0] == 0
    assert run("diff", checkpoint, tmp_path / "new")[0] == 0


def test_of_many_conversions_started_together_one_publishes_and_all_it_published_is_whole(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    tool = Path(__file__).resolve().parents[4] / "tools" / "convert_ckpt.py"
    command = [sys.executable, str(tool), "convert", str(checkpoint), str(tmp_path / "new"), "--to", "ecdit"]
    together = [subprocess.Popen([*command, "--files", str(n)], stderr=subprocess.PIPE) for n in (1, 2, 3)]
    told = [process.communicate()[1].decode() for process in together]
    assert sorted(process.returncode for process in together) == [0, 2, 2]
    assert all(len(text.splitlines()) == 1 and text.startswith("error: ") for text in told if text)
    assert run("diff", checkpoint, tmp_path / "new")[0] == 0
    assert not (tmp_path / "new.partial").exists()


def test_a_killed_conversion_goes_on_and_leaves_nothing_else(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[4] / "tools" / "convert_ckpt.py"
    command = ("convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--files", "4")
    process = subprocess.Popen([sys.executable, str(tool), *map(str, command)])
    while not (tmp_path / "new.partial" / "files").is_dir() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert run(*command)[0] == 0 or process.returncode == 0
    assert run("diff", checkpoint, tmp_path / "new")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"]


def test_what_is_published_is_what_was_planned_whatever_an_earlier_command_left(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(run, monkeypatch, "convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--files", "4")
    shared = ("convert", checkpoint, tmp_path / "new", "--to", "safetensors", "--only", "weights")
    interrupted(run, monkeypatch, *shared)
    assert run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")[0] == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    assert not (tmp_path / "new.partial").exists()


@pytest.mark.parametrize(
    "foreign", ["thesis.tex", "manifest.json", "files/thesis.tex", "files/shard-00000.safetensors"]
)
def test_a_folder_with_anything_that_no_conversion_made_is_left_alone(
    run: Run, checkpoint: Path, tmp_path: Path, foreign: str
) -> None:
    path = tmp_path / "new.partial" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")
    assert code == 2 and "which is no conversion's" in err and len(err.splitlines()) == 1
    assert path.read_text() == "mine" and not (tmp_path / "new").exists()


def test_a_planted_link_is_replaced_and_what_it_led_to_is_untouched(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    command = ("convert", checkpoint, tmp_path / "new", "--to", "ecdit")
    interrupted(run, monkeypatch, *command)
    partial = tmp_path / "new.partial"
    for name in ("files/shard-00000.safetensors", "files/manifest.json", "shard-00000.safetensors.note"):
        (partial / name).unlink(missing_ok=True)
        (partial / name).symlink_to(victim)
    assert run(*command)[0] == 0
    assert victim.read_text() == "mine"
    assert not any(path.is_symlink() for path in (tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", ["new.partial", "new.partial/files", "new.partial/lock"])
def test_where_a_conversion_works_is_no_link_and_no_file(run: Run, checkpoint: Path, tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if name.endswith("files"):
        (tmp_path / "new.partial" / "lock").touch()
    (tmp_path / name).symlink_to(foreign)
    code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")
    assert code == 2 and len(err.splitlines()) == 1
    assert list(foreign.iterdir()) == []
    if name == "new.partial":
        (tmp_path / name).unlink()
        (tmp_path / name).write_text("mine")
        code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")
        assert code == 2 and "is not a folder" in err and (tmp_path / name).read_text() == "mine"


def test_a_link_that_leads_nowhere_is_something_that_is_there(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "new").symlink_to(tmp_path / "nowhere")
    code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")
    assert code == 2 and "overwrites nothing" in err
    assert (tmp_path / "new").is_symlink() and not (tmp_path / "nowhere").exists()


def test_source_and_destination_lie_apart(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, _, err = run("convert", checkpoint, checkpoint / "new", "--to", "ecdit")
    assert code == 2 and "lies in the source" in err
    (tmp_path / "link").symlink_to(checkpoint)
    assert "lies in the source" in run("convert", checkpoint, tmp_path / "link" / "new", "--to", "ecdit")[2]
    assert sorted(path.name for path in checkpoint.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    inside = tmp_path / "new.partial" / "files"
    shutil.copytree(checkpoint, inside)
    code, _, err = run("convert", inside, tmp_path / "new", "--to", "ecdit")
    assert code == 2 and "where the conversion would work" in err and (inside / "manifest.json").exists()


def test_files_are_as_readable_as_the_umask_says(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")[0] == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o640}


def test_a_folder_is_only_said_to_go_on_if_it_does(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "TensorFileWriter", stop)
    assert run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")[::2] == (130, "interrupted\n")
    assert not (tmp_path / "new.partial").exists()
    monkeypatch.setattr("tools.convert_ckpt.verify", stop)
    shared = save_shared(tmp_path / "shared", {"a": torch.ones(2)}, meta={"recipe": {}})
    monkeypatch.setattr("tools.convert_ckpt.expected_of", lambda _: ({}, ()))
    assert run("verify", shared)[::2] == (130, "interrupted\n")


def test_a_folder_that_cannot_be_written_is_one_line(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for destination in (tmp_path / "file" / "new", tmp_path / ("n" * 250), "/proc/new", "/"):
        code, _, err = run("convert", checkpoint, destination, "--to", "ecdit")
        assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, err
        assert "goes on" not in err


def test_a_full_disk_is_told_before_anything_is_written(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 95, 5))
    code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")
    assert code == 2 and "192 bytes needed, 5 free" in err
    assert not (tmp_path / "new.partial").exists()


def test_a_workspace_that_was_not_begun_leaves_nothing(tmp_path: Path) -> None:
    with workspace(tmp_path / "new", {"manifest.json"}):
        assert (tmp_path / "new.partial" / "files").is_dir()
    assert list(tmp_path.iterdir()) == []
