"""Shards of a set: few are mapped at a time, and what cannot be mapped is told as what it is."""

import copy
import errno
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from ecdit_ds.data.latents import dataset as dataset_module
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.latents.index import VerifyOptions, checksum_of
from ecdit_ds.data.latents.mmap_shard import LruIndex
from ecdit_ds.errors import DataError
from tests.helpers.arrow_damage import damage_places
from tests.helpers.made_sets import write_set

SHARDS, ROWS, MOST = 7, 3, 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a set of seven shards."""
    return write_set(tmp_path / "set", [((3, 2, 2), ROWS)] * SHARDS)


def maps_of(folder: Path) -> set[str]:
    """Return which files of a folder this process has mapped."""
    paths = [line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    return {Path(path).name for path in paths if path.startswith(f"{folder}/shard")}


def read(dataset: LatentDataset, *samples: int) -> list[str]:
    """Return the captions of some samples."""
    return list(dataset.gather(np.array(samples), np.array(samples)).captions)


def test_of_many_shards_the_last_ones_read_stay_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "MAX_MAPPED", MOST)
    dataset = LatentDataset(folder)
    order = [*range(SHARDS * ROWS), *range(SHARDS * ROWS)]
    assert [read(dataset, i)[0] for i in order] == [f"set {i}" for i in order]
    assert maps_of(folder) == {f"shard-{SHARDS - 2:05}.arrow", f"shard-{SHARDS - 1:05}.arrow"}
    read(dataset, (SHARDS - 2) * ROWS)
    read(dataset, 0)
    assert maps_of(folder) == {f"shard-{SHARDS - 2:05}.arrow", "shard-00000.arrow"}


def test_a_batch_of_more_shards_than_stay_mapped_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "MAX_MAPPED", MOST)
    dataset = LatentDataset(folder)
    samples = list(range(SHARDS * ROWS))[::-1]
    batch = dataset.gather(np.array(samples), np.array(samples))
    assert list(batch.captions) == [f"set {i}" for i in samples]
    assert batch.latents_BCHW[:, 0, 0, 0].tolist() == samples
    assert len(maps_of(folder)) == MOST


def test_what_is_mapped_does_not_travel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "MAX_MAPPED", MOST)
    dataset = LatentDataset(folder)
    read(dataset, 0, ROWS)
    again = copy.deepcopy(dataset)
    assert read(again, 2 * ROWS) == [f"set {2 * ROWS}"]
    assert read(dataset, 0, ROWS) == ["set 0", f"set {ROWS}"]


def test_the_number_used_longest_ago_goes_first() -> None:
    recent = LruIndex(2)
    assert recent.use([1, 2]) == []
    assert recent.use([1]) == []
    assert recent.use([3]) == [2]
    assert recent.use([4, 5, 6]) == [1, 3, 4]


@pytest.mark.parametrize(
    "error",
    [OSError("Memory mapping file failed: Cannot allocate memory"), OSError(errno.EMFILE, "Too many open files")],
)
def test_what_the_machine_ran_out_of_is_no_fault_of_the_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refusal_of: Callable[[Callable[[], object]], str], error: OSError
) -> None:
    dataset = LatentDataset(folder)

    def fail(_path: str) -> None:
        raise error

    monkeypatch.setattr(pa, "memory_map", fail)
    said = refusal_of(lambda: read(dataset, 0))
    assert "shard-00000.arrow: cannot be mapped now" in said and "vm.max_map_count" in said and "anew" not in said
    monkeypatch.undo()
    assert read(dataset, 0) == ["set 0"]


def test_a_fingerprint_is_that_of_every_number_text_and_encoder_and_not_of_the_place(tmp_path: Path) -> None:
    runs = [((3, 2, 2), 5), ((3, 2, 2), 3)]

    def fingerprint(place: str, made: list[tuple[tuple[int, int, int], int]] = runs, **changes: Any) -> str:
        return LatentDataset(write_set(tmp_path / place / changes.pop("name", "set"), made, **changes)).fingerprint

    own = fingerprint("here")
    assert fingerprint("there") == own
    others = [
        fingerprint("latents", broken={7: "latents 7.5"}),  # one number of the last sample
        fingerprint("text", broken={0: "text_embeds 0.5"}),
        fingerprint("pooled", broken={4: "text_pooled 3.5"}),
        fingerprint("mask", broken={5: "mask"}),
        fingerprint("captions", name="elsewhere"),
        fingerprint("cut elsewhere", [((3, 2, 2), 4), ((3, 2, 2), 4)]),
        fingerprint("other size", [((3, 2, 2), 5), ((3, 1, 4), 3)]),
        fingerprint("other pictures", image="other"),
        fingerprint("other words", text="other"),
    ]
    assert len({own, *others}) == 1 + len(others)


def test_a_shard_whose_captions_lie_outside_it_is_refused_by_name(tmp_path: Path) -> None:
    """Where sizes alone are compared, or whoever handed it over made the checksums fit."""
    folder = write_set(tmp_path / "made", [((3, 2, 2), 12)])
    (path,) = folder.glob("*.arrow")
    damage_places(path, [f"made {i}" for i in range(12)], 3)
    with pytest.raises(DataError, match=r"\.arrow: is no shard of this set \(.*[Oo]ffset"):
        read(LatentDataset(folder, check=VerifyOptions(checksums=False)), 3)


def _rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        table = change(reader.read_all())
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _with(name: str, make: Callable[[pa.ChunkedArray], Any]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, make(table[name]))


@pytest.mark.parametrize(
    "change",
    [
        *(
            _with("caption", partial(pa.ChunkedArray.cast, target_type=kind))
            for kind in (pa.large_string(), pa.binary())
        ),
        _with("caption", lambda column: column.cast(pa.string_view())),
        _with("caption", lambda column: column.dictionary_encode()),
        _with("caption", lambda column: pa.array(range(len(column)))),
        _with("caption", lambda column: pa.nulls(len(column))),
        _with("caption", lambda column: pa.array([None] * len(column), pa.string())),
        _with("latents", lambda column: column.cast(pa.large_binary())),
        lambda table: table.drop_columns(["caption"]),
        lambda table: table.append_column("caption", table["caption"]),
        lambda table: table.append_column("extra", table["latents"]),
    ],
)
def test_columns_of_other_types_are_no_texts_and_numbers(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table]
) -> None:
    folder = write_set(tmp_path / "made", [((3, 2, 2), 12)])
    (path,) = folder.glob("*.arrow")
    _rewrite(path, lambda table: table)
    unchecked = VerifyOptions(shards=slice(0), checksums=False)
    assert read(LatentDataset(folder, check=unchecked), 3) == ["made 3"]
    _rewrite(path, change)
    with pytest.raises(DataError, match=r"\.arrow: is no shard of this set \("):
        read(LatentDataset(folder, check=unchecked), 3)


@pytest.mark.parametrize("change", [{"text_embeds": None}, {"extra": torch.ones(1)}, {"text_mask": torch.ones(1, 9)}])
def test_a_text_of_no_text_of_other_shapes_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_set(tmp_path / "made", [((3, 2, 2), 12)])
    path, index = folder / "null_text.safetensors", folder / "index.json"
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(tensors, path)
    signed = {"null_text_bytes": path.stat().st_size, "null_text_xxh3": checksum_of(path)}
    index.write_text(json.dumps(json.loads(index.read_text()) | signed))
    with pytest.raises(DataError, match=r"null_text\.safetensors: holds \{.*, but its index says"):
        LatentDataset(folder)
