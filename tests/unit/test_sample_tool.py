"""The command that draws pictures from a checkpoint."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecdit_ds.config import Recipe
from tests.helpers.random_model import damage_average

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]
Run = Callable[..., tuple[int, list[str]]]

TOOL = Path(__file__).resolve().parents[2] / "tools" / "sample.py"


@pytest.fixture
def checkpoint(tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel) -> Path:
    """Return a checkpoint of a random model, the only one of its run."""
    return save_model(tmp_path / "run" / "checkpoints", make_recipe())


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return `run(*flags)`: tools/sample.py as `__main__` in this process; gives its exit code and stderr's lines."""

    def run_main(*flags: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--checkpoint", str(checkpoint), *flags])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return int(ended.value.code or 0), capfd.readouterr().err.splitlines()

    return run_main


def is_blank(path: Path) -> bool:
    """Return whether a picture hardly varies."""
    return bool(np.asarray(Image.open(path).convert("RGB")).std() < 5)


def test_the_command_leaves_a_grid_single_pictures_and_a_routing_map(tmp_path: Path, checkpoint: Path) -> None:
    flags = f"--checkpoint {checkpoint.parents[1]} --output o --prompt a_nine two/../ones --prompt".split()
    command = [sys.executable, str(TOOL), *flags, r"$\foo$"]  # a formula to some plotting libraries
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    names = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    pictures = {"pictures/000000_a_nine.png", "pictures/000001_two_ones.png", "pictures/000002_foo.png"}
    assert names == pictures | {"samples.png", "routing.png", "pictures.jsonl", "settings.json"}
    assert [name for name in names if name.endswith("png") and is_blank(tmp_path / "o" / name)] == []
    assert Image.open(tmp_path / "o" / "pictures" / "000000_a_nine.png").size == (16, 16)


def test_the_command_draws_the_recipes_prompts_by_default_and_a_dense_model_has_no_routing_map(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel, run: Run
) -> None:
    dense = save_model(tmp_path / "dense", make_recipe("model.ffn=dense"))
    assert run("--checkpoint", str(dense), "--steps", "1", "--sampler", "heun", "--guidance", "1")[0] == 0
    pictures = sorted(path.name for path in (tmp_path / "samples").rglob("*.png"))
    assert pictures == ["000000_a_red_seven.png", "000001_two_green_fives.png", "samples.png"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", "run"], None),
        (["--sampler", "dpm"], "euler, heun"),
        (["--prompt", "one " * 13], "13 tokens"),
        (["--steps", "0"], "num_steps: 0"),
        (["--steps", "-3"], "num_steps: -3"),
        (["--guidance", "-1"], "guidance_scale: -1.0"),
        (["--guidance", "nan"], "guidance_scale: nan"),
        (["--guidance", "inf"], "guidance_scale: inf"),
        (["--output", "taken", "--steps", "1"], "taken"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, run: Run, checkpoint: Path, flags: list[str], told: str
) -> None:
    (tmp_path / "taken").write_text("mine", encoding="ascii")
    if flags == ["--checkpoint", "run"]:
        told = str(damage_average(checkpoint).relative_to(tmp_path))
    code, lines = run(*flags)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert told in lines[0]
    assert not (tmp_path / "samples").exists()
    assert (tmp_path / "taken").read_text(encoding="ascii") == "mine"


def test_the_command_refuses_to_draw_nothing(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel, run: Run
) -> None:
    silent = save_model(tmp_path / "silent", make_recipe("sample.prompts=[]"))
    code, lines = run("--checkpoint", str(silent))
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: --prompt: ")
