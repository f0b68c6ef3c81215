"""What outlives a killed save, a disk that refuses a write, and a clean-up among things that are not ours."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.storage import (
    Piece,
    Reader,
    SoloPeers,
    newest_valid,
    remove_old,
    remove_stale_attempts,
    save_checkpoint,
)
from ecdit_ds.errors import CheckpointError


def save(root: Path, step: int) -> Path:
    piece = Piece(name="w", global_shape=(6,), box=Box((0,), (6,)), data=torch.arange(6.0) + step)
    return save_checkpoint(root, step, [piece], {}, SoloPeers())


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
import torch
from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.storage import Piece, SoloPeers, save_checkpoint

class DyingPeers(SoloPeers):
    def gather(self, obj):
        os.kill(os.getpid(), signal.SIGKILL)

def pieces(is_deadly):
    yield Piece(name="w", global_shape=(50000,), box=Box((0,), (50000,)), data=torch.ones(50000))
    if is_deadly:
        os.kill(os.getpid(), signal.SIGKILL)

root, fault = Path(sys.argv[1]), sys.argv[2]
if fault == "disk full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
peers = DyingPeers() if fault == "killed before the manifest" else SoloPeers()
save_checkpoint(root, 2, pieces(fault == "killed while reading pieces"), {}, peers)
"""


def save_in_another_process(root: Path, fault: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), fault], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("fault", ["killed while reading pieces", "killed before the manifest"])
def test_a_killed_save_leaves_the_older_checkpoint_and_a_folder_that_is_swept_up(tmp_path: Path, fault: str) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    assert save_in_another_process(tmp_path, fault).returncode == -signal.SIGKILL
    [left] = [path for path in tmp_path.iterdir() if path.name != "step_1"]
    assert left.name.startswith("step_2.tmp-")
    reader, rejections = newest_valid(tmp_path)
    assert reader is not None
    assert (reader.manifest.step, rejections) == (1, [])
    assert remove_stale_attempts(tmp_path) == [left]
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_write_that_hits_the_limit_of_the_disk_says_so_with_bytes_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    stderr = save_in_another_process(tmp_path, "disk full").stderr
    assert re.search(r"CheckpointError: .*shard-00000.safetensors: the disk is full: 200000 bytes needed, \d+ ", stderr)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


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
    assert remove_old(crowded, keep=2) == [crowded / "step_1"]
    assert {path.name for path in crowded.iterdir()} == before - {"step_1"}
    assert remove_old(crowded, keep=1) == [crowded / "step_3"]
    Reader(crowded / "step_4").verify()


def test_sweeping_up_takes_only_what_interrupted_saves_and_removals_left(crowded: Path) -> None:
    before = {path.name for path in crowded.iterdir()}
    stale = {"step_0.tmp-1f", ".trash-step_0-1f"}
    assert {path.name for path in remove_stale_attempts(crowded)} == stale
    assert {path.name for path in crowded.iterdir()} == before - stale
    Reader(crowded / "step_4").verify()


def test_keeping_no_checkpoint_is_refused(crowded: Path) -> None:
    with pytest.raises(CheckpointError, match="keep 1 or more"):
        remove_old(crowded, keep=0)
