"""`verify` and `diff` see more than tensors: counts, the recipe, the optimizer's state, files beside the parameters."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from tests.helpers.convert_tool import Run, tool_runner
from tests.helpers.random_model import save_random_model

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return tool_runner(capsys)


@pytest.fixture
def recipe(tiny_recipe_file: Path) -> Recipe:
    return load_recipe(str(tiny_recipe_file), ["model.num_kv_heads=2"])


@pytest.mark.parametrize("lost", KINDS)
def test_a_checkpoint_that_lost_a_kind_is_not_whole(run: Run, tmp_path: Path, recipe: Recipe, lost: str) -> None:
    held = tuple(kind for kind in KINDS if kind != lost)
    code, _, err = run("verify", save_random_model(tmp_path, recipe, kinds=held))
    assert code == 2 and f"but no {lost}; training cannot go on from it" in err


def test_weights_alone_are_whole_and_said_to_be_no_start_of_training(run: Run, tmp_path: Path, recipe: Recipe) -> None:
    code, out, _ = run("verify", save_random_model(tmp_path, recipe, kinds=("weight", "ema")))
    assert code == 0 and "note: there is no optimizer state" in out


@pytest.mark.parametrize(("field", "value"), [("samples_seen", 25), ("num_updates", 2)])
def test_diff_tells_counts_apart_and_fields_of_the_recipe(
    run: Run, tmp_path: Path, recipe: Recipe, field: str, value: int
) -> None:
    meta = {"recipe": recipe.to_dict(), "samples_seen": 24, "num_updates": 3}
    first = save_random_model(tmp_path / "first", recipe, step=3, meta=meta)
    second = save_random_model(tmp_path / "second", recipe, step=3, meta=meta | {field: value})
    assert run("diff", first, first)[0] == 0
    code, out, _ = run("diff", first, second)
    assert (code, out) == (1, f"meta.{field}: {meta[field]} and {value}\n1 differences\n")
    other = load_recipe("demo", ["name=tiny"]).to_dict()
    third = save_random_model(tmp_path / "third", recipe, step=3, meta=meta | {"recipe": other})
    assert "meta.recipe.model.hidden_size: " in run("diff", first, third)[1]


def cut(path: Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero/optimizer_state.pt",
    ],
)
def test_a_universal_folder_that_lacks_what_deepspeed_reads_besides_is_not_whole(
    run: Run, tmp_path: Path, recipe: Recipe, name: str, damage: Callable[[Path], None]
) -> None:
    checkpoint, folder = save_random_model(tmp_path / "run", recipe, kinds=KINDS), tmp_path / "universal"
    assert run("convert", checkpoint, folder, "--to", "universal", "--tp", "2")[0] == 0
    assert run("verify", folder)[0] == 0
    [path] = folder.glob(f"*/{name}")
    damage(path)
    code, out, err = run("verify", folder)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert name in err or "names global_step1_universal, which holds no" in err
