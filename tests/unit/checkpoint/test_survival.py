"""What outlives a killed save, a disk that refuses a write, and a clean-up among things that are not ours."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.fault_points import SAVE_PHASES
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.reader import Reader, newest_valid
from ecdit_ds.checkpoint.retention import apply_retention, remove_incomplete_saves
from ecdit_ds.checkpoint.writer import TensorShard, save_checkpoint
from ecdit_ds.errors import CheckpointError


def save(root: Path, step: int) -> Path:
    piece = TensorShard(name="w", global_shape=(6,), box=Box((0,), (6,)), data=torch.arange(6.0) + step)
    return save_checkpoint(root, step, [piece], {}, SoloPeers())


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
import torch
from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.writer import TensorShard, save_checkpoint
from ecdit_ds.checkpoint.retention import apply_retention

def reached(phase):
    if phase == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

root = Path(sys.argv[1])
if sys.argv[2] == "disk full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
piece = TensorShard(name="w", global_shape=(50000,), box=Box((0,), (50000,)), data=torch.ones(50000))
save_checkpoint(root, 3, [piece], {}, SoloPeers(), reached=reached)
apply_retention(root, 2, reached=reached)
"""


def save_in_another_process(root: Path, fault: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), fault], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("phase", SAVE_PHASES)
def test_a_save_killed_at_any_phase_leaves_the_newest_published_one_and_nothing_that_is_not_swept_up(
    tmp_path: Path, phase: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    before = contents(tmp_path)
    assert save_in_another_process(tmp_path, phase).returncode == -signal.SIGKILL
    is_published = phase in ("after-rename", "before-latest", "during-removal")
    reader, rejections = newest_valid(tmp_path, thorough=True)
    assert reader is not None
    assert (reader.manifest.step, rejections) == (3 if is_published else 2, [])
    half_done = [path.name for path in tmp_path.iterdir() if path.is_dir() and not re.fullmatch("step_.", path.name)]
    assert len(half_done) == (phase in ("mid-shard", "before-manifest", "before-rename", "during-removal"))
    assert {path.name for path in remove_incomplete_saves(tmp_path)} == set(half_done)
    kept = (2, 3) if phase == "during-removal" else (1, 2, 3) if is_published else (1, 2)
    assert folders(tmp_path) == [f"step_{step}" for step in kept]
    unchanged = {name: content for name, content in before.items() if name.startswith("step_2/")}
    assert unchanged.items() <= contents(tmp_path).items()


def test_a_write_that_hits_the_limit_of_the_disk_says_so_with_bytes_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    stderr = save_in_another_process(tmp_path, "disk full").stderr
    assert re.search(r"CheckpointError: .*shard-00000.safetensors: the disk is full: 200000 bytes needed, \d+ ", stderr)
    assert contents(tmp_path) == before
    assert folders(tmp_path) == ["step_1"]


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """Steps 1 to 4, of which 2 is damaged, among things that are not ours."""
    for step in range(1, 5):
        save(tmp_path, step)
    (tmp_path / "step_2" / "manifest.json").unlink()
    for name in ("best", "step_final", "step_5.damaged-1f", ".trash", "step_0.tmp-1f", ".trash-step_0-1f", "step_00x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_9").write_text("a file")
    (tmp_path / "step_8.tmp-1f").write_text("a file")
    for link in ("step_0", "step_7.tmp-1f"):
        (tmp_path / link).symlink_to(tmp_path / "step_4")
    return tmp_path


def test_removing_old_ones_keeps_the_newest_valid_and_touches_no_foreign_name(crowded: Path) -> None:
    before = {path.name for path in crowded.iterdir()}
    assert apply_retention(crowded, keep=2) == [crowded / "step_1"]
    assert {path.name for path in crowded.iterdir()} == before - {"step_1"}
    Reader(crowded / "step_4").verify()


def test_a_checkpoint_that_is_a_link_to_another_disk_is_left_alone_and_does_not_count(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in range(1, 6):
        save(root, step)
    for step in (1, 5):
        (root / f"step_{step}").rename(elsewhere / f"step_{step}")
        (root / f"step_{step}").symlink_to(elsewhere / f"step_{step}")
    assert apply_retention(root, keep=2) == [root / "step_2"]
    assert folders(root) == [f"step_{step}" for step in (1, 3, 4, 5)]
    assert folders(elsewhere) == ["step_1", "step_5"]


def test_no_checkpoint_goes_before_enough_newer_ones_are_verified(tmp_path: Path) -> None:
    root = tmp_path
    for step in range(1, 6):
        save(root, step)
    for verified in ([], [5], [5, 2]):
        assert apply_retention(root, keep=3, verified=[root / f"step_{step}" for step in verified]) == []
    shard = root / "step_5" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")  # the newest is damaged and was never read back
    assert apply_retention(root, keep=2, verified=[root / "step_4", root / "step_3"]) == [
        root / "step_2",
        root / "step_1",
    ]
    reader, _ = newest_valid(root, thorough=True)
    assert reader is not None and reader.manifest.step == 4


def test_anchors_stay_for_ever(tmp_path: Path) -> None:
    for step in range(1, 10):
        save(tmp_path, step)
    assert [path.name for path in apply_retention(tmp_path, keep=2, keep_every=4)] == [
        f"step_{n}" for n in (7, 6, 5, 3, 2, 1)
    ]
    assert folders(tmp_path) == ["step_4", "step_8", "step_9"]


def test_sweeping_up_takes_only_what_interrupted_saves_and_removals_left(crowded: Path) -> None:
    before = {path.name for path in crowded.iterdir()}
    stale = {"step_0.tmp-1f", ".trash-step_0-1f"}
    assert {path.name for path in remove_incomplete_saves(crowded)} == stale
    assert {path.name for path in crowded.iterdir()} == before - stale
    Reader(crowded / "step_4").verify()


@pytest.mark.parametrize("keep", [0, 1])
def test_keeping_less_than_two_is_refused(crowded: Path, keep: int) -> None:
    with pytest.raises(CheckpointError, match="keep 2 or more"):
        apply_retention(crowded, keep=keep)
