"""A dry run goes on from where the run would, passes over what the run would, and refuses what the run would."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ecdit_ds import train
from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.writer import TensorShard, save_checkpoint
from ecdit_ds.config.recipe import Recipe
from tests.helpers.forked import in_a_copy

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]
DryRun = Callable[..., tuple[int, str, str]]


@pytest.fixture
def checkpoints(make_recipe: MakeRecipe, save_model: SaveModel, tmp_path: Path) -> Path:
    """Return the checkpoints of a run: steps 9 and 12."""
    root = tmp_path / "run" / "checkpoints"
    for step in (9, 12):
        save_model(root, make_recipe("train.max_steps=20"), step)
    return root


@pytest.fixture
def dry_run(tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """Return `dry_run(*overrides)`: exit code, stdout and stderr of the command, in a copy of this."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def dry_run(*overrides: str) -> tuple[int, str, str]:
        sets = [part for override in ("train.max_steps=20", *overrides) for part in ("--set", override)]
        command = ["--dry-run", "--config", str(tiny_recipe_file), "--output", str(tmp_path / "run"), *sets]
        return in_a_copy(lambda: train.main(command))

    return dry_run


def cut_shard(folder: Path) -> None:
    """Cut the last bytes of a shard off."""
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])


def write_anew(folder: Path, recipe: object, *values: float) -> None:
    """Put a checkpoint with a right checksum in the place of another: one tensor, and something as its recipe."""
    shutil.rmtree(folder)
    data = torch.tensor(values)
    pieces = [TensorShard(name="weight/a", global_shape=(len(values),), box=Box((0,), (len(values),)), data=data)]
    meta = {"recipe": recipe, "samples_seen": 96, "num_updates": 12}
    save_checkpoint(folder.parent, 12, pieces, meta, SoloPeers())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut shard": cut_shard,
    "empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "cut manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "recipe is a list": lambda folder: write_anew(folder, ["ffn", "dense"], 1.0),
    "not finite": lambda folder: write_anew(folder, {}, math.nan),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_dry_run_passes_over_a_damaged_checkpoint_as_the_run_does_and_says_so(
    dry_run: DryRun, checkpoints: Path, damage: str
) -> None:
    DAMAGES[damage](checkpoints / "step_12")
    code, out, err = dry_run()
    assert (code, err) == (0, "")
    assert f"resume       would be rejected: {checkpoints / 'step_12'}" in out
    assert f"goes on from {checkpoints / 'step_9'} at step 9" in out
    assert (checkpoints / "step_12").is_dir()


def test_a_dry_run_refuses_a_run_whose_checkpoints_are_all_damaged_and_names_each(
    dry_run: DryRun, checkpoints: Path
) -> None:
    cut_shard(checkpoints / "step_12")
    cut_shard(checkpoints / "step_9")
    code, out, err = dry_run()
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "none of 2 checkpoints is valid" in err and "step_12" in err and "step_9" in err


def test_a_dry_run_refuses_fewer_steps_than_were_taken_as_the_run_does(dry_run: DryRun, checkpoints: Path) -> None:
    code, out, err = dry_run("train.max_steps=9")
    assert (code, out) == (2, "")
    assert f"train.max_steps: 9, but {checkpoints.parent} is at step 12 already" in err
    assert dry_run("train.max_steps=12")[0] == 0
