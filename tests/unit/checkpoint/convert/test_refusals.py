"""tools/convert_ckpt.py refuses, in one line and before it publishes anything, what cannot be or would lose numbers."""

import json
import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert import sources
from ecdit_ds.checkpoint.convert.sources import EcditSource, split_box
from ecdit_ds.checkpoint.manifest import Manifest, StoredSlice, StoredTensor, encode_manifest, read_manifest
from ecdit_ds.checkpoint.reader import Reader
from tests.helpers.convert_tool import Run, save_shared, save_tensors, tool_runner

SOURCE_READ = "ecdit_ds.checkpoint.convert.sources.EcditSource.read"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return tool_runner(capsys)


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Return `refused(argument, ...)`: runs what must fail with one line and publish nothing, and gives the line."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1, (code, out, err)
        assert not os.path.lexists(tmp_path / "new") and not os.path.lexists(tmp_path / "new.partial")
        return err

    return call


# Casts


@pytest.mark.parametrize(
    ("flag", "dtype", "numbers", "count", "largest"),
    [
        ("fp16", torch.float32, [1.0, 70000.0, -1e9, math.inf, math.nan], 2, "1e+09"),
        ("bf16", torch.float32, [1.0, torch.finfo(torch.float32).max], 1, "3.40282e+38"),
        ("fp32", torch.float64, [1e39, -1e38], 1, "1e+39"),
        ("fp16", torch.bfloat16, [-65536.0, 1.0], 1, "65536"),
    ],
)
def test_a_cast_that_would_make_a_number_infinite_is_refused(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    dtype: torch.dtype,
    numbers: list[float],
    count: int,
    largest: str,
) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", 8)
    checkpoint = save_tensors(tmp_path, {"weight/a": torch.ones(3), "weight/b": torch.tensor(numbers, dtype=dtype)})
    code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--only", "weights", "--dtype", flag)
    assert code == 2 and not (tmp_path / "new").exists()
    assert f"weight/b: {count} numbers would become infinite" in err and f"the largest is {largest};" in err


def test_a_cast_keeps_infinity_nan_and_the_largest_number_that_fits(run: Run, tmp_path: Path) -> None:
    numbers = torch.tensor([math.inf, -math.inf, math.nan, 65504.0, -65504.0, 1e-30])
    command = ("--to", "ecdit", "--only", "weights", "--dtype", "fp16")
    assert run("convert", save_tensors(tmp_path, {"weight/a": numbers}), tmp_path / "new", *command)[0] == 0
    cast = EcditSource(tmp_path / "new").read("weight/a", Box((0,), (6,)))
    assert torch.equal(cast.nan_to_num(1.0), numbers.half().nan_to_num(1.0)) and cast.isnan().sum() == 1


# Differences


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), "1 of 2 numbers differ, in bits that are no distance"),
        (torch.tensor([2**53, 7]), torch.tensor([2**53 + 1, 7]), "1 of 2 numbers differ, by up to 1"),
        (torch.tensor([-(2**63), 0]), torch.tensor([2**63 - 1, 0]), "1 of 2 numbers differ, by up to 1.84467e+19"),
        (torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.5]), "2 of 2 numbers differ, by up to 0.5"),
        (torch.tensor([math.inf, 1.0]), torch.tensor([1.0, 1.0]), "1 of 2 numbers differ, in bits"),
        (torch.tensor([True, False]), torch.tensor([True, True]), "1 of 2 numbers differ, by up to 1"),
        (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0]).bfloat16(), "torch.float32 and torch.bfloat16"),
        (torch.tensor([2**53 + 1, 1]), torch.tensor([3, 1], dtype=torch.int32), "1 of 2 numbers differ"),
    ],
)
def test_what_differs_is_counted_by_bits_and_measured_where_it_can_be(
    run: Run, tmp_path: Path, ours: Tensor, theirs: Tensor, told: str
) -> None:
    first, second = (save_tensors(tmp_path / side, {"weight/a": data}) for side, data in (("1", ours), ("2", theirs)))
    code, out, _ = run("diff", first, second)
    assert code == 1 and told in out
    assert run("diff", first, first)[:2] == (0, "the same, to the last bit\n")
    assert "differ, " not in out or ours.dtype != torch.float32 or theirs.dtype == torch.float32


def test_tensors_without_numbers_are_compared_and_come_back(run: Run, tmp_path: Path) -> None:
    tensors = {"weight/a": torch.ones(2), "weight/none": torch.empty(0, 3), "weight/wide": torch.empty(2**50, 0)}
    checkpoint = save_tensors(tmp_path, tensors)
    assert run("convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--files", "3")[0] == 0
    assert run("diff", checkpoint, tmp_path / "new")[0] == 0
    assert run("convert", tmp_path / "new", tmp_path / "s", "--to", "safetensors", "--only", "weights")[0] == 0
    assert run("diff", checkpoint, tmp_path / "s")[0] == 0
    assert list(split_box(Box((0, 0), (2**50, 0)), 4)) == []


# Parts and boxes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (1, 1, 9), (2, 1, 3, 5)])
def test_parts_follow_one_another_and_none_is_larger_than_asked(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", 12)
    data = torch.arange(math.prod(shape)).reshape(shape)
    offset = tuple(range(10, 10 + len(shape)))
    parts = list(split_box(Box(offset, shape), 4))
    assert all(part.numel * 4 <= 12 for part in parts)
    assert torch.equal(torch.cat([data[part.within(offset)].flatten() for part in parts]), data.flatten())


def test_any_cut_of_the_source_converts_to_any_other(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", 100)
    monkeypatch.setattr("ecdit_ds.checkpoint.file_ranges.CHUNK_BYTES", 64)
    name = "weight/blocks.0.ffn.experts.w1"
    data = torch.randn(4, 6, 8)
    ragged = [
        Box((0, 0, 0), (1, 6, 8)),
        Box((1, 0, 0), (3, 2, 5)),
        Box((1, 0, 5), (3, 2, 3)),
        Box((1, 2, 0), (1, 1, 8)),
        Box((1, 3, 0), (1, 3, 8)),
        Box((2, 2, 0), (2, 4, 8)),
    ]
    checkpoint = save_tensors(tmp_path, {name: data}, {name: ragged})
    for flags in (["--files", "1"], ["--tp", "4", "--ep", "2"], ["--tp", "2"], ["--ep", "4"]):
        new = tmp_path / "-".join(flags)
        assert run("convert", checkpoint, new, "--to", "ecdit", *flags)[0] == 0
        out = torch.empty(data.shape)
        Reader(new).read_into(name, Box((0, 0, 0), (4, 6, 8)), out)
        assert torch.equal(out, data)
        assert run("convert", new, tmp_path / f"{new.name}-back", "--to", "ecdit")[0] == 0
        assert run("diff", tmp_path / f"{new.name}-back", checkpoint)[0] == 0
        for box in (Box((1, 1, 3), (2, 4, 4)), Box((3, 5, 7), (1, 1, 1)), Box((0, 0, 2), (4, 6, 1))):
            assert torch.equal(EcditSource(new).read(name, box), data[box.within((0, 0, 0))])


@pytest.mark.parametrize("flags", [["--tp", "1", "--ep", "1"], ["--tp", "1"], ["--ep", "1"], ["--tp", "2"]])
def test_files_are_numbered_from_zero(run: Run, tmp_path: Path, flags: list[str]) -> None:
    checkpoint = save_tensors(tmp_path, {"weight/a": torch.ones(4, 2), "weight/x.query.weight": torch.ones(4, 2)})
    assert run("convert", checkpoint, tmp_path / "new", "--to", "ecdit", *flags)[0] == 0
    files = sorted(read_manifest(tmp_path / "new").files)
    assert files == [f"shard-{index:05d}.safetensors" for index in range(len(files))]


def test_a_layout_of_more_ranks_than_memory_has_room_for_is_refused_at_once(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint = save_tensors(tmp_path, {"weight/x.query.weight": torch.ones(4, 2), "weight/experts.w1": torch.ones(3)})
    assert "do not divide" in refused("convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--tp", str(10**15))
    assert "axis 2 of shape [3]" in refused("convert", checkpoint, tmp_path / "new", "--to", "ecdit", "--tp", "2")


def test_more_files_than_a_process_may_open_are_read(run: Run, tmp_path: Path) -> None:
    tensors = {f"weight/{index:03d}": torch.full((2,), float(index)) for index in range(100)}
    checkpoint = save_tensors(tmp_path, tensors)
    assert run("convert", checkpoint, tmp_path / "many", "--to", "ecdit", "--files", "100")[0] == 0
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, before[1]))
    try:
        assert run("convert", tmp_path / "many", tmp_path / "new", "--to", "ecdit")[0] == 0
        assert run("diff", tmp_path / "many", tmp_path / "new")[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Checkpoints that lie


@pytest.mark.parametrize("tensors", [{}, {"exp_avg/a": torch.ones(2)}], ids=["nothing", "moments"])
def test_a_checkpoint_without_weights_is_not_whole(
    refused: Callable[..., str], tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_tensors(tmp_path, tensors)
    monkeypatch.setattr("tools.convert_ckpt.expected_of", lambda _: ({"a": (2,)}, ()))
    line = refused("verify", checkpoint)
    assert "holds no weights" in line and str(checkpoint) in line
    if not tensors:
        assert "holds no tensors" in refused("convert", checkpoint, tmp_path / "new", "--to", "ecdit")


@pytest.mark.parametrize("recipe", ["text", 3, None, ["a"], {"model": 3}, {"model": {"num_layers": 10**9}}])
def test_a_recipe_that_is_none_is_told_of_with_the_checkpoints_path(
    run: Run, refused: Callable[..., str], tmp_path: Path, recipe: Any
) -> None:
    checkpoint = save_tensors(tmp_path, {"weight/a": torch.ones(2)}, recipe=recipe)
    code, out, _ = run("inspect", checkpoint)
    assert code == 0 and "recipe       ?" in out
    line = refused("verify", checkpoint)
    assert f"error: {checkpoint}: its recipe cannot be read" in line


@pytest.mark.parametrize(
    "config",
    [
        '{"step": Infinity, "kind": "ema", "meta": {}}',
        '{"step": NaN, "kind": "ema", "meta": {}}',
        '{"step": 1e999, "kind": "ema", "meta": {}}',
        '{"step": -1, "kind": "ema", "meta": {}}',
        '{"step": true, "kind": "ema", "meta": {}}',
        '{"step": 1.0, "kind": "ema", "meta": {}}',
        '{"step": "1", "kind": "ema", "meta": {}}',
        '{"step": 1' + "0" * 30 + ', "kind": "ema", "meta": {}}',
        '{"step": 1' + "0" * 9999 + ', "kind": "ema", "meta": {}}',
        '{"step": 1, "kind": "ema", "meta": [["a", 1]]}',
        '{"step": 1, "kind": "ema", "meta": {"a": NaN}}',
        '{"step": 1, "kind": "ema", "meta": {"a": 1e999}}',
        '{"step": 1, "kind": "../x", "meta": {}}',
        '{"step": 1, "kind": "", "meta": {}}',
        '{"step": 1, "kind": "a/b", "meta": {}}',
        '{"step": 1, "kind": "e\\nma", "meta": {}}',
        '{"step": 1, "kind": 3, "meta": {}}',
        '{"kind": "ema", "meta": {}}',
        "[]",
        "",
        '{"a":' * 9999,
    ],
)
def test_a_config_that_lies_is_refused(refused: Callable[..., str], tmp_path: Path, config: str) -> None:
    shared = save_shared(tmp_path / "shared", {"a": torch.ones(2)})
    (shared / "config.json").write_text(config)
    assert str(shared) in refused("convert", shared, tmp_path / "new", "--to", "ecdit")
    refused("inspect", shared)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\x1b[2Ja", "__metadata__x\u2028", ""])
def test_a_name_that_breaks_a_line_is_refused(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    shared = save_shared(tmp_path / "shared", {name: torch.ones(2)})
    assert "is not of the form kind/parameter" in refused("convert", shared, tmp_path / "new", "--to", "ecdit")


def test_a_tensor_that_the_index_does_not_name_is_not_dropped(refused: Callable[..., str], tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    shared = save_shared(tmp_path / "shared", tensors, weight_map={"a": "model.safetensors"})
    assert "tensor b is not in model.safetensors.index.json" in refused(
        "convert", shared, tmp_path / "new", "--to", "ecdit"
    )


def test_a_tensor_that_two_files_hold_is_not_taken_from_one_of_them(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    shared = save_shared(tmp_path / "shared", {"a": torch.ones(2), "b": torch.ones(2)})
    shutil.copyfile(shared / "model.safetensors", shared / "other.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
    (shared / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors: tensor b is not in model.safetensors.index.json" in refused("inspect", shared)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "model\n.safetensors", "/etc/a.safetensors", 3, "gone.safetensors"]
)
def test_an_index_that_leads_elsewhere_is_refused(refused: Callable[..., str], tmp_path: Path, file: Any) -> None:
    shared = save_shared(tmp_path / "shared", {"a": torch.ones(2)}, weight_map={"a": file})
    assert str(shared) in refused("inspect", shared)


def test_what_the_reader_would_refuse_is_not_begun(refused: Callable[..., str], tmp_path: Path) -> None:
    shared = save_shared(tmp_path / "shared", {"a": torch.ones((1,) * 9)})
    assert "has 9 dimensions" in refused("convert", shared, tmp_path / "new", "--to", "ecdit")


@pytest.mark.parametrize(
    ("step", "shape", "told"),
    [(-1, (1,), "step -1"), (1, (0, 2**63), "has shape"), (1, (2**40,), "is not in it, the manifest says")],
)
def test_a_manifest_that_lies_is_refused(
    refused: Callable[..., str], tmp_path: Path, step: int, shape: tuple[int, ...], told: str
) -> None:
    checkpoint = save_tensors(tmp_path, {"weight/a": torch.ones(1)})
    held = read_manifest(checkpoint)
    file = held.tensors["weight/a"].slices[0].file
    cut = StoredSlice(file=file, key="weight/a", box=Box((0,) * len(shape), shape), xxh3="0" * 16)
    tensors = {"weight/a": StoredTensor(dtype="float32", shape=shape, slices=(cut,))}
    text = encode_manifest(Manifest(step=step, meta={}, files=held.files, tensors=tensors))
    (checkpoint / "manifest.json").write_bytes(text)
    assert told in refused("diff", checkpoint, checkpoint)


# What cannot be read


def test_a_path_that_cannot_be_looked_at_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "file" / "x", tmp_path / ("n" * 300), tmp_path / "loop", tmp_path / "a\nb", "a\0b", ""):
        for command in (["inspect"], ["verify"], ["diff", tmp_path]):
            refused(*command, path)
        refused("convert", path, tmp_path / "new", "--to", "ecdit")


def test_a_folder_without_permission_is_one_line(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    for asked in ("stat", "iterdir"):  # the tests may run as root, who is denied nothing
        with monkeypatch.context() as patch:
            patch.setattr(Path, asked, denied)
            assert "cannot be read: Permission denied" in refused("inspect", tmp_path)


def test_a_source_that_fails_is_blamed_and_not_the_destination(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_tensors(tmp_path, {"weight/a": torch.ones(4)})

    def fails(*_: object) -> Any:
        raise OSError(5, "Input/output error", "/far/away")

    for broken, where in (("os.preadv", checkpoint / "shard-00000.safetensors"), (SOURCE_READ, "/far/away")):
        with monkeypatch.context() as patch:
            patch.setattr(broken, fails)
            code, _, err = run("convert", checkpoint, tmp_path / "new", "--to", "ecdit")
        assert code == 2 and err == f"error: {where}: cannot be read: Input/output error\n"
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["convert"],
        ["inspect", "x", "y"],
        ["convert", "a", "b", "--to", "ecdit", "--tp", "0"],
        ["convert", "a", "b", "--to", "ecdit", "--files", "9" * 5000],
    ],
)
def test_a_wrong_command_line_is_one_line(refused: Callable[..., str], arguments: list[str]) -> None:
    assert "see --help" in refused(*arguments)


def test_a_file_that_is_gone_while_it_is_read_is_named(tmp_path: Path) -> None:
    checkpoint = save_tensors(tmp_path, {"weight/a": torch.ones(4)})
    source = EcditSource(checkpoint)
    (checkpoint / "shard-00000.safetensors").unlink()
    with pytest.raises(sources.CheckpointError, match=r"shard-00000\.safetensors: cannot be read"):
        source.read("weight/a", Box((0,), (4,)))
