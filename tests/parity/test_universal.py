"""DeepSpeed's own loader goes on from a converted checkpoint as our own does, and its own save comes back bitwise.

Every case runs on real processes over gloo, forked from one that has imported everything.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.sources import EcditSource
from ecdit_ds.config.yaml_loader import load_recipe
from tests.helpers.launch import Planned, run_plan
from tests.helpers.random_model import save_random_model
from tests.helpers.recipes import SMALL_MODEL
from tools import convert_ckpt

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
SETS = [*SMALL_MODEL, "optimizer.gradient_clipping=0.2"]
RECIPE = ["--config", "demo", *(part for field in SETS for part in ("--set", field))]
DENSE = ["model.ffn=dense", "train.precision=bf16"]
DENSE_RECIPE = [*RECIPE, *(part for field in DENSE for part in ("--set", field))]
LAYOUTS = {
    "serial": (1, 1, 1),
    "dp2": (2, 1, 1),
    "ep2": (2, 1, 2),
    "tp2": (2, 2, 1),
    "tp2xep2": (4, 2, 2),
    "ep2xdp2": (4, 1, 2),
}
"""Name -> (ranks, tp, ep)."""
CASES = [
    ("serial", 1, 2),
    ("serial", 2, 1),
    ("serial", 3, 2),
    ("dp2", 1, 1),
    ("ep2", 2, 1),
    ("ep2", 3, 1),
    ("tp2", 2, 2),
    ("tp2xep2", 1, 1),
    ("tp2xep2", 3, 2),
    ("ep2xdp2", 2, 1),
]
"""Layout, ZeRO stage, and for how many tensor-parallel ranks the folder was written, which does not matter."""
SAVED = [(name, stage) for name, stage, _ in CASES if stage < 3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert one random checkpoint, and let every layout load it in both ways, train, and save in both ways."""
    root = tmp_path_factory.mktemp("universal")
    recipe = load_recipe("demo", SETS)
    meta = {"recipe": recipe.to_dict(), "samples_seen": 40, "num_updates": 4}
    start = save_random_model(root / "start", recipe, step=5, meta=meta, kinds=KINDS)
    assert convert("convert", start, root / "universal_1", "--to", "universal") == 0
    assert convert("convert", start, root / "universal_2", "--to", "universal", "--tp", "2") == 0
    jobs = [
        _job(root, f"{name}_{stage}", name, stage, start, root / f"universal_{files}") for name, stage, files in CASES
    ]
    saved = root / "ep2_2"
    conversion = ["convert", saved / "native", root / "made", "--to", "ecdit", "--ema-from-weights", *RECIPE]
    on = [_job(root, f"on_{of.name}", "serial", 2, of) for of in (saved / "ours" / "step_8", root / "made")]
    dense = save_random_model(root / "dense", load_recipe("demo", [*SETS, *DENSE]), step=5, kinds=KINDS)
    jobs += [_job(root, f"dense_{stage}", "dp2", stage, dense, more=DENSE) for stage in (2, 3)]
    conversions = [planned(1, {"convert": [*map(str, conversion)]})] + [
        planned(
            1, {"ds_to_universal": [str(root / f"dense_{stage}" / part) for part in ("native/global_step3", "theirs")]}
        )
        for stage in (2, 3)
    ]
    run_plan(root, "deepspeed_checkpoints.py", [jobs, conversions, on])
    return root


def _job(
    root: Path,
    folder: str,
    name: str,
    stage: int,
    start: Path,
    universal: Path | None = None,
    more: Sequence[str] = (),
) -> Planned:
    (ranks, tp, ep), output = LAYOUTS[name], root / folder
    output.mkdir()
    sets = [*SETS, f"parallel.tp={tp}", f"parallel.ep={ep}", *more]
    job = {"recipe": ["demo", sets], "zero": stage, "ours": str(start), "output": str(output)}
    return planned(ranks, job | ({"universal": str(universal)} if universal else {}))


def planned(ranks: int, job: dict[str, Any]) -> Planned:
    """Return a job for `deepspeed_checkpoints.run_job`."""
    return Planned(ranks, [json.dumps(job)])


def convert(*arguments: object) -> int:
    """Run the converter."""
    return convert_ckpt.main([str(argument) for argument in arguments])


def of_ranks(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Return what every rank wrote down."""
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stage, _ in CASES])
def test_deepspeed_loads_what_we_load_and_trains_on_alike(runs: Path, name: str, stage: int) -> None:
    for seen in of_ranks(runs / f"{name}_{stage}", LAYOUTS[name][0]):
        assert seen["compared"] > 20 and seen["unequal"] == []
        assert seen["theirs"] == pytest.approx(seen["ours"], rel=1e-6)
        assert len(set(seen["ours"])) == 3
        assert seen["client_state"]["samples_seen"] == 40


def test_one_folder_serves_all_layouts_and_none_of_their_losses_is_chance(runs: Path) -> None:
    courses = [
        [sum(losses) / len(losses) for losses in zip(*(seen["theirs"] for seen in ranks), strict=True)]
        for ranks in (of_ranks(runs / f"{name}_{stage}", LAYOUTS[name][0]) for name, stage, _ in CASES)
    ]
    for course in courses[1:]:
        assert course == pytest.approx(courses[0], rel=1e-5)


@pytest.mark.parametrize(("name", "stage"), SAVED)
def test_what_deepspeed_saved_comes_back_bitwise(
    runs: Path, tmp_path: Path, name: str, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, made = runs / f"{name}_{stage}", tmp_path / "made"
    assert convert("convert", saved / "native", made, "--to", "ecdit", *RECIPE) == 0
    assert "no average" in capsys.readouterr().out
    assert convert("verify", made) == 2 and "but no ema" in capsys.readouterr().err
    assert convert("convert", saved / "native", tmp_path / "universal", "--to", "universal", *RECIPE) == 0
    assert convert("diff", made, tmp_path / "universal") == 0
    _assert_holds_the_same(saved / "ours" / "step_8", made)


def _assert_holds_the_same(expected: Path, made: Path) -> None:
    """Compare a checkpoint made of a folder of DeepSpeed's, which has no average, with ours of the same moment."""
    ours, theirs = EcditSource(expected), EcditSource(made)
    assert theirs.step == ours.step == 8
    assert all(theirs.meta[name] == ours.meta[name] for name in ("samples_seen", "num_updates"))
    assert {kind.split("/")[0] for kind in theirs.tensors} == set(KINDS) - {"ema"}
    for tensor, (dtype, shape) in theirs.tensors.items():
        whole = Box((0,) * len(shape), shape)
        assert ours.tensors[tensor] == (dtype, shape)
        assert torch.equal(ours.read(tensor, whole), theirs.read(tensor, whole)), tensor


@pytest.mark.parametrize(("stage", "folder"), [(2, "theirs"), (3, "theirs"), (2, "native")])
def test_a_bf16_run_is_read_with_its_fp32_weights_and_so_is_what_deepspeeds_own_tool_made_of_it(
    runs: Path, tmp_path: Path, stage: int, folder: str
) -> None:
    saved, made = runs / f"dense_{stage}", tmp_path / "made"
    assert convert("convert", saved / folder, made, "--to", "ecdit", *DENSE_RECIPE) == 0
    _assert_holds_the_same(saved / "ours" / "step_8", made)


def test_training_goes_on_from_what_deepspeed_saved_as_from_what_we_saved(runs: Path) -> None:
    ours, theirs = (of_ranks(runs / name, 1) for name in ("on_step_8", "on_made"))
    assert [seen["ours"] for seen in theirs] == [seen["ours"] for seen in ours]


@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing", "surplus", "drifted"])
def test_what_is_wrong_with_a_folder_of_deepspeeds_is_named(
    runs: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "native"
    shutil.copytree(runs / "tp2_2" / "native", folder)
    (path,) = folder.rglob("zero_pp_rank_0_mp_rank_01_optim_states.pt")
    said = path.name
    if fault == "missing":
        path.unlink()
        said = "data-parallel rank 0 of 1, tensor-parallel rank 1 of 2 is missing"
    elif fault == "surplus":
        surplus = path.with_name("zero_pp_rank_1_mp_rank_01_optim_states.pt")
        shutil.copy(path, surplus)
        said = f"{surplus.name}: is of a rank that"
    elif fault == "drifted":
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"]["single_partition_of_fp32_groups"][1].data[7] += 1e-6
        torch.save(content, path)
        said = "differs between tensor-parallel ranks 0 and 1"
    else:
        data = path.read_bytes()
        half = len(data) // 2
        path.write_bytes(data[:half] + (b"" if fault == "truncated" else bytes([data[half] ^ 1]) + data[half + 1 :]))
    assert convert("convert", folder, tmp_path / "made", "--to", "ecdit", *RECIPE) == 2
    err = capsys.readouterr().err.splitlines()
    assert said in err[-1] and not (tmp_path / "made").exists()


def test_a_zero_3_folder_is_refused_with_the_way_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("inspect", runs / "dense_3" / "native", *DENSE_RECIPE) == 2
    assert "ds_to_universal" in capsys.readouterr().err
