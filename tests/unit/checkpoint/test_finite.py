"""A checkpoint says what of it is not finite; nothing draws with it, goes on from it, or is removed for its sake."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecdit_ds.checkpoint.convert.sources import PART_BYTES, open_checkpoint_source
from ecdit_ds.checkpoint.finite import count_nonfinite, tell_nonfinite
from ecdit_ds.checkpoint.manifest import decode_manifest, encode_manifest, read_manifest
from ecdit_ds.checkpoint.naming import MANIFEST_NAME
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.reader import newest_valid
from ecdit_ds.checkpoint.retention import apply_retention
from ecdit_ds.checkpoint.writer import save_checkpoint
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import CheckpointError
from ecdit_ds.inference.load import load_generator
from tests.helpers.convert_tool import Run, save_tensors, tool_runner
from tests.helpers.random_model import random_values, save_random_model

MakeRecipe = Callable[..., Recipe]
RefusalOf = Callable[[Callable[[], object]], str]
SPOILT = "blocks.1.ffn.experts.w1"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return tool_runner(capsys)


@pytest.fixture
def save_spoilt(tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return `save_spoilt(name, kind, step=...)`: a checkpoint with one NaN and one infinity in that kind's experts."""

    def save(name: str, kind: str, step: int = 1, kinds: tuple[str, ...] = ("weight", "ema")) -> Path:
        def values(tensor: str, shape: tuple[int, ...]) -> Tensor:
            found = random_values(tensor, shape)
            if tensor == f"{kind}/{SPOILT}":
                found.view(-1)[:2] = torch.tensor([math.nan, -math.inf])
            return found

        with monkeypatch.context() as patch:
            patch.setattr("tests.helpers.random_model.random_values", values)
            return save_random_model(tmp_path / name, make_recipe(), step, kinds=kinds)

    return save


def unflag(checkpoint: Path) -> Path:
    """Make a checkpoint as the first releases wrote it."""
    (checkpoint / MANIFEST_NAME).write_bytes(encode_manifest(replace(read_manifest(checkpoint), nonfinite=None)))
    return checkpoint


def save(root: Path, step: int, value: float) -> Path:
    (folder,) = [save_tensors(root / f"made_{step}", {"weight/a": torch.tensor([1.0, value])})]
    return Path(folder.rename(root / f"step_{step}")) if step == 1 else _as_step(root, folder, step)


def _as_step(root: Path, folder: Path, step: int) -> Path:
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(replace(read_manifest(folder), step=step)))
    return folder.rename(root / f"step_{step}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_counted_wherever_they_are(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert count_nonfinite(torch.tensor([largest, -largest, 0.0], dtype=dtype)) == 0
    for place in range(3):
        for number in (math.nan, math.inf, -math.inf):
            data = torch.tensor([largest, -largest, 0.0], dtype=dtype)
            data[place] = number
            assert count_nonfinite(data) == 1
    assert count_nonfinite(torch.full((2, 3), math.nan, dtype=dtype)) == 6
    assert count_nonfinite(torch.empty((0, 3), dtype=dtype)) == 0
    assert count_nonfinite(torch.tensor([3, 4])) == 0


def test_the_names_of_many_tensors_are_told_in_a_line() -> None:
    assert tell_nonfinite({"a": 1}) == "1 numbers of 1 tensors are not finite (a)"
    many = {f"weight/{index}": 500 for index in range(58)}
    assert tell_nonfinite(many) == "29,000 numbers of 58 tensors are not finite (weight/0, weight/1, weight/2, ...)"


@pytest.mark.parametrize("place", [0, PART_BYTES // 4 - 1, PART_BYTES // 4, -1])
def test_no_number_of_a_large_tensor_is_overlooked(tmp_path: Path, place: int) -> None:
    data = torch.zeros(PART_BYTES // 4 + 5)
    data[place] = math.nan
    folder = save_tensors(tmp_path, {"weight/a": data})
    assert read_manifest(folder).nonfinite == {"weight/a": 1}


def test_checkpoints_that_are_not_finite_push_no_good_one_out_and_are_not_pushed_out(tmp_path: Path) -> None:
    good, bad = [save(tmp_path, step, 2.0) for step in (1, 2)], [save(tmp_path, step, math.nan) for step in (3, 4)]
    verified = [*good, *bad]
    for known in (verified, None):
        assert apply_retention(tmp_path, 2, verified=known) == []
    newer = save(tmp_path, 5, 2.0)
    assert apply_retention(tmp_path, 2, verified=[*verified, newer]) == [good[0]]
    assert all(folder.is_dir() for folder in (good[1], *bad, newer))


def test_the_newest_that_is_finite_is_opened_and_the_others_are_told(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 1, 2.0), save(tmp_path, 2, math.inf)
    reader, rejections = newest_valid(tmp_path)
    assert reader is not None and reader.folder == good
    assert rejections == [f"{bad}: 1 numbers of 1 tensors are not finite (weight/a); use a checkpoint from before"]


def test_a_step_whose_checkpoint_is_not_finite_can_be_saved_again_and_the_old_one_is_kept_aside(tmp_path: Path) -> None:
    bad = save(tmp_path, 2, math.nan)
    save_checkpoint(tmp_path, 2, [], {}, SoloPeers())
    assert read_manifest(bad).nonfinite == {}
    (aside,) = tmp_path.glob("step_2.damaged-*")
    assert read_manifest(aside).nonfinite == {"weight/a": 1}


def test_a_manifest_of_the_first_releases_stays_as_it_is_and_says_nothing(tmp_path: Path) -> None:
    folder = unflag(save(tmp_path, 1, math.nan))
    text = (folder / MANIFEST_NAME).read_bytes()
    manifest = read_manifest(folder)
    assert manifest.nonfinite is None and encode_manifest(manifest) == text  # whose checksum is the model's identity
    assert newest_valid(tmp_path)[0] is not None


@pytest.mark.parametrize("said", [{"weight/b": 1}, {"weight/a": 0}, {"weight/a": 1.0}, {"weight/a": True}])
def test_a_manifest_that_says_what_cannot_be_is_refused(tmp_path: Path, said: dict[str, int]) -> None:
    manifest = replace(read_manifest(save(tmp_path, 1, math.nan)), nonfinite=said)
    with pytest.raises(CheckpointError, match="nonfinite is"):
        decode_manifest(encode_manifest(manifest), tmp_path / MANIFEST_NAME)


@pytest.mark.parametrize("kind", ["weight", "exp_avg_sq"])
def test_inspect_verify_and_convert_name_what_is_not_finite(
    run: Run, save_spoilt: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    told = f"2 numbers of 1 tensors are not finite ({kind}/{SPOILT})"
    made = save_spoilt("run", kind, kinds=("weight", "ema", "exp_avg", "exp_avg_sq"))
    code, out, _ = run("convert", made, tmp_path / "one", "--to", "ecdit")
    assert code == 0 and f"note: {told}" in out
    assert run("convert", unflag(made), tmp_path / "two", "--to", "universal")[0] == 0
    for folder, says in ((tmp_path / "one", told), (made, "does not say"), (tmp_path / "two", told)):
        code, out, _ = run("inspect", folder)
        assert code == 0 and f"finite       {says}" in out
        code, out, err = run("verify", folder)
        assert (code, out) == (2, "") and told in err and len(err.splitlines()) == 1


def test_what_is_finite_is_said_to_be_so(run: Run, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    made = save_random_model(tmp_path / "run", make_recipe())
    assert read_manifest(made).nonfinite == {}
    assert "finite       all numbers are" in run("inspect", made)[1]
    assert run("verify", made)[0] == 0
    code, out, _ = run("convert", made, tmp_path / "shared", "--to", "safetensors", "--dtype", "bf16")
    assert code == 0 and "note:" not in out
    assert open_checkpoint_source(tmp_path / "shared").nonfinite == {}


def test_a_flag_that_is_not_true_is_found(run: Run, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    made = save_random_model(tmp_path / "run", make_recipe())
    said = replace(read_manifest(made), nonfinite={f"ema/{SPOILT}": 3})
    (made / MANIFEST_NAME).write_bytes(encode_manifest(said))
    code, _, err = run("verify", made)
    assert code == 2 and f"says that 3 numbers of 1 tensors are not finite (ema/{SPOILT}), but all are" in err


@pytest.mark.parametrize("is_flagged", [True, False])
def test_weights_that_are_not_finite_are_not_loaded(
    save_spoilt: Callable[..., Path], run: Run, tmp_path: Path, refusal_of: RefusalOf, is_flagged: bool
) -> None:
    made = save_spoilt("run", "ema")
    assert run("convert", made, tmp_path / "shared", "--to", "safetensors")[0] == 0
    if not is_flagged:
        unflag(made)
        config = tmp_path / "shared" / "config.json"
        config.write_text(config.read_text().replace('"nonfinite"', '"other"'))
    for folder in (made, tmp_path / "shared"):
        message = refusal_of(lambda folder=folder: load_generator(folder))  # type: ignore[misc]
        assert f"{folder}: " in message and f"ema/{SPOILT}" in message and "not finite" in message
    assert load_generator(made, kind="weight").model is not None  # which are
    other = save_spoilt("other", "weight")
    assert load_generator(other).model is not None  # the average is
    assert "weight/" in refusal_of(lambda: load_generator(other, kind="weight"))


def test_a_run_draws_with_its_newest_finite_checkpoint(
    save_spoilt: Callable[..., Path], tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random_model(tmp_path / "run", make_recipe("train.max_steps=3"))
    save_spoilt("run", "ema", step=2)
    assert load_generator(tmp_path / "run").recipe.train.max_steps == 3
    assert f"skipped {tmp_path / 'run' / 'step_2'}: 2 numbers of 1 tensors" in capsys.readouterr().out


def test_weights_that_overflow_the_type_they_are_loaded_as_are_named(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, refusal_of: RefusalOf
) -> None:
    def values(name: str, shape: tuple[int, ...]) -> Tensor:
        return random_values(name, shape) * (1e6 if name == f"ema/{SPOILT}" else 1.0)

    monkeypatch.setattr("tests.helpers.random_model.random_values", values)
    made = save_random_model(tmp_path, make_recipe())
    assert f"numbers of ema/{SPOILT} are not finite as torch.float16" in refusal_of(
        lambda: load_generator(made, dtype=torch.float16)
    )
    load_generator(made, dtype=torch.bfloat16)
