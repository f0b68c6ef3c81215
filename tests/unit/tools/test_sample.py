"""The command that draws pictures from a checkpoint."""

import argparse
import json
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.inference.image_folder import read_gallery, read_picture
from ecdit_ds.inference.ranks import DistributedContext
from ecdit_ds.inference.text_to_image import TextToImage
from tests.helpers.random_model import damage_average

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]
Run = Callable[..., tuple[int, list[str]]]

TOOL = Path(__file__).resolve().parents[3] / "tools" / "sample.py"


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


def pictures_in(folder: Path) -> list[tuple[str, int]]:
    """Return prompt and seed of each picture of a folder."""
    return [(picture.prompt, picture.seed) for picture in read_gallery(folder)]


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
        (["--prompt", "a nine", " "], "prompt 2 of 2: ' ' is empty"),
        (["--steps", "0"], "num_steps: 0"),
        (["--steps", "-3"], "num_steps: -3"),
        (["--guidance", "-1"], "guidance_scale: -1.0"),
        (["--guidance", "nan"], "guidance_scale: nan"),
        (["--guidance", "inf"], "guidance_scale: inf"),
        (["--output", "taken", "--steps", "1"], "taken"),
        (["--output", "taken", "--steps", "1", "--overwrite"], "taken"),
        (["--steps"], "--steps: expected one argument"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--unknown"], "--unknown"),
        (["--weights", "best"], "--weights"),
        (["--dtype", "fp8"], "--dtype"),
        (["--guidance-interval", "0.5"], "--guidance-interval: expected 2 arguments"),
        (["--guidance-interval", "0.7", "0.2"], "guidance_interval: [0.7, 0.2]"),
        (["--guidance-interval", "0.2", "0.7", "--guidance", "1"], "guidance_scale: 1.0"),
        (["--negative-prompt", "a nine", "--guidance", "1"], "--negative-prompt: has no effect"),
        (["--negative-prompt", "one " * 13], "13 tokens"),
        (["--eta", "0.5"], "sample.eta: 0.5 has no effect"),
        (["--eta", "2", "--sampler", "euler_ancestral"], "sample.eta: 2.0"),
        (["--capacity-factor", "0"], "capacity_factor: 0.0"),
        (["--capacity-factor", "5"], "capacity_factor: 5.0 is outside (0, num_experts=4]"),
        (["--height", "30"], "height: 30 pixels is not a multiple of 4"),
        (["--width", "-4"], "width: -4"),
        (["--batch-size", "0"], "--batch-size: 0"),
        (["--images-per-prompt", "0"], "--images-per-prompt 0"),
        (["--limit", "0"], "--limit 0"),
        (["--grid", "0"], "--grid: 0"),
        (["--task", "2/2"], "--task: 2/2: tasks count from 0"),
        (["--task", "1"], "--task: '1' is no I/N"),
        (["--tp", "2"], "tp"),
        (["--ep", "0"], "ep"),
        (["--prompt", "a nine", "--prompts", "taken"], "exclude one another"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--dataset", "taken"], "--dataset taken: is none of .parquet"),
        (["--prompt", "a \udcff nine"], "a \\udcff nine"),
        (["--max-memory", "cpu=1GB"], "without --device-map auto"),
        (["--offload-folder", "o"], "without --device-map auto"),
        (["--device-map", "balanced"], "--device-map"),
        (["--device-map", "auto", "--max-memory", "cpu"], "write DEVICE=SIZE"),
        (["--device-map", "auto", "--max-memory", "cpu=much"], "max_memory: {'cpu': 'much'}"),
        (["--device-map", "auto", "--max-memory", "99=1GB"], "cannot be on 99"),
        (["--device-map", "auto", "--max-memory", "cpu=100KB"], "give an offload_folder"),
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


def test_prompts_of_a_file_keep_their_seeds_and_each_has_as_many_pictures_as_asked(tmp_path: Path, run: Run) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a nine"},
        {"prompt": "a six", "seed": 40},
        {"prompt": "a two"},
        {"prompt": "a four"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    flags = ["--prompts", "p.jsonl", "--images-per-prompt", "2", "--limit", "3", "--seed", "5", "--steps", "1"]
    assert run(*flags, "--output", "o", "--grid", "4") == (0, [])
    # Pictures 0 and 1, 2 and 3 (whose seed is told), 4 and 5: seed S + i where nothing is told.
    drawn = [("a nine", 5), ("a nine", 6), ("a six", 40), ("a six", 41), ("a two", 9), ("a two", 10)]
    assert pictures_in(tmp_path / "o") == drawn
    four = Image.open(tmp_path / "o" / "samples.png").size
    assert run(*flags, "--output", "o", "--grid", "5") == (0, [])
    five = Image.open(tmp_path / "o" / "samples.png").size
    assert five[0] == four[0] and five[1] == 2 * four[1]  # four a row


def test_prompts_of_a_data_set_are_drawn_in_their_order(tmp_path: Path, run: Run) -> None:
    (tmp_path / "d.csv").write_text("text,n\na nine,1\na six,2\na two,3\n", encoding="utf-8")
    assert run("--dataset", "d.csv", "--column", "text", "--limit", "2", "--steps", "1") == (0, [])
    assert pictures_in(tmp_path / "samples") == [("a nine", 0), ("a six", 1)]
    code, lines = run("--dataset", "d.csv", "--steps", "1", "--output", "o")
    assert (code, len(lines)) == (2, 1) and "has no column caption; choose from text, n" in lines[0]


def test_a_killed_command_goes_on_and_leaves_what_an_unbroken_one_does(
    tmp_path: Path, checkpoint: Path, run: Run
) -> None:
    flags = ["--prompt", "a nine", "--images-per-prompt", "40", "--batch-size", "2", "--steps", "4", "--grid", "4"]
    command = [sys.executable, str(TOOL), "--checkpoint", str(checkpoint), *flags, "--output", "cut"]
    killed, pictures = subprocess.Popen(command, cwd=tmp_path), tmp_path / "cut" / "pictures"
    while len(list(pictures.glob("*.png"))) < 5 and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -9
    before = {path: path.stat().st_mtime_ns for path in pictures.glob("*.png")}
    assert 5 <= len(before) < 40
    assert run(*flags, "--output", "cut") == (0, [])
    assert run(*flags, "--output", "whole") == (0, [])
    assert {n: d for n, d in content(tmp_path / "cut").items() if not n.endswith(".tmp")} == content(tmp_path / "whole")
    kept = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
    assert len(kept) >= len(before) - 2  # only the part that was being drawn is drawn again


@pytest.mark.parametrize("pool", ["image", "batch"])
def test_the_tasks_pictures_together_are_those_of_one_command_to_the_byte(
    tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel, run: Run, pool: str
) -> None:
    model = save_model(tmp_path / pool, make_recipe(f"model.routing_pool={pool}"))
    # Five batches, the last of one picture; a task's share of two is not the first two.
    flags = [
        "--checkpoint",
        str(model),
        "--images-per-prompt",
        "9",
        "--limit",
        "1",
        "--seed",
        "7",
        "--batch-size",
        "2",
        "--steps",
        "1",
        "--height",
        "16",
    ]
    assert run(*flags, "--output", "whole") == (0, [])
    indices = {0: [0, 1, 6, 7], 1: [2, 3, 8], 2: [4, 5]}
    shared: dict[str, bytes] = {}
    for task in indices:
        assert run(*flags, "--output", "o", "--task", f"{task}/3") == (0, [])
        folder = tmp_path / "o" / f"task_{task}_of_3"
        assert [(p.index, p.seed) for p in read_gallery(folder)] == [(i, 7 + i) for i in indices[task]]
        drawn = {name: data for name, data in content(folder).items() if name.startswith("pictures/")}
        assert not drawn.keys() & shared.keys()
        shared |= drawn
    assert shared == {n: data for n, data in content(tmp_path / "whole").items() if n.startswith("pictures/")}
    assert {path.name for path in (tmp_path / "o").iterdir()} == {f"task_{task}_of_3" for task in indices}


def test_a_task_of_an_array_draws_its_share_and_a_rank_alone_draws_all(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--prompt", "a nine", "a six", "a two", "--batch-size", "1", "--steps", "1", "--output"]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert run(*flags, "whole") == (0, [])
    assert pictures_in(tmp_path / "whole") == [("a nine", 0), ("a six", 1), ("a two", 2)]
    for name, value in (("ID", "5"), ("MIN", "4"), ("MAX", "5"), ("COUNT", "2"), ("STEP", "1")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert run(*flags, "o") == (0, [])
    assert pictures_in(tmp_path / "o" / "task_1_of_2") == [("a six", 1)]
    assert run(*flags, "o", "--task", "0/2") == (0, [])
    assert pictures_in(tmp_path / "o" / "task_0_of_2") == [("a nine", 0), ("a two", 2)]


def test_a_task_with_no_batch_left_leaves_nothing(tmp_path: Path, run: Run) -> None:
    assert run("--prompt", "a nine", "a six", "a two", "--batch-size", "2", "--task", "2/3") == (0, [])
    assert not (tmp_path / "samples").exists()


def test_a_tasks_folder_with_other_batches_is_refused(tmp_path: Path, run: Run) -> None:
    flags = ["--prompt", "a nine", "a six", "a two", "--steps", "1", "--task", "0/2", "--batch-size"]
    assert run(*flags, "2") == (0, [])
    before = content(tmp_path / "samples")
    code, lines = run(*flags, "1")
    assert (code, len(lines)) == (2, 1)
    assert "samples/task_0_of_2: picture 1 is of" in lines[0] and "now none is asked for" in lines[0]
    assert content(tmp_path / "samples") == before


def test_other_flags_are_refused_for_a_folder_of_pictures_until_they_may_overwrite(tmp_path: Path, run: Run) -> None:
    assert run("--steps", "1")[0] == 0
    (tmp_path / "samples" / "mine.txt").write_text("mine", encoding="utf-8")
    before = content(tmp_path / "samples")
    code, lines = run("--steps", "2")
    assert (code, len(lines)) == (2, 1)
    assert "have num_steps 1, now it is 2" in lines[0] and "--overwrite" in lines[0]
    code, lines = run("--steps", "2", "--prompt", "one " * 13, "--overwrite")
    assert (code, len(lines)) == (2, 1)
    assert content(tmp_path / "samples") == before
    assert run("--steps", "2", "--prompt", "a nine", "--height", "32", "--overwrite") == (0, [])
    after = content(tmp_path / "samples")
    # No map of experts per patch: it would show a drawing in the recipe's size.
    assert set(after) == {"mine.txt", "settings.json", "pictures.jsonl", "pictures/000000_a_nine.png", "samples.png"}
    assert json.loads(after["settings.json"])["num_steps"] == 2


def test_a_spread_model_draws_the_same_pictures(tmp_path: Path, run: Run) -> None:
    flags = ("--steps", "1", "--output")
    assert run(*flags, "plain")[0] == 0
    spread = ("--device-map", "auto", "--max-memory", "cpu=100KB", "--offload-folder", "waiting")
    assert run(*flags, "spread", *spread)[0] == 0
    assert content(tmp_path / "spread") == content(tmp_path / "plain")
    assert list((tmp_path / "waiting").glob("*.dat"))


def test_every_drawing_flag_reaches_the_pictures(tmp_path: Path, run: Run) -> None:
    variants = {
        "plain": "",
        "seed": "--seed 1",
        "sampler": "--sampler heun",
        "steps": "--steps 3",
        "guidance": "--guidance 4",
        "interval": "--guidance-interval 0.0 0.6",
        "negative": "--negative-prompt six",
        "weights": "--weights weight",
        "capacity": "--capacity-factor 1",
        "dtype": "--dtype bf16",
        "noise": "--sampler euler_ancestral",
        "eta": "--sampler euler_ancestral --eta 0.5",
    }
    drawn = {}
    for name, flags in variants.items():
        # With a size given, even the recipe's, no map of experts is drawn, which takes longest.
        assert run("--prompt", "a nine", "--height", "16", "--output", name, *flags.split())[0] == 0
        (picture,) = read_gallery(tmp_path / name)
        drawn[name] = np.asarray(read_picture(tmp_path / name, picture)).tobytes()
    assert len(set(drawn.values())) == len(variants)


def test_a_run_that_trains_on_is_drawn_at_one_checkpoint(
    tmp_path: Path, checkpoint: Path, make_recipe: MakeRecipe, save_model: SaveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools import sample

    def join_and_save(*degrees: int) -> Any:  # a newer checkpoint comes between opening and loading
        save_model(tmp_path / "run" / "checkpoints", make_recipe("name=newer"), 9)
        return join(*degrees)

    def load_and_keep(crew: DistributedContext, options: argparse.Namespace) -> TextToImage:
        loaded.append(load(crew, options))
        return loaded[-1]

    join, load, loaded = sample.init_ranks, sample.load_for, list[TextToImage]()
    monkeypatch.setattr(sample, "init_ranks", join_and_save)
    monkeypatch.setattr(sample, "load_for", load_and_keep)
    flags = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "o"), "--steps", "1"]
    sample.draw(sample.parse_arguments(flags))
    told = json.loads((tmp_path / "o" / "settings.json").read_text(encoding="utf-8"))
    assert told["checkpoint"].startswith(f"{checkpoint.name} ")
    assert told["step"] == 1
    assert loaded[0].recipe.name == told["recipe"] == "tiny"
