"""What conversions are made of, by hand: plans, counts, comparisons, and DeepSpeed's files of many ranks as one."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert import sources
from ecdit_ds.checkpoint.convert.convert import bytes_to_move, convert_to_ecdit, convert_to_safetensors
from ecdit_ds.checkpoint.convert.file_plan import FilePlan, plan_files, plan_layout, plan_safetensors
from ecdit_ds.checkpoint.convert.formats import deepspeed_folder
from ecdit_ds.checkpoint.convert.inspection import describe_checkpoint, differences, verify
from ecdit_ds.checkpoint.convert.model_spec import ModelFacts
from ecdit_ds.checkpoint.convert.sources import CheckpointSource, EcditSource, SafetensorsSource
from ecdit_ds.checkpoint.convert.universal import UniversalSource
from ecdit_ds.checkpoint.convert.universal_writer import convert_to_universal, plan_universal
from ecdit_ds.checkpoint.convert.upcycle import UpcycledSource, UpcycleSpec, WithEmaFromWeights
from ecdit_ds.checkpoint.convert.workspace import Workspace, workspace
from ecdit_ds.checkpoint.convert.zero_checkpoint import ZeroSource
from ecdit_ds.checkpoint.manifest import (
    Manifest,
    StoredFile,
    StoredSlice,
    StoredTensor,
    decode_manifest,
    encode_manifest,
    read_manifest,
    shard_name,
)
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.safetensors_file import TensorFileWriter
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import CheckpointError
from ecdit_ds.inference.load import open_model

RefusalOf = Callable[[Callable[[], object]], str]


@dataclass
class Held:
    """A checkpoint in memory."""

    values: dict[str, Tensor]
    step: int = 5
    meta: dict[str, Any] = field(default_factory=lambda: {"num_updates": 4, "samples_seen": 40})
    identity: list[str] = field(default_factory=lambda: ["first"])
    nonfinite: None = None

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape by name."""
        return {name: (values.dtype, tuple(values.shape)) for name, values in self.values.items()}

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box."""
        return self.values[name][box.within((0,) * len(box.shape))].clone()


def rows(*shape: int, start: float = 0.0) -> Tensor:
    """Return numbers that say where they are."""
    return start + torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a part have four numbers, so that every tensor has several."""
    monkeypatch.setattr(sources, "PART_BYTES", 16)


def sizes_of(plan: list[FilePlan]) -> list[list[str]]:
    return [[target.key for target in file.targets] for file in plan]


def test_files_are_of_about_equal_size_in_the_order_of_the_names() -> None:
    source = Held({f"weight/{name}": rows(4) for name in "abcdef"})
    names = list(source.tensors)
    assert sizes_of(plan_files(source, names, 3, None)) == [names[:2], names[2:4], names[4:]]
    assert sizes_of(plan_files(source, names, 9, None)) == [[name] for name in names]


def test_a_file_of_safetensors_is_filled_to_the_last_byte_and_the_next_begins_empty() -> None:
    source = Held({f"{kind}/{name}": rows(4) for kind in ("ema", "weight") for name in "abcde"})
    plan = plan_safetensors(source, "weight", 32, None)
    assert sizes_of(plan) == [["a", "b"], ["c", "d"], ["e"]]
    assert [file.name for file in plan] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert {target.name for file in plan for target in file.targets} == {f"weight/{name}" for name in "abcde"}


def test_only_floating_point_numbers_are_cast() -> None:
    source = Held({"weight/a": rows(2), "weight/n": torch.tensor([3, 4])})
    (file,) = plan_files(source, list(source.tensors), 1, torch.bfloat16)
    assert [target.dtype for target in file.targets] == [torch.bfloat16, torch.int64]


def test_each_rank_of_a_layout_has_its_experts_and_its_part_of_their_width_and_the_first_what_ep_ranks_share() -> None:
    """Rank = tp + 2 ep; two slices of experts, two of the width."""
    source = Held({"weight/w1": rows(4, 3, 6), "weight/q": rows(6, 2), "weight/norm": rows(3)})
    cuts = {"weight/w1": {0: 2, 2: 2}, "weight/q": {0: 2}, "weight/norm": dict[int, int]()}
    plan = plan_layout(source, list(source.tensors), cuts.__getitem__, 2, 2, None)
    found = [{target.name: target.box.offset for target in file.targets} for file in plan]
    assert found == [
        {"weight/w1": (0, 0, 0), "weight/q": (0, 0)},
        {"weight/w1": (0, 0, 3), "weight/q": (3, 0)},
        {"weight/w1": (2, 0, 0)},
        {"weight/w1": (2, 0, 3)},
        {"weight/norm": (0,)},
    ]
    assert {target.box.shape for file in plan for target in file.targets} == {(2, 3, 3), (3, 2), (3,)}


def test_a_conversion_that_goes_on_tells_of_every_byte_and_holds_all_parts_of_each_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Held({"weight/a": rows(10), "weight/b": rows(3, 3), "weight/c": rows(5)})
    plan = plan_files(source, list(source.tensors), 3, None)
    moved: list[int] = []

    def interrupted(self: Workspace) -> None:
        raise CheckpointError("not now")

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "publish", interrupted)
        with pytest.raises(CheckpointError, match="not now"):
            convert_to_ecdit(source, tmp_path / "step_5", plan, moved.append)
    assert sum(moved) == bytes_to_move(plan) == 2 * 4 * 24
    again: list[int] = []
    convert_to_ecdit(source, tmp_path / "step_5", plan, again.append)
    assert sum(again) == bytes_to_move(plan)
    Reader(tmp_path / "step_5").verify()
    found = EcditSource(tmp_path / "step_5")
    for name, values in source.values.items():
        whole = Box((0,) * values.dim(), tuple(values.shape))
        assert torch.equal(found.read(name, whole), values), name


@pytest.mark.parametrize("to", ["ecdit", "safetensors", "universal"])
def test_what_is_not_finite_is_counted_over_all_parts_of_a_tensor_and_told_in_the_new_folder(
    tmp_path: Path, to: str
) -> None:
    source, new = Held({"weight/a": rows(10), "weight/b": rows(3), "weight/c": rows(2)}), tmp_path / "step_5"
    source.values["weight/a"][torch.tensor([0, 1, 5, 9])] = torch.tensor([math.inf, math.nan, -math.inf, math.inf])
    source.values["weight/c"][1] = math.nan
    plan, names, found = plan_files(source, list(source.tensors), 2, None), {"weight/a": 4, "weight/c": 1}, None
    if to == "ecdit":
        assert convert_to_ecdit(source, new, plan, lambda nbytes: None) == names
        found = EcditSource(new).nonfinite
    elif to == "safetensors":
        plan = plan_safetensors(source, "weight", 32, None)
        assert convert_to_safetensors(source, new, "weight", plan, lambda nbytes: None) == names
        found = SafetensorsSource(new).nonfinite
    else:
        plan = plan_universal(source, lambda parameter: {}, 1)
        assert convert_to_universal(source, new, plan, 1, lambda nbytes: None) == names
        found = UniversalSource(new / "global_step5_universal", None).nonfinite
    assert found == names


def test_a_disk_with_room_for_the_first_of_the_files_only_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal_of: RefusalOf
) -> None:
    source = Held({f"weight/{name}": rows(6) for name in "abc"})
    plan = plan_files(source, list(source.tensors), 3, None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=71))
    said = refusal_of(lambda: convert_to_ecdit(source, tmp_path / "step_5", plan, lambda nbytes: None))
    assert "72 bytes needed, 71 free" in said and list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=72))
    convert_to_ecdit(source, tmp_path / "step_5", plan, lambda nbytes: None)


def test_notes_of_files_that_a_later_conversion_does_not_write_are_cleared_away(tmp_path: Path) -> None:
    with workspace(tmp_path / "new", {shard_name(0), shard_name(1)}) as space:
        for number in (0, 1):
            space.note(shard_name(number)).write_text("{}")
    with workspace(tmp_path / "new", {shard_name(1)}) as space:
        assert [path.name for path in space.folder.glob("*.note")] == [f"{shard_name(1)}.note"]
    with workspace(tmp_path / "new", {"manifest.json"}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_source_or_another_plan_are_written_anew(tmp_path: Path) -> None:
    def convert(source: Held, names: list[str]) -> None:
        convert_to_ecdit(source, tmp_path / "step_5", plan_files(source, names, 2, None), lambda nbytes: None)

    def fail(*_: object) -> Tensor:
        raise CheckpointError("the source is gone")

    first = Held({"weight/a": rows(6), "weight/b": rows(6, start=50)})
    held = Held(first.values)
    held.read = lambda name, box: first.read(name, box) if name == "weight/a" else fail()  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="gone"):
        convert(held, list(first.tensors))
    second = Held({"weight/a": rows(6, start=100), "weight/b": rows(6, start=200)}, identity=["second"])
    convert(second, list(second.tensors))
    found = EcditSource(tmp_path / "step_5")
    for name, values in second.values.items():
        assert torch.equal(found.read(name, Box((0,), (6,))), values), name


def test_a_file_of_another_part_of_the_same_tensor_is_written_anew(tmp_path: Path) -> None:
    """Name, key, shape and header are the same; only the plan says that other rows belong there."""
    source, cuts = Held({"weight/a": rows(6, 2)}), {"weight/a": {0: 2}}
    first, second = plan_layout(source, ["weight/a"], cuts.__getitem__, 2, 1, None)
    swapped = [replace(first, name=second.name), replace(second, name=first.name)]
    calls: list[Box] = []

    def read_once(name: str, box: Box) -> Tensor:
        calls.append(box)
        if box.offset[0] >= 3:
            raise CheckpointError("the source is gone")
        return source.values[name][box.within((0, 0))].clone()

    failing = Held(source.values)
    failing.read = read_once  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="gone"):
        convert_to_ecdit(failing, tmp_path / "step_5", [first, second], lambda nbytes: None)
    assert calls
    convert_to_ecdit(source, tmp_path / "step_5", swapped, lambda nbytes: None)
    found = EcditSource(tmp_path / "step_5").read("weight/a", Box((0, 0), (6, 2)))
    assert torch.equal(found, source.values["weight/a"])


def test_an_export_says_its_kind_and_its_size_in_bytes_and_where_each_tensor_is(tmp_path: Path) -> None:
    source = Held({f"{kind}/{name}": rows(4, start=n) for n, kind in enumerate(("ema", "weight")) for name in "abc"})
    plan = plan_safetensors(source, "weight", 32, None)
    convert_to_safetensors(source, tmp_path / "new", "weight", plan, lambda nbytes: None)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48}
    assert [index["weight_map"][name][:11] for name in "abc"] == ["model-00001", "model-00001", "model-00002"]
    found = SafetensorsSource(tmp_path / "new")
    assert set(found.tensors) == {"weight/a", "weight/b", "weight/c"} and found.step == 5
    assert torch.equal(found.read("weight/c", Box((0,), (4,))), rows(4, start=1))


def test_an_exported_model_is_known_by_all_its_files_wherever_it_is_and_gives_each_tensor_its_shape(
    tmp_path: Path, tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    source = Held({f"ema/{name}": rows(2, 2) for name in "abc"}, meta={"recipe": tiny_recipe.to_dict(), "encoders": {}})
    plan = plan_safetensors(source, "ema", 16, None)
    convert_to_safetensors(source, tmp_path / "new", "ema", plan, lambda nbytes: None)
    model = open_model(tmp_path / "new")
    assert (model.kind, model.step, model.recipe, model.encoders) == ("ema", 5, tiny_recipe, {})
    with pytest.raises(CheckpointError, match="holds ema, not weight"):
        open_model(tmp_path / "new", "weight")
    out = torch.empty(2, 2)
    model.expect("c", (2, 2))
    model.fill("c", Box((0, 0), (2, 2)), out)
    assert torch.equal(out, rows(2, 2))
    assert "needs c of shape [4]" in refusal_of(lambda: model.expect("c", (4,)))
    assert "holds none" in refusal_of(lambda: model.expect("d", (2, 2)))
    moved = (tmp_path / "new").rename(tmp_path / "moved")
    assert open_model(moved).identity == model.identity
    os.utime(moved / "model-00003-of-00003.safetensors", ns=(1, 1))
    assert open_model(moved).identity != model.identity


def test_differences_are_counted_over_all_parts_and_named_from_both_sides() -> None:
    first = Held({"weight/a": rows(10), "weight/left": rows(2), "weight/s": rows(2, 3)})
    second = Held({"weight/a": rows(10), "weight/right": rows(2), "weight/s": rows(3, 2)}, step=6)
    second.values["weight/a"][torch.tensor([0, 1, 9])] += torch.tensor([1.0, 8.0, 2.0])
    assert list(differences(first, second, lambda nbytes: None)) == [
        "step: 5 and 6",
        "weight/left: only in the first",
        "weight/right: only in the second",
        "weight/a: 3 of 10 numbers differ, by up to 8",
        "weight/s: shape [2, 3] and [3, 2]",
    ]
    assert list(differences(first, first, lambda nbytes: None)) == []
    zeros, negative = Held({"weight/a": torch.zeros(2)}), Held({"weight/a": -torch.zeros(2)})
    (line,) = differences(zeros, negative, lambda nbytes: None)
    assert "2 of 2 numbers differ" in line and "sign of zero" in line


def test_a_checkpoint_is_whole_where_names_shapes_and_kinds_are_the_models(refusal_of: RefusalOf) -> None:
    def said(expected: dict[str, tuple[int, ...]], *kinds: str) -> str:
        source = Held({f"{kind}/{name}": rows(2, 3) for kind in kinds for name in ("a", "b")})
        return refusal_of(lambda: verify(source, expected, ("exp_avg", "exp_avg_sq"), lambda nbytes: None))

    model: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (2, 3)}
    ticked: list[int] = []
    whole = Held({f"{kind}/{name}": rows(2, 3) for kind in ("weight", "exp_avg", "exp_avg_sq") for name in model})
    assert verify(whole, model, ("exp_avg", "exp_avg_sq"), ticked.append) == sum(ticked) == 6 * 24
    assert "weight/b: is not in the recipe's model" in said({"a": (2, 3)}, "weight")
    assert "weight/c: is missing" in said(model | {"c": (1,)}, "weight")
    assert "weight/b: has shape [2, 3], the recipe's model [3, 2]" in said(model | {"b": (3, 2)}, "weight")
    assert "no exp_avg_sq" in said(model, "weight", "exp_avg")
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for change, fault in (
            ({f"{kind}/c": rows(1)}, f"{kind}/c: is not in"),
            ({f"{kind}/b": rows(3, 2)}, f"{kind}/b: has shape [3, 2]"),
            ({f"{kind}/b": torch.full((2, 3), math.nan)}, f"not finite ({kind}/b)"),
        ):
            amiss = Held(whole.values | change)
            found = refusal_of(lambda amiss=amiss: verify(amiss, model, ("exp_avg", "exp_avg_sq"), ticked.append))  # type: ignore[misc]
            assert fault in found


def test_a_file_without_tensors_is_compared_with_its_checksum_too(tmp_path: Path, refusal_of: RefusalOf) -> None:
    """A rank may have nothing to write; its file is of the checkpoint all the same."""
    source, folder = Held({"weight/a": rows(4)}), tmp_path / "step_5"
    convert_to_ecdit(source, folder, plan_files(source, ["weight/a"], 1, None), lambda nbytes: None)
    writer = TensorFileWriter(folder / shard_name(1), [], {})
    size = writer.close()
    said = read_manifest(folder)
    for header, is_whole in ((writer.header_xxh3, True), ("0" * 16, False)):
        files = {**said.files, shard_name(1): StoredFile(size_bytes=size, header_xxh3=header)}
        (folder / "manifest.json").write_bytes(encode_manifest(replace(said, files=files)))
        for check in (
            lambda: verify(EcditSource(folder), {"a": (4,)}, (), lambda nbytes: None),
            lambda: Reader(folder).verify(),
        ):
            if is_whole:
                check()
            else:
                assert f"{shard_name(1)}: header has checksum" in refusal_of(check)


def test_a_recipe_that_lacks_a_default_is_no_other_recipe(tiny_recipe: Recipe) -> None:
    whole, older = tiny_recipe.to_dict(), tiny_recipe.to_dict()
    del older["train"]["mask_ratio"], older["model"]["positions"]
    first, second = (Held({"weight/a": rows(2)}, meta={"recipe": recipe}) for recipe in (whole, older))
    assert list(differences(first, second, lambda nbytes: None)) == []
    older["train"]["mask_ratio"] = 0.5
    assert list(differences(first, second, lambda nbytes: None)) == ["meta.recipe.train.mask_ratio: 0.0 and 0.5"]


def test_all_tensors_of_a_kind_are_counted() -> None:
    source = Held({"weight/a": rows(2, 3), "weight/b": rows(5), "ema/a": rows(2, 3)})
    lines = describe_checkpoint(source)
    assert "weight       2 tensors, 11 numbers, 44 bytes, float32" in lines
    assert "ema          1 tensors, 6 numbers, 24 bytes, float32" in lines


def test_an_average_of_the_weights_is_read_box_by_box_from_the_weights() -> None:
    source = Held({"weight/a": rows(4, 3), "exp_avg/a": rows(4, 3, start=50)})
    average = WithEmaFromWeights(source)
    assert set(average.tensors) == {"weight/a", "exp_avg/a", "ema/a"}
    for kind, start in (("weight", 0), ("ema", 0), ("exp_avg", 50)):
        assert torch.equal(average.read(f"{kind}/a", Box((1, 0), (2, 3))), rows(4, 3, start=start)[1:3]), kind


def test_what_a_conversion_goes_on_from_is_known_by_its_content_and_by_what_was_made_of_it(
    tmp_path: Path, tiny_recipe: Recipe
) -> None:
    found: list[list[str]] = []
    other = replace(tiny_recipe, train=replace(tiny_recipe.train, seed=tiny_recipe.train.seed + 1))
    for name in ("first", "second"):
        dense = replace(dense_source(tiny_recipe), identity=[name])
        made: list[CheckpointSource] = [
            dense,
            WithEmaFromWeights(dense),
            *(upcycled(dense, recipe) for recipe in (tiny_recipe, other)),
        ]
        found += [source.identity for source in (*made, upcycled(WithEmaFromWeights(dense), tiny_recipe))]
    for number, (names, meta) in enumerate(itertools.product(("ab", "ac"), ({}, {"samples_seen": 1}))):
        source = Held({f"ema/{name}": rows(4) for name in names}, meta=meta)
        plan, folder = plan_files(source, list(source.tensors), 1, None), tmp_path / str(number) / "step_5"
        convert_to_ecdit(source, folder, plan, lambda nbytes: None)
        found.append(EcditSource(folder).identity)
        if not meta:
            folder, plan = tmp_path / names, plan_safetensors(source, "ema", 16, None)
            convert_to_safetensors(source, folder, "ema", plan, lambda nbytes: None)
            for moment in (1, 2):  # of the last file, whose content nobody can compare
                for file in sorted(folder.glob("*.safetensors")):
                    os.utime(file, ns=(moment, moment if file.name.startswith("model-00002") else 1))
                found.append(SafetensorsSource(folder).identity)
    assert len({tuple(identity) for identity in found}) == len(found) == 18


@pytest.mark.parametrize("what", ["universal", "zero"])
def test_a_folder_of_deepspeeds_is_known_by_all_its_files(universal: Path, tmp_path: Path, what: str) -> None:
    if what == "zero":
        universal = tmp_path
        write_zero_folder(universal)
    recipe: Any = RecipeStub()
    facts = ModelFacts(recipe=recipe, shapes=SHAPES, cut_axes=AXES.__getitem__)

    def identity() -> tuple[str, ...]:
        source = UniversalSource(universal, None) if what == "universal" else ZeroSource(universal, facts)
        return tuple(source.identity)

    first, *_, last = sorted(universal.glob("zero/*/[ef]*.pt" if what == "universal" else "*_optim_states.pt"))
    found = {identity(), identity()}
    for file in (first, last):
        os.utime(file, ns=(1, 1))
        found.add(identity())
    assert len(found) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slices": {"file": "shard-00001.safetensors"}}, "not among the files"),
        ({"step": -1}, "whole number from 0 on"),
    ],
)
def test_a_manifest_that_names_a_file_it_does_not_list_or_a_step_before_the_first_is_refused(
    change: dict[str, Any], said: str
) -> None:
    cut = StoredSlice(file=change.get("slices", {}).get("file", shard_name(0)), key="a", box=Box((0,), (2,)), xxh3="0")
    tensor = StoredTensor(dtype="float32", shape=(2,), slices=(cut,))
    files = {shard_name(0): StoredFile(size_bytes=8, header_xxh3="0")}
    encoded = encode_manifest(Manifest(step=change.get("step", 1), meta={}, files=files, tensors={"weight/a": tensor}))
    with pytest.raises(CheckpointError, match=said):
        decode_manifest(encoded, Path("manifest.json"))


def dense_source(recipe: Recipe) -> Held:
    """Return a dense model's step, with one matrix and one dense network."""
    dense = recipe.to_dict()
    dense["model"]["ffn"] = "dense"
    values = {"weight/q": rows(2, 3), "weight/ffn.up.weight": rows(4, 3), "weight/ffn.down.weight": rows(3, 4)}
    return Held(values, meta={"recipe": dense})


def upcycled(source: CheckpointSource, recipe: Recipe, **shapes: tuple[int, ...]) -> UpcycledSource:
    """Return it as two experts."""
    usual = {"q": (2, 3), "ffn.experts.w1": (2, 3, 4), "ffn.experts.w2": (2, 4, 3)}
    made = UpcycleSpec(
        recipe=recipe, shapes=usual | shapes, state_names=(), initial=lambda name, shape: torch.ones(shape)
    )
    return UpcycledSource(source, made)


def test_experts_are_the_turned_matrices_box_by_box(tiny_recipe: Recipe) -> None:
    source = dense_source(tiny_recipe)
    found = upcycled(source, tiny_recipe)
    assert torch.equal(
        found.read("weight/ffn.experts.w1", Box((1, 1, 0), (1, 2, 3)))[0],
        source.values["weight/ffn.up.weight"].T[1:, :3],
    )
    assert torch.equal(found.read("weight/q", Box((1, 0), (1, 3))), source.values["weight/q"][1:])


@pytest.mark.parametrize("parameter", ["q", "ffn.experts.w1"])
def test_matrices_of_another_shape_are_not_upcycled(tiny_recipe: Recipe, refusal_of: RefusalOf, parameter: str) -> None:
    wrong = {"q": (3, 3), "ffn.experts.w1": (2, 4, 4)}[parameter]
    said = refusal_of(lambda: upcycled(dense_source(tiny_recipe), tiny_recipe, **{parameter: wrong}))
    assert "has shape" in said and f"{parameter} needs" in said


@pytest.mark.parametrize("field", ["num_layers", "hidden_size", "patch_size", "ffn_hidden_size", "in_channels"])
def test_a_dense_model_that_differs_in_more_than_experts_is_not_upcycled(
    tiny_recipe: Recipe, refusal_of: RefusalOf, field: str
) -> None:
    source = dense_source(tiny_recipe)
    source.meta["recipe"]["model"][field] += 1
    assert f"model.{field}:" in refusal_of(lambda: upcycled(source, tiny_recipe))


def test_a_universal_file_says_how_its_tensor_is_cut() -> None:
    axes = {"w1": {"ep": 0, "tp": 2}, "w2": {"ep": 0, "tp": 1}, "q": {"tp": 0}, "norm": dict[str, int]()}
    shapes = {"w1": (8, 3, 6), "w2": (8, 6, 3), "q": (6, 5), "norm": (3,)}
    source = Held({f"weight/{name}": rows(*shape) for name, shape in shapes.items()})
    marks = {file.name.split("/")[2]: dict(file.marks) for file in plan_universal(source, axes.__getitem__, 2)}  # type: ignore[attr-defined]
    experts = {"is_expert_param": True, "ep_num_experts": 8}
    assert marks == {
        "w1": experts | {"cat_dim": 2},
        "w2": experts | {"cat_dim": 1},
        "q": {"cat_dim": 0},
        "norm": {},
    }
    for parameter, axis, told in (("q", 0, r"\[6, 5\]"), ("w1", 2, r"\[8, 3, 6\]")):
        with pytest.raises(CheckpointError, match=rf"{parameter}: 4 slices do not divide axis {axis} of shape {told}"):
            plan_universal(Held({f"weight/{parameter}": rows(*shapes[parameter])}), axes.__getitem__, 4)
    for dtype in (torch.bfloat16, torch.int64):
        with pytest.raises(CheckpointError, match="holds fp32"):
            plan_universal(Held({"weight/q": rows(6, 5).to(dtype)}), axes.__getitem__, 2)


def test_what_a_universal_file_says_of_its_tensor_is_compared_as_its_numbers_are(tmp_path: Path) -> None:
    source = Held({"weight/q": rows(4, 4)})
    first, other = (plan_universal(source, lambda parameter, axis=axis: {"tp": axis}, 2)[0] for axis in (0, 1))  # type: ignore[misc]
    writer = first.writer(tmp_path / "q.pt")
    writer.append(source.values["weight/q"])
    size = writer.close()
    held = first.read_back(tmp_path / "q.pt")
    assert (held.header_xxh3, held.size_bytes) == (writer.header_xxh3, size)
    assert held.header_xxh3 != other.writer(tmp_path / "other.pt").header_xxh3
    assert other.read_back(tmp_path / "q.pt") == held, "by what is in the file, not by what was planned"


UNIVERSAL_AXES = {"q": {"tp": 0}, "norm": dict[str, int]()}


@pytest.fixture
def universal(tmp_path: Path) -> Path:
    """Return a Universal Checkpoint's tag for two tensor-parallel ranks: step 5, 4 updates."""
    shapes = {"q": (4, 3), "norm": (3,)}
    source = Held({f"{kind}/{name}": rows(*shape) for kind in ("weight", "exp_avg") for name, shape in shapes.items()})
    files = plan_universal(source, UNIVERSAL_AXES.__getitem__, 2)
    convert_to_universal(source, tmp_path / "new", files, 2, lambda nbytes: None)
    return tmp_path / "new" / "global_step5_universal"


def test_a_universal_folder_says_the_counts_that_training_goes_on_from(universal: Path) -> None:
    source = UniversalSource(universal, None)
    source.verify_counts()
    assert (source.step, source.meta) == (5, {"num_updates": 4, "samples_seen": 40})
    assert torch.equal(source.read("weight/q", Box((1, 0), (2, 3))), rows(4, 3)[1:3])
    for rank, prefix in itertools.product((0, 1), ("", "zero_pp_rank_0_")):
        counts = torch.load(universal / f"{prefix}mp_rank_{rank:02d}_model_states.pt", weights_only=True)
        wanted = {"mp_world_size": 2, "global_steps": 5, "global_samples": 40, "skipped_steps": 1, "samples_seen": 40}
        assert {name: counts[name] for name in wanted} == wanted
    assert float(torch.load(universal / "zero" / "q" / "step.pt", weights_only=True)) == 4.0
    common = torch.load(universal / "zero" / "optimizer_state.pt", weights_only=True)
    assert float(common["optimizer_state_dict"]["state"][0]["step"]) == 4.0


def test_a_universal_folder_without_our_file_is_of_its_own_updates_and_skipped_steps(universal: Path) -> None:
    (universal / "ecdit_ds.json").unlink()
    recipe: Any = RecipeStub()
    facts = ModelFacts(recipe=recipe, shapes={"q": (4, 3), "norm": (3,)}, cut_axes=UNIVERSAL_AXES.__getitem__)
    source = UniversalSource(universal, facts)
    assert (source.step, source.meta["num_updates"], source.meta["samples_seen"]) == (5, 4, 40)


@pytest.mark.parametrize("damage", ["a step", "all steps", "our text", "a file more", "a file less", "a rank less"])
def test_a_universal_folder_that_contradicts_itself_is_refused(
    universal: Path, refusal_of: RefusalOf, damage: str
) -> None:
    zero, ours = universal / "zero", universal / "ecdit_ds.json"
    said = {
        "a step": "norm/step.pt at 3",
        "all steps": "does not say 3 updates",
        "our text": "damaged",
        "a file more": "which ecdit_ds.json does not know",
        "a file less": "is missing",
        "a rank less": "mp_rank_01_model_states.pt: is missing",
    }
    if damage in ("a step", "all steps"):
        for name in ("norm", "q")[: 1 if damage == "a step" else 2]:
            torch.save(torch.tensor(3.0), zero / name / "step.pt")
    elif damage == "our text":
        ours.write_text(ours.read_text().replace('"samples_seen": 40', '"samples_seen": 41'))
    elif damage == "a file more":
        torch.save({"param": torch.zeros(3)}, zero / "norm" / "exp_avg_sq.pt")
    elif damage == "a file less":
        (zero / "q" / "exp_avg.pt").unlink()
    else:
        (universal / "mp_rank_01_model_states.pt").unlink()
    message = refusal_of(lambda: UniversalSource(universal, None).verify_counts())
    assert said[damage] in message
    shapes: dict[str, tuple[int, ...]] = {"q": (4, 3), "norm": (3,)}
    checked = refusal_of(lambda: verify(UniversalSource(universal, None), shapes, ("exp_avg",), lambda nbytes: None))
    assert checked == message


def test_a_tensor_that_is_not_stored_in_one_piece_is_refused_as_the_folder_is_opened(
    universal: Path, refusal_of: RefusalOf
) -> None:
    torch.save({"param": rows(3, 4).t(), "cat_dim": 0}, universal / "zero" / "q" / "exp_avg.pt")
    assert "exp_avg.pt: holds no tensor `param` in one piece" in refusal_of(lambda: UniversalSource(universal, None))


DP, TP, EP = 4, 2, 2
SHAPES = {"norm": (3, 5), "q": (4, 3), "w1": (4, 2, 6)}
AXES = {"norm": dict[str, int](), "q": {"tp": 0}, "w1": {"ep": 0, "tp": 2}}
KIND_STARTS = {"weight": 0.0, "exp_avg": 1000.0, "exp_avg_sq": 2000.0}


def local_part(name: str, kind: str, tp: int, ep: int) -> Tensor:
    """Return what a rank holds of a parameter before ZeRO cuts it."""
    whole = rows(*SHAPES[name], start=KIND_STARTS[kind])
    for way, axis in AXES[name].items():
        count, index = (TP, tp) if way == "tp" else (EP, ep)
        whole = whole.chunk(count, dim=axis)[index]
    return whole


def address(start: int, numel: int) -> Any:
    return fragment_address(numel=numel, start=start)


def write_zero_folder(folder: Path, change: Callable[[int, int, dict[str, Any]], None] | None = None) -> ZeroSource:
    """Write what four data-parallel and two tensor-parallel ranks save, experts spread over pairs, and open it.

    A group is the flat tensor of its parameters, cut over the ranks that hold the same: four of `norm` and `q`, two of
    each half of the experts.
    """

    for tp, dp in itertools.product(range(TP), range(DP)):
        groups = [(("norm", "q"), dp, DP, {}), (("w1",), dp // EP, DP // EP, {"moe": True, "name": f"ep_size_{EP}"})]
        flats: list[dict[str, Tensor]] = []
        places: list[dict[str, Any]] = []
        for names, index, count, _ in groups:
            of_kinds = {kind: [local_part(n, kind, tp, dp % EP).flatten() for n in names] for kind in KIND_STARTS}
            total = sum(len(part) for part in of_kinds["weight"])
            length = -(-total // count)
            begin, end = index * length, (index + 1) * length
            flats.append(
                {
                    kind: torch.cat([*parts, torch.full((length * count - total,), -1.0)])[begin:end].clone()
                    for kind, parts in of_kinds.items()
                }
            )
            here, at = {}, 0
            for name, part in zip(names, of_kinds["weight"], strict=True):
                first, last = max(at, begin), min(at + len(part), end)
                if first < last:
                    here[name] = address(first - begin, last - first)
                at += len(part)
            places.append(here)
        states = {
            number: {"step": 7.0} | {kind: flat[kind] for kind in flat if kind != "weight"}
            for number, flat in enumerate(flats)
        }
        base = {"state": states, "param_groups": [{"params": [n]} | more for n, (*_, more) in enumerate(groups)]}
        zero = {
            "single_partition_of_fp32_groups": [flat["weight"] for flat in flats],
            "base_optimizer_state": base,
            "param_slice_mappings": places,
        }
        if change:
            change(tp, dp, zero)
        name = f"bf16_zero_pp_rank_{dp}_mp_rank_{tp:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": zero}, folder / name)
    local_shapes = [{n: local_part(n, "weight", 0, 0).shape for n in names} for names in (("norm", "q"), ("w1",))]
    counts = {"dp_world_size": DP, "mp_world_size": TP, "skipped_steps": 2, "param_shapes": local_shapes}
    torch.save(counts, folder / "mp_rank_00_model_states.pt")
    recipe: Any = RecipeStub()
    return ZeroSource(folder, ModelFacts(recipe=recipe, shapes=SHAPES, cut_axes=AXES.__getitem__))


class RecipeStub:
    """As much of a recipe as counts need."""

    class train:
        global_batch_size = 8

    def to_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def boxes_in(shape: tuple[int, ...]) -> Iterator[Box]:
    """Yield the whole of a tensor and a part that begins and ends inside it."""
    yield Box((0,) * len(shape), shape)
    yield Box((1,) * len(shape), tuple(size - 1 for size in shape))


def test_the_files_of_eight_ranks_are_read_as_whole_tensors(tmp_path: Path) -> None:
    source = write_zero_folder(tmp_path)
    assert (source.step, source.meta["num_updates"], source.meta["samples_seen"]) == (9, 7, 72)
    assert set(source.tensors) == {f"{kind}/{name}" for kind in KIND_STARTS for name in SHAPES}
    for (kind, start), (name, shape) in itertools.product(KIND_STARTS.items(), SHAPES.items()):
        whole = rows(*shape, start=start)
        for box in boxes_in(shape):
            assert torch.equal(source.read(f"{kind}/{name}", box), whole[box.within((0,) * len(shape))]), (kind, name)


def test_what_tensor_parallel_ranks_must_hold_alike_is_compared(tmp_path: Path, refusal_of: RefusalOf) -> None:
    def change(tp: int, dp: int, zero: dict[str, Any]) -> None:
        if (tp, dp) == (1, 0):
            zero["single_partition_of_fp32_groups"][0][1] += 1e-6

    source = write_zero_folder(tmp_path, change)
    said = refusal_of(lambda: source.read("weight/norm", Box((0, 0), (3, 5))))
    assert "weight/norm differs between tensor-parallel ranks 0 and 1" in said


@pytest.mark.parametrize(("numbers", "is_same"), [((0.0, -0.0), False), ((math.nan, math.nan), True)])
def test_what_tensor_parallel_ranks_must_hold_alike_is_compared_by_bits(
    tmp_path: Path, refusal_of: RefusalOf, numbers: tuple[float, float], is_same: bool
) -> None:
    def change(tp: int, dp: int, zero: dict[str, Any]) -> None:
        if dp == 0:
            zero["single_partition_of_fp32_groups"][0][0] = numbers[tp]

    source, whole = write_zero_folder(tmp_path, change), Box((0, 0), (3, 5))
    if is_same:
        assert source.read("weight/norm", whole)[0, 0].isnan()
    else:
        assert "differs between" in refusal_of(lambda: source.read("weight/norm", whole))


def _other_step(tp: int, dp: int, zero: dict[str, Any]) -> None:
    if (tp, dp) == (1, 2):
        zero["base_optimizer_state"]["state"][1]["step"] = 6.0


def _too_far(tp: int, dp: int, zero: dict[str, Any]) -> None:
    if (tp, dp) == (0, 0):
        zero["param_slice_mappings"][0]["norm"] = address(3, 6)


@pytest.mark.parametrize(("change", "said"), [(_other_step, "different optimizer steps"), (_too_far, "where it says")])
def test_ranks_that_are_not_of_one_checkpoint_are_refused(
    tmp_path: Path, refusal_of: RefusalOf, change: Callable[[int, int, dict[str, Any]], None], said: str
) -> None:
    assert said in refusal_of(lambda: write_zero_folder(tmp_path, change))


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_rank_too_few_or_too_many_is_named(tmp_path: Path, refusal_of: RefusalOf, is_missing: bool) -> None:
    write_zero_folder(tmp_path)
    last = tmp_path / "bf16_zero_pp_rank_3_mp_rank_01_optim_states.pt"
    if is_missing:
        last.unlink()
    else:
        (tmp_path / "bf16_zero_pp_rank_4_mp_rank_01_optim_states.pt").write_bytes(last.read_bytes())
    recipe: Any = RecipeStub()
    facts = ModelFacts(recipe=recipe, shapes=SHAPES, cut_axes=AXES.__getitem__)
    said = refusal_of(lambda: ZeroSource(tmp_path, facts))
    assert ("data-parallel rank 3 of 4, tensor-parallel rank 1 of 2 is missing" if is_missing else "rank_4") in said


def test_a_reader_takes_neither_the_turned_shape_nor_whole_numbers_for_others(
    tmp_path: Path, refusal_of: RefusalOf
) -> None:
    source = Held({"weight/a": rows(2, 3), "weight/n": torch.tensor([3, 4])})
    convert_to_ecdit(
        source, tmp_path / "step_5", plan_files(source, list(source.tensors), 1, None), lambda nbytes: None
    )
    reader = Reader(tmp_path / "step_5")
    reader.expect("weight/a", (2, 3))
    assert "has shape [2, 3], the model needs [3, 2]" in refusal_of(lambda: reader.expect("weight/a", (3, 2)))
    into = torch.empty(2)
    assert "does not convert" in refusal_of(lambda: reader.read_into("weight/n", Box((0,), (2,)), into))


@pytest.mark.parametrize("version", [0, 2])
def test_a_manifest_of_an_earlier_or_later_version_is_refused(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("ecdit_ds.checkpoint.manifest.VERSION", version)
        encoded = encode_manifest(Manifest(step=1, meta={}, files={}, tensors={}))
    with pytest.raises(CheckpointError, match=f"has version {version}"):
        decode_manifest(encoded, Path("manifest.json"))


@pytest.mark.parametrize("tag", ["..", ".", "", "a/b", "gone"])
def test_the_latest_tag_is_a_folder_beside_what_names_it(tmp_path: Path, refusal_of: RefusalOf, tag: str) -> None:
    for folder in (tmp_path, tmp_path / "run", tmp_path / "run" / "a" / "b"):
        (folder / "zero").mkdir(parents=True)
        (folder / "zero" / "optimizer_state.pt").touch()
    (tmp_path / "run" / "zero" / "optimizer_state.pt").unlink()
    (tmp_path / "run" / "latest_universal").write_text(tag)
    assert "latest_universal: names " in refusal_of(lambda: deepspeed_folder(tmp_path / "run"))
