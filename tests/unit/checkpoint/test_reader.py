"""Reading what may be damaged: every fault is named with its file in one line, and nothing unchecked is used."""

import functools
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.sources import open_checkpoint_source
from ecdit_ds.checkpoint.manifest import (
    Manifest,
    StoredFile,
    StoredSlice,
    StoredTensor,
    decode_manifest,
    encode_manifest,
    read_manifest,
)
from ecdit_ds.checkpoint.naming import list_checkpoints
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.reader import Reader, newest_valid
from ecdit_ds.checkpoint.writer import TensorShard, save_checkpoint
from ecdit_ds.errors import CheckpointError

MANIFEST, SHARD = "manifest.json", "shard-00000.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2, each one tensor `w` = 0..5 in two slices of one file."""
    halves = [TensorShard(name="w", global_shape=(6,), box=Box((i,), (3,)), data=torch.arange(3.0) + i) for i in (0, 3)]
    for step in (1, 2):
        save_checkpoint(tmp_path, step, halves, {"learning_rate": 1e-5}, SoloPeers())
    return tmp_path


def flip_bit(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << (byte % 8)
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def header_xxh3(path: Path) -> str:
    """Return the checksum that a manifest would have for a file's header, whatever the header says."""
    data = path.read_bytes()
    return xxhash.xxh3_64_hexdigest(data[: 8 + int.from_bytes(data[:8], "little")])


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(folder: Path, manifest: Manifest) -> None:
    """Write a manifest whose own checksum is right, as somebody who means harm would."""
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))


@pytest.mark.parametrize("file", [MANIFEST, SHARD])
def test_a_flipped_bit_in_any_byte_is_found_and_its_file_named(root: Path, file: str) -> None:
    path = root / "step_2" / file
    intact = path.read_bytes()
    for byte in range(len(intact)):
        flip_bit(path, byte)
        with pytest.raises(CheckpointError, match=f"step_2/{file}") as caught:
            Reader(root / "step_2").verify()
        assert "\n" not in str(caught.value)
        path.write_bytes(intact)
    Reader(root / "step_2").verify()


@pytest.mark.parametrize(("file", "old", "new"), [(MANIFEST, b"1e-05", b"1E-05"), (SHARD, b"]}} ", b"]}}\t")])
def test_damage_that_means_the_same_to_json_is_found_too(root: Path, file: str, old: bytes, new: bytes) -> None:
    path = root / "step_2" / file
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(CheckpointError, match=f"step_2/{file}.*damaged"):
        Reader(root / "step_2").verify()


@pytest.mark.parametrize("box", [Box((3,), (3,)), Box((3,), (1,)), Box((2,), (2,))])
def test_damage_anywhere_in_a_slice_is_found_by_whoever_reads_any_of_it_and_others_are_still_read(
    root: Path, box: Box
) -> None:
    flip_bit(root / "step_2" / SHARD, (root / "step_2" / SHARD).stat().st_size - 1)
    reader, out = Reader(root / "step_2"), torch.full((3,), -1.0)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{SHARD}.*checksum"):
            reader.read_into("w", box, torch.empty(box.shape))
    reader.read_into("w", Box((0,), (3,)), out)
    assert out.tolist() == [0.0, 1.0, 2.0]


def test_a_thorough_search_falls_back_past_a_flipped_bit_and_says_why(root: Path) -> None:
    flip_bit(root / "step_2" / SHARD, (root / "step_2" / SHARD).stat().st_size - 1)
    reader, rejections = newest_valid(root, thorough=True)
    assert reader is not None
    assert reader.manifest.step == 1
    assert len(rejections) == 1
    assert f"step_2/{SHARD}" in rejections[0]


@pytest.mark.parametrize(
    "damage",
    [cut_short, halve, make_empty, Path.unlink, replace_by_pipe, replace_by_device, replace_by_dangling_link],
)
@pytest.mark.parametrize("file", [MANIFEST, SHARD])
def test_a_truncated_or_missing_file_is_named_and_the_older_checkpoint_used(
    root: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(root / "step_2" / file)
    reader, rejections = newest_valid(root)
    assert reader is not None
    assert reader.manifest.step == 1
    assert len(rejections) == 1
    assert f"step_2/{file}" in rejections[0]


@pytest.mark.parametrize("latest", ["", "step_7\n", "../x\n", "/etc\n", "step_1\nstep_2\n", "\0"])
def test_the_hint_of_the_newest_is_for_people_and_never_followed(root: Path, latest: str) -> None:
    (root / "latest").write_text(latest)
    reader, rejections = newest_valid(root, thorough=True)
    assert reader is not None
    assert (reader.manifest.step, rejections) == (2, [])


def test_a_pickle_planted_in_a_checkpoint_is_never_opened(root: Path) -> None:
    marker = root / "marker"
    for name in (".metadata", "model.pt", "rng.pkl"):
        (root / "step_2" / name).write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    reader, _ = newest_valid(root, thorough=True)
    assert reader is not None and reader.manifest.step == 2
    assert not marker.exists()


@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_whose_name_says_another_step_is_no_checkpoint(root: Path, is_link: bool) -> None:
    misnamed = root / "step_1000000"
    misnamed.symlink_to("step_1") if is_link else (root / "step_1").rename(misnamed)
    reader, rejections = newest_valid(root)
    assert reader is not None and reader.manifest.step == 2
    assert len(rejections) == 1 and "is of step 1, so its folder is misnamed; name it step_1" in rejections[0]


def test_a_search_among_whole_checkpoints_takes_the_newest_and_rejects_none(root: Path) -> None:
    reader, rejections = newest_valid(root, thorough=True)
    assert reader is not None
    assert reader.manifest.step == 2
    assert rejections == []


def test_checkpoints_of_which_none_is_valid_are_an_error_that_names_them_all(root: Path) -> None:
    (root / "step_1" / MANIFEST).unlink()
    (root / "step_2" / MANIFEST).write_text("[]")
    with pytest.raises(CheckpointError, match=r"step_2/manifest.json.*step_1/manifest.json"):
        newest_valid(root)


def test_a_root_without_checkpoints_is_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "step_3.tmp-1f").mkdir()
    assert newest_valid(tmp_path) == (None, [])
    assert newest_valid(tmp_path / "absent") == (None, [])


def test_checkpoints_are_listed_by_number_newest_first(tmp_path: Path) -> None:
    for name in ("step_9", "step_10", "step_11.tmp-1f", "step_x", "best", "step_12.damaged-1f"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_10", "step_9"]


class Trap:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("prefix", [b"", (40).to_bytes(8, "little")], ids=["plain", "with a plausible header length"])
@pytest.mark.parametrize("is_listed", [True, False])
def test_a_pickle_named_like_a_shard_is_refused_and_not_run(root: Path, prefix: bytes, is_listed: bool) -> None:
    folder, shard = root / "step_2", root / "step_2" / SHARD
    manifest = read_manifest(folder)
    shard.write_bytes(prefix + pickle.dumps(Trap(root / "sprung"), protocol=0))
    if is_listed:
        header = header_xxh3(shard) if prefix else manifest.files[SHARD].header_xxh3
        listed = StoredFile(size_bytes=shard.stat().st_size, header_xxh3=header)
        rewrite(folder, replace(manifest, files={SHARD: listed}))
    with pytest.raises(CheckpointError, match=SHARD):
        Reader(folder).read_into("w", Box((0,), (6,)), torch.zeros(6))
    assert not (root / "sprung").exists()


@pytest.mark.parametrize(
    "name",
    ["../shard-00000.safetensors", "/etc/passwd", "a/b", "..", "", "shard-00000.pt", "shard-00000.safetensors/../x"],
)
def test_a_manifest_that_points_out_of_its_folder_is_refused(root: Path, name: str) -> None:
    manifest = read_manifest(root / "step_2")
    rewrite(root / "step_2", replace(manifest, files={name: manifest.files[SHARD]}))
    with pytest.raises(CheckpointError, match=r"manifest.json.*is not of the form"):
        read_manifest(root / "step_2")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"slices": ()}, "element .0. .* in no slice"),
        ({"shape": (5,)}, "reaches outside"),
        ({"dtype": "object"}, "dtype 'object'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(root: Path, change: dict[str, Any], fault: str) -> None:
    manifest = read_manifest(root / "step_2")
    rewrite(root / "step_2", replace(manifest, tensors={"w": replace(manifest.tensors["w"], **change)}))
    with pytest.raises(CheckpointError, match=f"manifest.json: .*tensor w.*{fault}"):
        read_manifest(root / "step_2")


def test_a_dtype_that_differs_between_manifest_and_shard_is_refused(root: Path) -> None:
    manifest = read_manifest(root / "step_2")
    rewrite(root / "step_2", replace(manifest, tensors={"w": replace(manifest.tensors["w"], dtype="int32")}))
    with pytest.raises(CheckpointError, match=f"{SHARD}.*torch.float32.*int32"):
        Reader(root / "step_2").verify()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a manifest"),
        (b'{"format":"other"}', "is not a manifest"),
        (b'{"format":"ecdit_ds","version":2}', "version 2"),
        (b'{"format":"ecdit_ds","version":1}', "damaged"),
        (b'{"format":"ecdit_ds","step":NaN,"version":1}', "cannot be checked"),
    ],
)
def test_a_manifest_that_is_something_else_is_refused(tmp_path: Path, text: bytes, fault: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"manifest.json: .*{fault}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("fields", [{}, {"files": []}, {"tensors": {"w": 3}}, {"step": "1"}, {"meta": []}])
def test_a_manifest_with_a_right_checksum_and_wrong_fields_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    right = {"files": {}, "meta": {}, "step": 1, "tensors": {}}
    content = {"format": "ecdit_ds", "version": 1} | ((right | fields) if fields else {})
    canonical = functools.partial(json.dumps, sort_keys=True, separators=(",", ":"))
    digest = xxhash.xxh3_64_hexdigest(canonical(content).encode())
    (tmp_path / MANIFEST).write_text(canonical(content | {"xxh3": digest}))
    with pytest.raises(CheckpointError, match="does not describe a checkpoint"):
        read_manifest(tmp_path)


def test_a_cut_that_many_tensors_share_is_proven_once_and_what_is_intact_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = tuple(
        StoredSlice(file=SHARD, key=str(i), box=Box((i, 0), (2, 3)), xxh3="0123456789abcdef") for i in (0, 2)
    )
    tensor = StoredTensor(dtype="float32", shape=(4, 3), slices=halves)
    names = [f"{kind}/{layer}" for kind in ("weight", "ema", "exp_avg") for layer in range(4)]
    manifest = Manifest(
        step=1,
        meta={},
        files={SHARD: StoredFile(size_bytes=1, header_xxh3="")},
        tensors=dict.fromkeys(names, tensor) | {"other": replace(tensor, slices=halves[::-1])},
    )
    text = encode_manifest(manifest)
    proven: list[tuple[int, ...]] = []
    monkeypatch.setattr("ecdit_ds.checkpoint.manifest.check_cover", lambda shape, boxes: proven.append(shape))
    monkeypatch.setattr("ecdit_ds.checkpoint.manifest._canonical", None)
    assert decode_manifest(text, tmp_path / MANIFEST) == manifest
    assert proven == [(4, 3)] * 2


@pytest.mark.parametrize("place", [0, 1, 12])
def test_a_hole_is_found_in_any_of_many_tensors_of_one_shape(tmp_path: Path, place: int) -> None:
    halves = tuple(StoredSlice(file=SHARD, key=str(i), box=Box((i,), (2,)), xxh3="") for i in (0, 2))
    whole = StoredTensor(dtype="float32", shape=(4,), slices=halves)
    tensors = {f"{i:02}": replace(whole, slices=halves[:1]) if i == place else whole for i in range(13)}
    manifest = Manifest(step=1, meta={}, files={SHARD: StoredFile(size_bytes=1, header_xxh3="")}, tensors=tensors)
    with pytest.raises(CheckpointError, match=rf"tensor {place:02}: element \[2\] .* in no slice"):
        decode_manifest(encode_manifest(manifest), tmp_path / MANIFEST)


def test_an_unknown_name_is_answered_with_the_nearest(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tensor ww; the nearest is w$"):
        Reader(root / "step_2").read_into("ww", Box((0,), (6,)), torch.zeros(6))


def test_another_shape_than_the_stored_one_is_refused_with_both(root: Path) -> None:
    reader = Reader(root / "step_2")
    reader.expect("w", (6,))
    with pytest.raises(CheckpointError, match=r"shape \[6\], the model needs \[2, 3\]"):
        reader.expect("w", (2, 3))


@pytest.mark.parametrize("box", [Box((4,), (3,)), Box((0, 0), (1, 1))])
def test_a_box_that_is_not_stored_is_refused(root: Path, box: Box) -> None:
    with pytest.raises(CheckpointError, match="nothing is stored for all of the box"):
        Reader(root / "step_2").read_into("w", box, torch.zeros(box.shape))


def test_floats_are_not_read_into_whole_numbers(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not convert to torch.int64"):
        Reader(root / "step_2").read_into("w", Box((0,), (6,)), torch.zeros(6, dtype=torch.int64))


def test_an_output_of_another_shape_than_the_box_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="out has shape"):
        Reader(root / "step_2").read_into("w", Box((0,), (6,)), torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_box_across_slices_is_read_in_any_float_type_even_into_a_parameter(root: Path, dtype: torch.dtype) -> None:
    out = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    Reader(root / "step_2").read_into("w", Box((1,), (4,)), out)
    assert out.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "model-00001-of-00001.safetensors"])
def test_a_pipe_where_a_file_of_another_format_should_be_is_refused_and_not_waited_for(
    tmp_path: Path, name: str
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"step": 1, "kind": "ema", "meta": {}}))
    assert open_checkpoint_source(tmp_path).tensors == {"ema/a": (torch.float32, (2,))}
    replace_by_pipe(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: is no plain file"):
        open_checkpoint_source(tmp_path)
