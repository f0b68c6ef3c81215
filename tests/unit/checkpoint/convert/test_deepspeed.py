"""Universal Checkpoints and ZeRO folders: bitwise both ways, restartable, and every surprise is one line.

That DeepSpeed itself reads and writes such folders is tested in tests/parity/test_universal.py.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # an engine's first use imports it, for seconds
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert import pt_file as torch_files
from ecdit_ds.checkpoint.convert import universal_writer
from ecdit_ds.checkpoint.convert import workspace as partial
from ecdit_ds.checkpoint.convert.sources import EcditSource
from ecdit_ds.checkpoint.manifest import read_manifest
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.model.init import empty_model
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.parallel.setup import initialize_distributed
from ecdit_ds.parallel.world import rank_info_from_env
from tests.conftest import TINY_RECIPE
from tests.helpers.convert_tool import Run, tool_runner
from tests.helpers.forked import in_a_copy
from tests.helpers.random_model import save_random_model
from tools import convert_ckpt

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")


SETS = ["model.num_kv_heads=2", "model.num_layers=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `tiny.yaml`, a checkpoint in `run/`, and the Universal Checkpoint of it in `universal/`."""
    root = tmp_path_factory.mktemp("made")
    (root / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    recipe = load_recipe(str(root / "tiny.yaml"), SETS)
    meta = {"recipe": recipe.to_dict(), "samples_seen": 24, "num_updates": 2}
    checkpoint = save_random_model(root / "run" / "checkpoints", recipe, step=3, meta=meta, kinds=KINDS)
    assert convert_ckpt.main(["convert", str(checkpoint), str(root / "universal"), "--to", "universal"]) == 0
    return root


@pytest.fixture
def recipe(made: Path) -> Recipe:
    return load_recipe(str(made / "tiny.yaml"), SETS)


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_3"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return tool_runner(capsys)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return the tag's folder of a Universal Checkpoint of `checkpoint`."""
    shutil.copytree(made / "universal", tmp_path / "universal")
    return tmp_path / "universal" / "global_step3_universal"


@pytest.fixture
def given(made: Path) -> list[str]:
    """Return the flags that name the recipe."""
    return ["--config", str(made / "tiny.yaml"), *(part for field in SETS for part in ("--set", field))]


def test_a_universal_folder_and_back_is_the_same_to_the_last_bit(
    run: Run, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    assert run("diff", checkpoint, folder)[:2] == (0, "the same, to the last bit\n")
    assert run("verify", folder.parent)[1].endswith("every checksum holds\n")
    assert "step         3, 24 samples seen" in run("inspect", folder)[1]
    assert run("convert", folder.parent, tmp_path / "back", "--to", "ecdit", "--files", "3")[0] == 0
    assert run("diff", checkpoint, tmp_path / "back")[0] == 0
    assert dict(read_manifest(tmp_path / "back").meta) == dict(read_manifest(checkpoint).meta)
    assert not list(tmp_path.rglob("*.note")) and not list(tmp_path.rglob("*.partial"))


def test_the_folder_holds_what_the_loader_asks_for(run: Run, checkpoint: Path, tmp_path: Path, recipe: Recipe) -> None:
    assert run("convert", checkpoint, tmp_path / "two", "--to", "universal", "--tp", "2")[0] == 0
    tag = tmp_path / "two" / (tmp_path / "two" / "latest_universal").read_text()
    states = sorted(path.name for path in tag.glob("*_model_states.pt"))
    assert states == [f"{zero}mp_rank_0{rank}_model_states.pt" for zero in ("", "zero_pp_rank_0_") for rank in (0, 1)]
    expert = torch.load(tag / "zero" / "blocks.1.ffn.experts.w1" / "exp_avg.pt", weights_only=True)
    shape = (recipe.model.num_experts, recipe.model.hidden_size, recipe.model.ffn_hidden_size)
    assert (expert["cat_dim"], expert["is_expert_param"], expert["ep_num_experts"]) == (2, True, 4)
    assert tuple(expert["param"].shape) == shape
    assert "cat_dim" not in torch.load(tag / "zero" / "final.linear.weight" / "fp32.pt", weights_only=True)
    step = torch.load(tag / "zero" / "final.linear.weight" / "step.pt", weights_only=True)
    assert step.dtype == torch.float32 and float(step) == 2.0
    counts = torch.load(tag / states[0], weights_only=True)
    assert (counts["global_steps"], counts["skipped_steps"], counts["mp_world_size"]) == (3, 1, 2)


def test_an_interrupted_conversion_keeps_what_is_finished(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    original = universal_writer.write_torch_file

    def stops_at_the_fifth(path: Path, content: Any) -> int:
        if len(written) == 4:
            written.append(path)
            raise KeyboardInterrupt
        written.append(path)
        return original(path, content)

    monkeypatch.setattr(universal_writer, "write_torch_file", stops_at_the_fifth)
    command = ("convert", checkpoint, tmp_path / "new", "--to", "universal")
    assert run(*command)[::2] == (130, "interrupted; the same command goes on from there\n")
    assert not (tmp_path / "new").exists()
    assert run(*command)[0] == 0
    assert [path for path in set(written) if written.count(path) > 1] == [written[4]]
    assert run("diff", checkpoint, tmp_path / "new")[0] == 0


def test_a_partial_conversion_of_another_source_or_with_a_damaged_file_is_written_anew(
    run: Run, checkpoint: Path, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_publishing(_: object) -> None:
        raise KeyboardInterrupt

    command = ("convert", checkpoint, tmp_path / "new", "--to", "universal")
    files = tmp_path / "new.partial" / "files"
    with monkeypatch.context() as patch:
        patch.setattr(partial.Workspace, "publish", no_publishing)
        other = save_random_model(tmp_path / "other", recipe, step=7, kinds=KINDS)
        assert run("convert", other, *command[2:])[0] == 130
        assert [path.name for path in files.glob("global_step*")] == ["global_step7_universal"]
        assert run(*command)[0] == 130
    assert [path.name for path in files.glob("global_step*")] == ["global_step3_universal"]
    (damaged,) = files.rglob("blocks.1.ffn.experts.w1/exp_avg.pt")
    _flip(damaged, damaged.stat().st_size // 2)
    unmarked = damaged.with_name("exp_avg_sq.pt")
    content = torch.load(unmarked, weights_only=True)
    torch.save({"param": content["param"]}, unmarked)
    assert run(*command)[0] == 0
    assert run("diff", checkpoint, tmp_path / "new")[0] == 0
    (marked,) = (tmp_path / "new").rglob("blocks.1.ffn.experts.w1/exp_avg_sq.pt")
    assert "cat_dim" in torch.load(marked, weights_only=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other", "run"]


@pytest.mark.parametrize(
    "foreign",
    [
        "letter.txt",
        "files/letter.txt",
        "files/global_step3_universal/letter.txt",
        "files/letters/",
        "files/global_step3_universal/zero/a/b/",
        "files/global_step3_universal/zero/a/letter.txt",
        "files/latest_universal/",
        "global_step3_universal~zero~a~letter.txt.note",
    ],
)
def test_what_no_conversion_made_is_left_alone(run: Run, checkpoint: Path, tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "new.partial" / foreign
    path.parent.mkdir(parents=True)
    (tmp_path / "new.partial" / "lock").touch()
    path.mkdir() if foreign.endswith("/") else path.write_text("dear")
    code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "universal")
    assert code == 2 and "which is no conversion's; move the folder away" in err and len(err.splitlines()) == 1
    assert path.is_dir() or path.read_text() == "dear"


@pytest.mark.parametrize("planted", ["", "/zero", "/zero/final.linear.bias"])
def test_a_planted_link_to_a_folder_is_refused_and_nothing_is_written_through_it(
    run: Run, checkpoint: Path, tmp_path: Path, planted: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "fp32.pt").write_text("mine")
    link = tmp_path / "new.partial" / "files" / f"global_step3_universal{planted}"
    link.parent.mkdir(parents=True)
    (tmp_path / "new.partial" / "lock").touch()
    link.symlink_to(victim)
    code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "universal")
    assert code == 2 and "which is no conversion's" in err and len(err.splitlines()) == 1
    assert [path.name for path in victim.iterdir()] == ["fp32.pt"] and (victim / "fp32.pt").read_text() == "mine"


def test_a_planted_link_to_a_file_is_replaced(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, tag = tmp_path / "victim", tmp_path / "new.partial" / "files" / "global_step3_universal"
    victim.write_text("mine")
    (tag / "zero" / "final.linear.bias").mkdir(parents=True)
    (tmp_path / "new.partial" / "lock").touch()
    links = [tag / "zero" / "final.linear.bias" / "fp32.pt", tag / "ecdit_ds.json", tag.parent / "latest_universal"]
    for link in (*links, tmp_path / "new.partial" / "global_step3_universal~zero~final.linear.bias~fp32.pt.note"):
        link.symlink_to(victim)
    assert run("convert", checkpoint, tmp_path / "new", "--to", "universal")[0] == 0
    assert victim.read_text() == "mine" and not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
    assert run("diff", checkpoint, tmp_path / "new")[0] == 0


def test_a_full_disk_is_told_with_numbers_or_by_its_name(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("convert", checkpoint, tmp_path / "new", "--to", "universal")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        assert "bytes needed" in run(*command)[2]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch_files, "write_all", full)
        code, _, err = run(*command)
    assert code == 2 and "No space left on device; make room" in err and len(err.splitlines()) == 1
    assert run(*command)[0] == 0


@pytest.mark.parametrize("command", ["verify", "convert"])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing", "all missing", "counts", "step"])
def test_damage_is_named_with_its_file_and_nothing_is_published(
    run: Run, folder: Path, tmp_path: Path, command: str, fault: str
) -> None:
    path = folder / "zero" / "blocks.1.ffn.experts.w2" / "exp_avg_sq.pt"
    if fault == "flipped":
        _flip(path, path.stat().st_size // 2)
    elif fault == "counts":
        path = folder / "ecdit_ds.json"
        path.write_text(path.read_text().replace('"samples_seen": 24', '"samples_seen": 25'))
    elif fault == "step":
        path = folder / "zero" / "blocks.1.ffn.experts.w2" / "step.pt"
        torch.save(torch.tensor(3.0), path)
    elif fault == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif fault == "all missing":
        path = path.with_name("ema.pt")
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    code, out, err = run(command, folder, *([tmp_path / "new", "--to", "ecdit"] if command == "convert" else []))
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert str(path) in err
    assert not (tmp_path / "new").exists()


def test_a_foreign_universal_folder_needs_the_recipe_and_reads_flat_tensors(
    run: Run, checkpoint: Path, folder: Path, given: list[str], tmp_path: Path
) -> None:
    assert "leave the flag away" in run("inspect", folder, *given)[2]
    (folder / "ecdit_ds.json").unlink()
    assert "--config" in run("inspect", folder)[2]
    path = folder / "zero" / "blocks.1.ffn.experts.w2" / "fp32.pt"
    torch.save(torch.load(path, weights_only=True)["param"].flatten(), path)  # as ds_to_universal does of ZeRO-3
    assert run("diff", folder, checkpoint, *given)[:2] == (0, "the same, to the last bit\n")
    assert run("convert", folder, tmp_path / "back", "--to", "ecdit", *given)[0] == 0
    assert run("diff", checkpoint, tmp_path / "back")[:2] == (0, "the same, to the last bit\n")
    meta = read_manifest(tmp_path / "back").meta
    assert (meta["num_updates"], meta["samples_seen"]) == (2, 24)
    code, _, err = run("verify", folder, "--config", "demo")
    assert code == 2 and len(err.splitlines()) == 1 and "right recipe" in err


@pytest.mark.parametrize("tag", ["..", "../run", "/tmp", "", "zero/x", "nowhere", "."])
@pytest.mark.parametrize("latest", ["latest", "latest_universal"])
def test_a_tag_leads_nowhere_else(run: Run, folder: Path, tag: str, latest: str) -> None:
    (folder.parent / "latest_universal").unlink()
    (folder.parent / latest).write_text(tag)
    code, out, err = run("inspect", folder.parent)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and latest in err


def test_a_folder_that_lacks_a_parameter_is_refused(run: Run, folder: Path, given: list[str]) -> None:
    (folder / "ecdit_ds.json").unlink()
    shutil.rmtree(folder / "zero" / "final.linear.bias")
    assert "has no final.linear.bias" in run("inspect", folder, *given)[2]


def test_names_that_would_leave_the_folder_are_refused(run: Run, tmp_path: Path, recipe: Recipe) -> None:
    kinds = (*KINDS, "exp_avg/../../../outside")
    checkpoint = save_random_model(tmp_path / "run", recipe, kinds=kinds)
    code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "universal")
    assert code == 2 and "cannot be the name" in err
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--to", "universal", "--dtype", "bf16"], "--to universal"),
        (["--to", "universal", "--only", "ema"], "--to universal"),
        (["--to", "universal", "--ep", "2"], "--to universal"),
        (["--to", "universal", "--ema-from-weights"], "--to ecdit"),
        (["--to", "safetensors", "--upcycle", "demo"], "--to ecdit"),
        (["--to", "ecdit", "--set", "model.num_experts=2"], "--config or --upcycle"),
        (["--to", "ecdit", "--config", "demo"], "leave the flag away"),
        (["--to", "ecdit", "--ema-from-weights"], "holds an ema already"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(
    run: Run, checkpoint: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    code, _, err = run("convert", checkpoint, tmp_path / "new", *flags)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


@pytest.mark.parametrize("tp", ["3", "1000000000000000"])
def test_more_ranks_than_there_is_to_cut_are_refused_at_once(
    run: Run, checkpoint: Path, tmp_path: Path, tp: str
) -> None:
    code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "universal", "--tp", tp)
    assert code == 2 and f"{tp} slices do not divide" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new.partial").exists()


def test_a_source_that_fails_is_blamed(
    run: Run, checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> Any:
        raise OSError(5, "Input/output error", "/far/away")

    monkeypatch.setattr(torch_files.TorchFile, "read", fails)
    commands = (["verify", folder], ["diff", folder, folder], ["convert", folder, tmp_path / "new", "--to", "ecdit"])
    with monkeypatch.context() as patch:
        patch.setattr("ecdit_ds.checkpoint.convert.universal._num_updates", lambda *_: 2)
        for command in commands:
            code, _, err = run(*command)
            assert code == 2 and "/far/away: cannot be read: Input/output error" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_parts_cut_along_any_axis_read_little_and_are_the_same(
    run: Run, checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecdit_ds.checkpoint.convert.sources.PART_BYTES", 100)
    monkeypatch.setattr("ecdit_ds.checkpoint.file_ranges.CHUNK_BYTES", 64)
    assert run("convert", folder, tmp_path / "back", "--to", "ecdit", "--tp", "2", "--ep", "2")[0] == 0
    assert run("diff", checkpoint, tmp_path / "back")[0] == 0
    assert run("convert", checkpoint, tmp_path / "again", "--to", "universal")[0] == 0
    assert run("diff", folder, tmp_path / "again")[0] == 0


def test_weights_alone_make_no_universal_checkpoint(run: Run, tmp_path: Path, recipe: Recipe) -> None:
    checkpoint = save_random_model(tmp_path / "run", recipe)
    assert "holds no exp_avg" in run("convert", checkpoint, tmp_path / "new", "--to", "universal")[2]


def test_a_malicious_zero_folder_runs_nothing(run: Run, tmp_path: Path, given: list[str]) -> None:
    class Writes:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path / 'marker'}",))

    torch.save({"param_shapes": Writes()}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    code, _, err = run("inspect", tmp_path, *given)
    assert code == 2 and "mp_rank_00_model_states.pt" in err and "nothing of it was run" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda zero: zero.pop("param_slice_mappings"), "KeyError"),
        (lambda zero: zero["param_slice_mappings"].append({}), "ValueError"),
        (lambda zero: zero.update(single_partition_of_fp32_groups=[torch.zeros(3)]), "is not in the recipe's model"),
        (lambda zero: zero["base_optimizer_state"].update(param_groups=[{}]), "KeyError"),
        (lambda zero: _group_of(zero).update(moe=True, name="ep_size_1000000000000"), "expert-parallel among 1"),
        (lambda zero: zero["base_optimizer_state"].update(state={0: {"step": float("inf")}}), "how many steps"),
    ],
)
def test_a_zero_folder_of_another_make_is_one_line(
    run: Run, tmp_path: Path, given: list[str], change: Callable[[dict[str, Any]], object], said: str
) -> None:
    base = {"state": {}, "param_groups": [{"params": [0]}]}
    zero = {"single_partition_of_fp32_groups": [torch.zeros(3)], "base_optimizer_state": base}
    zero["param_slice_mappings"] = [{}]
    change(zero)
    torch.save({"optimizer_state_dict": zero}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    counts = {"dp_world_size": 1, "mp_world_size": 1, "skipped_steps": 0, "param_shapes": [{"x": torch.Size([3])}]}
    torch.save(counts, tmp_path / "mp_rank_00_model_states.pt")
    code, _, err = run("inspect", tmp_path, *given)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def _group_of(zero: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = zero["base_optimizer_state"]["param_groups"][0]
    return group


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_plain_script_whose_model_marks_no_experts_goes_on_from_an_unmarked_folder(
    run: Run, checkpoint: Path, tmp_path: Path, recipe: Recipe, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("convert", checkpoint, tmp_path / "plain", "--to", "universal", "--unmarked-experts")[0] == 0
    source = EcditSource(checkpoint)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def command() -> int:
        rank_info_from_env()
        initialize_distributed()
        model = empty_model(recipe.model, SerialLayers(), torch.device("cpu"))
        assert not any(hasattr(parameter, "group_name") for parameter in model.parameters())
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "checkpoint": {"load_universal": True},
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        path, counts = engine.load_checkpoint(str(tmp_path / "plain"))
        assert path is not None and counts["samples_seen"] == 24
        for name, parameter in model.named_parameters():
            _, shape = source.tensors[f"weight/{name}"]
            stored = source.read(f"weight/{name}", Box((0,) * len(shape), shape))
            assert torch.equal(safe_get_full_fp32_param(parameter).view(shape), stored), name
            for kind in ("exp_avg", "exp_avg_sq"):
                moment = safe_get_full_optimizer_state(parameter, kind)
                assert torch.equal(moment.view(shape), source.read(f"{kind}/{name}", Box((0,) * len(shape), shape)))
        return 0

    code, out, err = in_a_copy(command)
    assert code == 0, out + err


def test_unmarked_experts_are_for_universal_folders_alone(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, _, err = run("convert", checkpoint, tmp_path / "other", "--to", "ecdit", "--unmarked-experts")
    assert code == 2 and "--unmarked-experts: has no effect with --to ecdit" in err
