"""tools/convert_ckpt.py keeps every bit, goes on after an interruption, names damage, and overwrites nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert import file_plan as plans
from ecdit_ds.checkpoint.convert.sources import EcditSource
from ecdit_ds.checkpoint.convert.workspace import Workspace
from ecdit_ds.checkpoint.manifest import read_manifest
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.safetensors_file import TensorFile, TensorFileWriter
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.errors import CheckpointError
from ecdit_ds.inference.load import load_generator
from tests.helpers.convert_tool import Run, tool_runner
from tests.helpers.random_model import save_random_model
from tools import convert_ckpt

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")


@pytest.fixture
def recipe(tiny_recipe_file: Path) -> Recipe:
    return load_recipe(str(tiny_recipe_file), ["model.num_kv_heads=2"])


@pytest.fixture
def checkpoint(tmp_path: Path, recipe: Recipe) -> Path:
    return save_random_model(tmp_path / "run" / "checkpoints", recipe, step=3, kinds=KINDS)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return tool_runner(capsys)


@pytest.mark.parametrize("flags", [[], ["--files", "4"], ["--tp", "2"], ["--ep", "4"], ["--tp", "2", "--ep", "2"]])
def test_another_cut_of_a_checkpoint_holds_the_same_to_the_last_bit(
    run: Run, checkpoint: Path, tmp_path: Path, flags: list[str]
) -> None:
    assert run("convert", checkpoint, tmp_path / "new", "--to", "ecdit", *flags)[0] == 0
    assert run("verify", tmp_path / "new")[0] == 0
    assert run("diff", checkpoint, tmp_path / "new")[:2] == (0, "the same, to the last bit\n")
    assert dict(read_manifest(tmp_path / "new").meta) == dict(read_manifest(checkpoint).meta)
    assert not list(tmp_path.glob("*.partial"))
    before, after = Reader(checkpoint), Reader(tmp_path / "new")
    for name, stored in before.manifest.tensors.items():
        box = Box((0,) * len(stored.shape), stored.shape)
        old, new = torch.empty(stored.shape), torch.empty(stored.shape)
        before.read_into(name, box, old)
        after.read_into(name, box, new)
        assert torch.equal(old, new), name


def test_a_file_a_rank_holds_that_ranks_slices_of_experts_and_heads(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    assert run("convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--tp", "2", "--ep", "2")[0] == 0
    tensors = read_manifest(tmp_path / "new").tensors
    experts = {cut.file: cut.box for cut in tensors["weight/blocks.1.ffn.experts.w1"].slices}
    assert [experts[f"shard-{rank:05d}.safetensors"].offset for rank in range(4)] == [
        (0, 0, 0),
        (0, 0, 24),
        (2, 0, 0),
        (2, 0, 24),
    ]
    heads = {cut.file: cut.box.offset for cut in tensors["weight/blocks.0.self_attention.query.weight"].slices}
    assert heads == {"shard-00000.safetensors": (0, 0), "shard-00001.safetensors": (16, 0)}
    assert {cut.file for cut in tensors["weight/blocks.1.ffn.router.weight"].slices} == {"shard-00004.safetensors"}


@pytest.mark.parametrize(("only", "kind"), [(None, "ema"), ("weights", "weight"), ("ema", "ema")])
def test_safetensors_hold_plain_parameter_names_and_come_back_bitwise(
    run: Run, checkpoint: Path, tmp_path: Path, only: str | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_ckpt, "MAX_FILE_BYTES", 50_000)
    flags = ["--only", only] if only else []
    assert run("convert", checkpoint, tmp_path / "shared", "--to", "safetensors", *flags)[0] == 0
    index = json.loads((tmp_path / "shared" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    loaded = {name: value for file in files for name, value in load_file(tmp_path / "shared" / file).items()}
    assert loaded.keys() == index["weight_map"].keys()
    assert sum(value.nbytes for value in loaded.values()) == index["metadata"]["total_size"]
    reader = Reader(checkpoint)
    for name, value in loaded.items():
        stored = torch.empty(value.shape)
        reader.read_into(f"{kind}/{name}", Box((0,) * value.dim(), tuple(value.shape)), stored)
        assert torch.equal(value, stored)
    assert run("verify", tmp_path / "shared")[0] == 0
    assert run("convert", tmp_path / "shared", tmp_path / "back", "--to", "ecdit")[0] == 0
    assert run("diff", tmp_path / "shared", tmp_path / "back")[0] == 0
    load_generator(tmp_path / "back", kind=kind)


def test_a_cast_rounds_and_nothing_else_does(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    assert run("convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--dtype", "bf16", "--only", "weights")[0] == 0
    manifest = read_manifest(tmp_path / "new")
    exact, rounded = EcditSource(checkpoint), EcditSource(tmp_path / "new")
    assert {name.split("/")[0] for name in manifest.tensors} == {"weight"}
    for name, stored in manifest.tensors.items():
        assert stored.dtype == "bfloat16"
        box = Box((0,) * len(stored.shape), stored.shape)
        assert torch.equal(rounded.read(name, box), exact.read(name, box).bfloat16())
    code, told, _ = run("diff", checkpoint, tmp_path / "new")
    assert code == 1 and "bfloat16" in told and "only in the first" in told


def test_an_interrupted_conversion_goes_on_with_the_file_it_was_at(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    original = plans.TensorFileWriter

    class StopsAtTheThird(original):  # type: ignore[misc, valid-type]
        def __init__(self, path: Path, *rest: object) -> None:
            started.append(path.name)
            if len(started) == 3:
                raise KeyboardInterrupt
            super().__init__(path, *rest)

    monkeypatch.setattr(plans, "TensorFileWriter", StopsAtTheThird)
    command = ("convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--files", "4")
    assert run(*command)[0] == 130
    assert (tmp_path / "new.partial").is_dir() and not (tmp_path / "new").exists()
    assert run(*command)[0] == 0
    assert started == [f"shard-{i:05d}.safetensors" for i in (0, 1, 2, 2, 3)]
    assert run("diff", checkpoint, tmp_path / "new")[0] == 0
    assert not list((tmp_path / "new").glob("*.note"))


def test_a_partial_conversion_of_another_source_or_with_a_damaged_file_is_written_anew(
    run: Run, checkpoint: Path, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_publishing(_: object) -> None:
        raise KeyboardInterrupt

    command = ("convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--files", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", no_publishing)
        other = save_random_model(tmp_path / "other", recipe, step=4, kinds=("weight",))
        assert run("convert", other, *command[2:])[0] == 130
        assert run(*command)[0] == 130
    _flip(tmp_path / "new.partial" / "files" / "shard-00000.safetensors", 9)
    _flip(tmp_path / "new.partial" / "files" / "shard-00001.safetensors", -3)
    assert run(*command)[0] == 0
    assert run("diff", checkpoint, tmp_path / "new")[0] == 0


@pytest.mark.parametrize("command", ["verify", "convert", "diff"])
def test_a_flipped_bit_is_named_with_its_file_and_nothing_is_published(
    run: Run, checkpoint: Path, tmp_path: Path, command: str
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(checkpoint, whole)
    _flip(checkpoint / "shard-00000.safetensors", -5)
    rest: dict[str, list[object]] = {"convert": [tmp_path / "new", "--to", "ecdit"], "diff": [whole]}
    code, out, err = run(command, checkpoint, *rest.get(command, []))
    assert code == 2 and out == ""
    assert "shard-00000.safetensors" in err and "checksum" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["shard-00000.safetensors", "manifest.json"])
def test_a_truncated_file_is_named(run: Run, checkpoint: Path, name: str, share: float) -> None:
    path = checkpoint / name
    os.truncate(path, int(path.stat().st_size * share))
    code, out, err = run("verify", checkpoint)
    assert code == 2 and out == "" and name in err and len(err.splitlines()) == 1


def test_a_model_that_lacks_a_tensor_is_not_whole(run: Run, checkpoint: Path, recipe: Recipe, tmp_path: Path) -> None:
    assert run("verify", checkpoint)[0] == 0
    larger = load_recipe("demo", ["name=tiny"])
    meta = {"recipe": larger.to_dict(), "samples_seen": 1, "num_updates": 1}
    code, _, err = run("verify", save_random_model(tmp_path / "other", recipe, meta=meta))
    assert code == 2 and ("is missing" in err or "has shape" in err)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--to", "ecdit", "--files", "2", "--tp", "2"], "--files 2"),
        (["--to", "safetensors", "--ep", "2"], "--to safetensors"),
        (["--to", "ecdit", "--dtype", "fp16"], "add --only weights or ema"),
        (["--to", "ecdit", "--tp", "5"], "5 slices do not divide"),
        (["--to", "ecdit", "--ep", "3"], "3 slices do not divide"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(
    run: Run, checkpoint: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    code, _, err = run("convert", checkpoint, tmp_path / "new", *flags)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


def test_what_is_there_is_never_overwritten(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert "overwrites nothing" in run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")[2]
    assert "source itself" in run("convert", checkpoint, checkpoint, "--to", "ecdit")[2]
    assert "neither a checkpoint nor a run" in run("inspect", tmp_path / "nowhere")[2]


def test_inspect_takes_a_runs_newest_and_tells_what_is_in_it(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = run("inspect", tmp_path / "run")
    assert code == 0
    for part in (str(checkpoint), "step         3, 24 samples seen", "tiny", "exp_avg_sq", "float32", "4 experts"):
        assert part in out


def test_run_by_path_it_works_from_any_folder(checkpoint: Path, tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[4] / "tools" / "convert_ckpt.py"
    done = subprocess.run([sys.executable, str(tool), "verify", str(checkpoint)], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"every checksum holds" in done.stdout


def test_a_streamed_file_is_read_by_the_library_and_the_other_way_round(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4, 5),
        "b": torch.arange(7),
        "c": torch.tensor(2.5).bfloat16(),
        "d": torch.empty(0, 3),
    }
    writer = TensorFileWriter(
        tmp_path / "x.safetensors", [(k, t.dtype, tuple(t.shape)) for k, t in tensors.items()], {"format": "pt"}
    )
    for tensor in tensors.values():
        writer.append(tensor)
    assert writer.close() == (tmp_path / "x.safetensors").stat().st_size
    loaded, file = load_file(tmp_path / "x.safetensors"), TensorFile(tmp_path / "x.safetensors")
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor)
        assert torch.equal(file.read(key, Box((0,) * tensor.dim(), tuple(tensor.shape))), tensor)
    assert torch.equal(file.read("a", Box((1, 0, 2), (2, 3, 2))), tensors["a"][1:3, 0:3, 2:4])


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}',
        '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "b": '
        '{"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}',
        '{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [false, 4]}}',
        '{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 73786976294838206464]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": '
        '{"dtype": "U8", "shape": [0, 9999999999999999999], "data_offsets": [4, 4]}}',
        '{"a": 3}',
        "[]",
        "{",
        "\\xff",
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: str) -> None:
    text = header.encode("latin-1")
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: is not a whole safetensors file"):
        TensorFile(path)


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
