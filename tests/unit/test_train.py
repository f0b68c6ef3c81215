"""The training command as a person meets it: what it prints, and how it refuses without touching anything."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ecdit_ds import train
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import dump_recipe, load_recipe
from ecdit_ds.training.run_dir import RunDir
from tests.helpers.forked import in_a_copy

MakeRecipe = Callable[..., Recipe]
Run = Callable[..., tuple[int, str, str]]

ENTRY = Path(train.__file__)

# It leaves as train.py does: a process group that Python takes down may abort.
SEVERAL_RUNS = """
import contextlib, io, json, os, sys
from ecdit_ds.train import main
for flags in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = main(flags)
    print(json.dumps([code, told.getvalue()]), flush=True)
os._exit(0)
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Begin without a launcher's variables, and take back those that the command sets for a world of one."""
    before = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE"):
        os.environ.pop(name, None)
    yield monkeypatch
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(
    tmp_path: Path, tiny_recipe_file: Path, environment: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Return `run(*flags)`: the command in an empty folder; gives exit code, stdout and stderr.

    In this process, or in a copy of it where it is a dry run, which creates process groups.
    """
    (tmp_path / "here").mkdir()
    environment.chdir(tmp_path / "here")

    def run_main(*flags: str) -> tuple[int, str, str]:
        command = ["--config", str(tiny_recipe_file), *flags]
        if "--dry-run" in flags:
            return in_a_copy(lambda: train.main(command))
        return train.main(command), *capfd.readouterr()

    return run_main


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def the_error(err: str) -> str:
    """Return the one line of a refusal."""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_print_config_prints_a_recipe_that_loads_to_the_same(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--print-config", "--set", "train.max_steps=7", "--set", "optimizer.learning_rate=3e-4")
    assert (code, err) == (0, "")
    printed = tmp_path / "printed.yaml"
    printed.write_text(out, encoding="utf-8")
    recipe = load_recipe(str(printed))
    assert (recipe.train.max_steps, recipe.optimizer.learning_rate, recipe.name) == (7, 3e-4, "tiny")
    assert dump_recipe(recipe) == out


def test_a_dry_run_tells_the_sizes_and_writes_nothing(
    run: Run, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        environment.setenv(name, value)
    code, out, err = run("--dry-run", "--set", "parallel.ep=2", "--set", "train.micro_batch_size=1")
    assert (code, err) == (0, "")
    for told in (
        "4 in every second layer, 2 a rank",
        "each takes 8 of 16 tokens",
        "4 ranks = data 4",
        "8 images a step = 4 ranks x 1 x 2 accumulated",
        "ZeRO-2",
        "nothing was trained",
    ):
        assert told in out
    assert contents(tmp_path / "here") == {}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sample.prompts=[one two three four five six seven eight nine ten eleven twelve thirteen]", "13 tokens"),
        ("model.in_channels=4", "model.in_channels"),
        ("model.latent_height=8", "smaller than 16 x 16"),
    ],
)
def test_a_dry_run_finds_what_would_stop_a_run_hours_later(run: Run, override: str, told: str) -> None:
    code, _, err = run("--dry-run", "--set", override)
    assert code == 2
    assert told in the_error(err)


def test_only_the_first_rank_speaks(run: Run, environment: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        environment.setenv(name, value)
    assert run("--dry-run") == (0, "", "")
    assert run("--print-config") == (0, "", "")
    assert run("--config", "dmo") == (2, "", "")


def test_help_names_every_flag_and_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    told = capsys.readouterr().out
    for word in ("--config", "--deepspeed", "--set", "--output", "--resume", "--dry-run", "--print-config", "demo"):
        assert word in told
    assert "local_rank" not in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--config", "dmeo"], ["dmeo", "did you mean demo?"]),
        (["--config", "no/such.yaml"], ["no/such.yaml", "neither a file nor a recipe"]),
        (["--set", "train.max_step=5"], ["train.max_step: 5", "did you mean train.max_steps?"]),
        (["--set", "model.hidden_size=wide"], ["model.hidden_size: 'wide' is a str"]),
        (["--set", "train.max_steps"], ["--set train.max_steps", "key=value"]),
        (["--set", "train.precision=fp16"], ["train.precision: 'fp16'", "fp32, bf16"]),
        (["--set", "parallel.ep=3"], ["parallel.ep(3)", "model.num_experts(4)", "1, 2, 4"]),
        (["--set", "parallel.ep=2"], ["parallel.ep(2)", "the 1 data-parallel ranks"]),
        (["--set", "parallel.tp=2", "--set", "model.num_kv_heads=2"], ["parallel.tp(2)", "the 1 ranks"]),
        (["--set", "parallel.tp=2"], ["parallel.tp(2)", "model.num_kv_heads(1)"]),
        (["--set", "train.micro_batch_size=3"], ["train.micro_batch_size(3)", "global_batch_size(8)", "1, 2, 4, 8"]),
        (["--deepspeed", "missing.json"], ["--deepspeed missing.json", "No such file"]),
    ],
)
@pytest.mark.parametrize("mode", [["--dry-run"], []])
def test_a_wrong_request_is_refused_in_one_line_before_anything_is_written(
    run: Run, tmp_path: Path, mode: list[str], flags: list[str], told: list[str]
) -> None:
    code, out, err = run(*flags, *mode)
    assert (code, out) == (2, "")
    assert [part for part in told if part not in the_error(err)] == []
    assert contents(tmp_path / "here") == {}


@pytest.mark.parametrize(
    ("world_size", "flags", "told"),
    [
        (3, [], ["ranks(3)", "train.global_batch_size(8)", "1, 2, 4, 8"]),
        (4, ["train.micro_batch_size=4"], ["8 is not a multiple", "micro_batch_size(4)", "ranks(4)", "1, 2"]),
        (2, ["parallel.ep=4"], ["parallel.ep(4)", "the 2 data-parallel ranks", "1, 2"]),
        (8, ["model.routing_pool=group", "model.routing_group=2"], ["routing_group(2)", "micro_batch_size(1)"]),
    ],
)
def test_a_world_that_does_not_fit_is_refused(
    run: Run, environment: pytest.MonkeyPatch, world_size: int, flags: list[str], told: list[str]
) -> None:
    environment.setenv("RANK", "0")
    environment.setenv("WORLD_SIZE", str(world_size))
    code, out, err = run("--dry-run", *(word for flag in flags for word in ("--set", flag)))
    assert (code, out) == (2, "")
    assert [part for part in told if part not in the_error(err)] == []


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [(["--dry-run", "--local_rank=0"], 0, "recipe       demo"), (["--config", "dmo"], 2, "error: --config dmo: ")],
)
def test_run_by_path_from_anywhere_it_gives_its_exit_code_and_no_traceback(
    tmp_path: Path, flags: list[str], code: int, told: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "PYTHONPATH")}
    command = [sys.executable, str(ENTRY), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == (1 if code else 0)
    assert contents(tmp_path) == {}


@pytest.fixture
def folders(tmp_path: Path, make_recipe: MakeRecipe) -> Path:
    """Return a place with a `used` run, an `other` recipe's, `foreign` files, a `damaged` recipe and a `file`."""
    for name, recipe in (("used", make_recipe()), ("other", make_recipe("train.seed=5")), ("damaged", make_recipe())):
        folder = RunDir(path=tmp_path / name)
        folder.path.mkdir()
        folder.begin(recipe, step=0)
        folder.metrics.write_text('{"step": 1}\n', encoding="ascii")
    (tmp_path / "damaged" / "recipe.yaml").write_text("name: [", encoding="ascii")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine", encoding="ascii")
    (tmp_path / "file").write_text("mine", encoding="ascii")
    return tmp_path


def test_a_folder_that_is_not_this_runs_is_refused_and_left_as_it_was(folders: Path, tiny_recipe_file: Path) -> None:
    cases = {
        ("--output", "other"): ["other: belongs to another recipe", "train.seed: 5 there, 0 now"],
        ("--output", "foreign"): ["--output foreign", "thesis.tex"],
        ("--output", "damaged"): ["damaged/recipe.yaml: cannot be read"],
        ("--output", "file"): ["--output file"],
        ("--output", "used", "--resume", "never"): ["--resume never", "used"],
        ("--output", "used", "--resume", "nowhere"): ["--resume nowhere", "neither a checkpoint nor a run"],
        ("--output", "new", "--resume", "nowhere"): ["--resume nowhere", "neither a checkpoint nor a run"],
        ("--output", "new/deep", "--set", "data.cache_dir=file"): ["file"],
        ("--output", "used", "--set", "data.cache_dir=file"): ["file"],
    }
    before = contents(folders)
    fixed = ["--config", str(tiny_recipe_file), "--set", f"data.cache_dir={folders / 'cache'}"]
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_RUNS],
        input=json.dumps([[*fixed, *flags] for flags in cases]),
        cwd=folders,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ENTRY.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(outcomes) == len(cases)
    for (code, err), (flags, told) in zip(outcomes, cases.items(), strict=True):
        assert code == 2, flags
        assert [part for part in told if part not in the_error(err)] == [], flags
    after = contents(folders)
    assert {name: after.get(name) for name in before} == before
    assert sorted(after.keys() - before.keys()) == []
    assert not (folders / "new").exists()


SLOW_LIBRARIES = ("megatron", "datasets", "matplotlib", "pandas", "scipy", "sklearn", "transformers", "diffusers")


def test_a_rank_imports_no_library_that_its_run_may_not_need() -> None:
    code = f"import sys, ecdit_ds.training.setup; print([name for name in {SLOW_LIBRARIES} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ENTRY.parents[1], check=True, capture_output=True, text=True
    )
    assert done.stdout == "[]\n"


REFUSED = """
import sys
from ecdit_ds.train import main

for flags in (["--set", "model.num_heds=3"], ["--set", "model.num_heads=3"], ["--config", "none"], ["--print-config"]):
    print(main(flags), "torch" in sys.modules, file=sys.stderr)
try:
    main(["--help"])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def test_a_recipe_is_refused_or_printed_before_torch_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=ENTRY.parents[1], check=True, capture_output=True, text=True
    )
    told = [line for line in done.stderr.splitlines() if not line.startswith("error: ")]
    assert told == ["2 False", "2 False", "2 False", "0 False", "False"]
    assert done.stderr.count("error: ") == 3
