"""Encoded sets on disk: what is read is what was encoded, and what is damaged is named."""

import json
import math
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from einops import rearrange
from torch import Tensor

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.digit_scenes import scenes as digit_scenes
from ecdit_ds.data.digit_scenes.dataset import is_of_digit_scenes, open_digit_scenes
from ecdit_ds.data.digit_scenes.scenes import draw_scene
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.latents.index import SCHEMA_VERSION, checksum_of
from ecdit_ds.data.latents.shard_writer import commit_dataset
from ecdit_ds.data.splits import open_split
from ecdit_ds.errors import DataError
from tests.helpers.made_sets import write_set

NUM_TRAIN = 300
"""More than are encoded at a time, so that sets have a second part."""
OpenSet = Callable[..., LatentDataset]


@dataclass(frozen=True)
class CodecWithEvent(PixelVAE):
    """The pixel codec, to which something happens while it encodes a set."""

    event: Callable[[], object]

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Let it happen in the second part of the set, when the first is written."""
        if len(images_B3HW) == NUM_TRAIN % 256:
            self.event()
        return super().encode(images_B3HW)


@dataclass(frozen=True)
class FourPixelCodec(PixelVAE):
    """A codec with fewer, deeper latents: the mean of 2 x 2 pixels, and a fourth channel."""

    @property
    def identity(self) -> str:
        """Its name."""
        return "four pixels"

    @property
    def downsampling(self) -> int:
        """Two pixels a latent pixel."""
        return 2

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return latents_B4HW."""
        pooled = torch.nn.functional.avg_pool2d(images_B3HW, 2)
        return torch.cat([pooled, pooled.mean(dim=1, keepdim=True)], dim=1)


@dataclass(frozen=True, kw_only=True)
class OtherWords(HashedWordEncoder):
    """An encoder of the same sizes and of another name."""

    @property
    def identity(self) -> str:
        """Its name."""
        return "other words"


@pytest.fixture
def model(tiny_config: ModelConfig) -> ModelConfig:
    """Return the tiny architecture with a canvas and captions that digit scenes fit."""
    return replace(tiny_config, latent_height=16, latent_width=16, text_embed_dim=6, max_text_tokens=10)


@pytest.fixture
def open_set(model: ModelConfig, tmp_path: Path) -> OpenSet:
    """Return `open_set(**changes)`: the training set in a cache of this test, with some arguments changed."""

    def open_changed(**changes: Any) -> LatentDataset:
        data = DataConfig(num_train=NUM_TRAIN, num_heldout=7, cache_dir=str(tmp_path / "cache"))
        arguments: dict[str, Any] = {
            "model": model,
            "data": data,
            "split": "train",
            "seed": 0,
            "image_encoder": PixelVAE(),
            "text_encoder": HashedWordEncoder(embed_dim=6, max_tokens=10),
        }
        return open_digit_scenes(**(arguments | changes))

    return open_changed


def folders(tmp_path: Path) -> list[Path]:
    """Return all that lies in the cache of a test."""
    return sorted((tmp_path / "cache").iterdir())


def test_samples_are_the_encoded_scenes_in_the_order_asked(open_set: OpenSet) -> None:
    dataset, indices = open_set(), [299, 0, 256, 255, 0]
    batch = dataset.gather(np.array(indices), np.array([5, 4, 3, 2, 1]))
    scenes = [draw_scene(seed=0, split="train", index=i, canvas_height=16, canvas_width=16) for i in indices]
    images_BHWC = torch.from_numpy(np.stack([scene.image_HWC for scene in scenes]))
    text = HashedWordEncoder(embed_dim=6, max_tokens=10).encode([scene.caption for scene in scenes])
    images_B3HW = rearrange(images_BHWC, "b h w c -> b c h w") / 127.5 - 1.0
    torch.testing.assert_close(batch.latents_BCHW, PixelVAE().encode(images_B3HW))
    assert torch.equal(batch.text_embeds_BTD, text.embeds_BTD)
    assert torch.equal(batch.text_mask_BT, text.mask_BT)
    assert torch.equal(batch.text_pooled_BD, text.pooled_BD)
    assert batch.captions == tuple(scene.caption for scene in scenes)
    assert batch.stream_index_B.tolist() == [5, 4, 3, 2, 1]
    assert [dataset.name_of(i) for i in indices] == [f"train-{i}" for i in indices]


def test_a_single_sample_is_the_row_of_a_batch(open_set: OpenSet) -> None:
    dataset = open_set()
    sample, batch = dataset[257], dataset.gather(np.array([3, 257]), np.array([0, 1]))
    assert torch.equal(sample.latents_CHW, batch.latents_BCHW[1])
    assert torch.equal(sample.text_embeds_TD, batch.text_embeds_BTD[1])
    assert torch.equal(sample.text_mask_T, batch.text_mask_BT[1])
    assert torch.equal(sample.text_pooled_D, batch.text_pooled_BD[1])
    assert sample.caption == batch.captions[1]
    assert sample.kind == draw_scene(seed=0, split="train", index=257, canvas_height=16, canvas_width=16).kind


def test_samples_may_be_changed_without_changing_the_set(open_set: OpenSet) -> None:
    dataset = open_set()
    before = dataset[0].latents_CHW.clone()
    dataset[0].latents_CHW.zero_()
    assert torch.equal(dataset[0].latents_CHW, before)


def test_a_set_ends_where_its_length_says(open_set: OpenSet) -> None:
    dataset = open_set()
    assert len(dataset) == NUM_TRAIN
    assert dataset[NUM_TRAIN - 1].caption
    with pytest.raises(IndexError):
        dataset[NUM_TRAIN]


def test_a_set_is_written_once(open_set: OpenSet, tmp_path: Path) -> None:
    open_set()
    written = [(path, path.stat().st_mtime_ns) for folder in folders(tmp_path) for path in folder.iterdir()]
    open_set()
    assert [(path, path.stat().st_mtime_ns) for folder in folders(tmp_path) for path in folder.iterdir()] == written
    assert len(written) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"split": "heldout"},
        {"seed": 1},
        {"num_train": 5},
        {"latent_height": 24},
        {"latent_width": 24},
        {"image_encoder": FourPixelCodec()},
        {"image_encoder": PixelVAE(scaling_factor=2.0)},
        {"text_encoder": OtherWords(embed_dim=6, max_tokens=10)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_that_matters_has_a_folder_of_its_own(
    open_set: OpenSet, model: ModelConfig, tmp_path: Path, change: dict[str, Any]
) -> None:
    open_set()
    if "num_train" in change:
        change = {"data": DataConfig(num_train=5, cache_dir=str(tmp_path / "cache"))}
    elif isinstance(change.get("image_encoder"), FourPixelCodec):
        change |= {"model": replace(model, in_channels=4)}
    elif next(iter(change)).startswith("latent"):
        change = {"model": replace(model, **change)}
    open_set(**change)
    assert len(folders(tmp_path)) == 2


def test_latents_are_smaller_than_the_canvas_by_the_encoders_downsampling(
    open_set: OpenSet, model: ModelConfig
) -> None:
    sample = open_set(model=replace(model, in_channels=4), image_encoder=FourPixelCodec())[0]
    scene = draw_scene(seed=0, split="train", index=0, canvas_height=32, canvas_width=32)
    assert sample.latents_CHW.shape == (4, 16, 16)
    assert sample.caption == scene.caption
    expected = torch.from_numpy(scene.image_HWC[:2, :2].mean(axis=(0, 1))).float() / 127.5 - 1.0
    torch.testing.assert_close(sample.latents_CHW[:3, 0, 0], expected)


def test_a_set_has_the_scenes_of_its_split_seed_and_canvas_and_tells_their_mean_and_spread(
    open_set: OpenSet, model: ModelConfig
) -> None:
    held_out = open_set(split="heldout", seed=3, model=replace(model, latent_width=24))
    scenes = [draw_scene(seed=3, split="heldout", index=i, canvas_height=16, canvas_width=24) for i in range(7)]
    assert held_out.texts("caption", np.arange(len(held_out))) == [scene.caption for scene in scenes]
    assert held_out.texts("kind", np.arange(7)) == [scene.kind for scene in scenes]
    assert held_out.name_of(3) == "heldout-3"
    images_BHWC = torch.from_numpy(np.stack([scene.image_HWC for scene in scenes]))
    latents_BCHW = PixelVAE().encode(rearrange(images_BHWC, "b h w c -> b c h w") / 127.5 - 1.0)
    torch.testing.assert_close(held_out.gather(np.arange(7), np.arange(7)).latents_BCHW, latents_BCHW)
    values_CN = rearrange(latents_BCHW.double(), "b c h w -> c (b h w)")
    assert held_out.index.latents_mean == pytest.approx(values_CN.mean(dim=1).tolist())
    assert held_out.index.latents_std == pytest.approx(values_CN.std(dim=1, correction=0).tolist())


def test_captions_of_another_encoder_have_a_folder_of_their_own(
    open_set: OpenSet, model: ModelConfig, tmp_path: Path
) -> None:
    few = DataConfig(num_train=2, cache_dir=str(tmp_path / "cache"))
    for width in (6, 8):
        words = HashedWordEncoder(embed_dim=width, max_tokens=10)
        opened = open_set(data=few, model=replace(model, text_embed_dim=width), text_encoder=words)
        assert opened[0].text_embeds_TD.shape == (10, width)


def test_a_set_survives_pickling(open_set: OpenSet) -> None:
    dataset = open_set()
    blob = pickle.dumps(dataset)
    assert len(blob) < 20_000, "the rows travel, not their path"
    copy = pickle.loads(blob)  # noqa: S301 - bytes of our own, as a loader's worker gets them
    assert torch.equal(copy[299].latents_CHW, dataset[299].latents_CHW)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _change_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("file", "damage", "what"),
    [
        ("shard-00000.arrow", _flip_a_bit, "checksum"),
        ("shard-00000.arrow", lambda path: os.truncate(path, path.stat().st_size - 8), "bytes"),
        ("shard-00000.arrow", Path.unlink, "missing"),
        ("null_text.safetensors", _flip_a_bit, "checksum"),
        ("null_text.safetensors", Path.unlink, "missing"),
        ("index.json", Path.unlink, "missing"),
        ("index.json", lambda path: os.truncate(path, 40), "no index"),
        ("index.json", lambda path: path.write_text("[1, 2]"), "no index"),
        ("index.json", lambda path: path.write_bytes(b"\xff\xfe"), "no index"),
        ("index.json", lambda path: _change_index(path, lambda index: index.pop("count")), "no index"),
        ("index.json", lambda path: _change_index(path, lambda index: index.update(more=1)), "no index"),
        ("index.json", lambda path: _change_index(path, lambda index: index.update(schema=0)), f"{SCHEMA_VERSION}"),
    ],
)
def test_damage_is_named_with_its_file_and_the_folder_to_delete(
    open_set: OpenSet,
    tmp_path: Path,
    refusal_of: Callable[[Callable[[], object]], str],
    file: str,
    damage: Callable[[Path], object],
    what: str,
) -> None:
    before = open_set()[0]
    (folder,) = folders(tmp_path)
    damage(folder / file)
    message = refusal_of(open_set)
    assert str(folder / file) in message
    assert what in message
    assert f"delete the folder {folder}" in message

    shutil.rmtree(folder)
    assert torch.equal(open_set()[0].latents_CHW, before.latents_CHW)


@pytest.mark.parametrize(
    "change",
    [
        *({"file": name} for name in ("../other/shard-00000.arrow", "/shard-00000.arrow", "a/b", "", ".", "..")),
        {"bucket": -1},
        {"bucket": 1},
        {"count": 0},
        {"count": NUM_TRAIN - 1},
    ],
    ids=str,
)
def test_an_index_that_names_a_shard_elsewhere_or_miscounts_is_none(
    open_set: OpenSet, tmp_path: Path, refusal_of: Callable[[Callable[[], object]], str], change: dict[str, Any]
) -> None:
    open_set()
    (folder,) = folders(tmp_path)
    shutil.copytree(folder, folder.with_name("other"))

    def damage(index: dict[str, Any]) -> None:
        index["shards"][0] |= change
        if change == {"count": 0}:
            index["count"] = 0

    _change_index(folder / "index.json", damage)
    assert "is no index of an encoded set" in refusal_of(lambda: LatentDataset(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"image_encoder": "x"},
        {"text_encoder": None},
        {"settings": []},
        {"has_text": "no"},
        {"count": float(NUM_TRAIN)},
        {"buckets": [[-1, -16, 48]]},
        {"buckets": [[0, 16, 16]]},
        {"buckets": [[3.0, 16, 16]]},
        {"text_shape": [2**20, 0]},
        {"pooled_width": "8"},
        {"latents_mean": ["a"]},
        {"latents_std": [math.nan]},
    ],
    ids=str,
)
def test_an_index_of_other_types_or_numbers_is_none(
    open_set: OpenSet, tmp_path: Path, refusal_of: Callable[[Callable[[], object]], str], change: dict[str, Any]
) -> None:
    open_set()
    (folder,) = folders(tmp_path)
    _change_index(folder / "index.json", lambda index: index.update(change))
    assert "is no index of an encoded set" in refusal_of(lambda: LatentDataset(folder))


def test_a_checksum_is_that_of_the_whole_of_a_large_file(tmp_path: Path) -> None:
    content = bytes(5 << 20) + b"its end"
    (tmp_path / "large").write_bytes(content)
    assert checksum_of(tmp_path / "large") == xxhash.xxh3_64_hexdigest(content)


def test_a_process_killed_while_writing_leaves_nothing_that_is_read(open_set: OpenSet, tmp_path: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(
        target=open_set, kwargs={"image_encoder": CodecWithEvent(event=lambda: os._exit(9))}
    )
    killed.start()
    killed.join(timeout=60)
    assert killed.exitcode == 9
    (remains,) = folders(tmp_path)
    assert (remains / "shard-00000.arrow").exists()

    assert len(open_set()) == NUM_TRAIN
    assert len(folders(tmp_path)) == 2


def test_an_encoder_that_fails_leaves_nothing_behind(open_set: OpenSet, tmp_path: Path) -> None:
    def fail() -> None:
        raise FloatingPointError("as an encoder may")

    with pytest.raises(FloatingPointError):
        open_set(image_encoder=CodecWithEvent(event=fail))
    assert folders(tmp_path) == []


def test_the_slower_of_two_writers_takes_the_folder_of_the_faster(open_set: OpenSet, tmp_path: Path) -> None:
    slower = open_set(image_encoder=CodecWithEvent(event=open_set))
    assert len(folders(tmp_path)) == 1
    assert torch.equal(slower[299].latents_CHW, open_set()[299].latents_CHW)


def test_a_set_that_is_there_needs_no_digits(open_set: OpenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_set()
    monkeypatch.setattr(digit_scenes, "_uci_digits", None)  # scikit-learn's, which take a second on every rank
    assert torch.equal(open_set()[299].latents_CHW, first[299].latents_CHW)


def test_what_is_in_the_place_of_a_set_and_is_none_is_not_taken_for_it(tmp_path: Path) -> None:
    draft, place = tmp_path / "draft", tmp_path / "place"
    for folder, name in ((draft, "index.json"), (place, "notes.txt")):
        folder.mkdir()
        (folder / name).write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        commit_dataset(draft, place)
    assert (draft / "index.json").read_text() == (place / "notes.txt").read_text() == "mine"


def test_a_cache_that_cannot_be_written_is_named(
    open_set: OpenSet, tmp_path: Path, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert f"data.cache_dir {tmp_path / 'cache'}" in refusal_of(open_set)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"text_encoder": HashedWordEncoder(embed_dim=7, max_tokens=10)}, ["gives 7", "text_embed_dim is 6"]),
        ({"text_encoder": HashedWordEncoder(embed_dim=6, max_tokens=9)}, ["gives 9", "max_text_tokens is 10"]),
        ({"image_encoder": FourPixelCodec()}, ["four pixels", "(4, 16, 16)", "(3, 16, 16)"]),
    ],
)
def test_encoders_that_do_not_fit_the_model_are_refused(
    open_set: OpenSet, refusal_of: Callable[[Callable[[], object]], str], change: dict[str, Any], parts: list[str]
) -> None:
    message = refusal_of(lambda: open_set(**change))
    assert [part for part in parts if part not in message] == []


def test_a_set_brings_the_text_of_no_text_in_its_own_encoding(open_set: OpenSet) -> None:
    null = HashedWordEncoder(embed_dim=6, max_tokens=10).null()
    kept = open_set().null_text
    assert torch.equal(kept.embeds_BTD, null.embeds_BTD)
    assert torch.equal(kept.mask_BT, null.mask_BT) and kept.mask_BT.dtype == torch.bool
    assert torch.equal(kept.pooled_BD, null.pooled_BD)


@pytest.fixture
def encoded_recipe(open_set: OpenSet, tiny_recipe: Recipe, model: ModelConfig, tmp_path: Path) -> Recipe:
    """Return a recipe whose training set is a folder."""
    open_set()
    (folder,) = folders(tmp_path)
    return replace(tiny_recipe, model=model, data=DataConfig(dataset="encoded", path=str(folder)))


def test_an_encoded_set_is_opened_by_its_path(encoded_recipe: Recipe, open_set: OpenSet) -> None:
    (opened,) = open_split(encoded_recipe, "train", None)
    assert isinstance(opened, LatentDataset) and len(opened) == NUM_TRAIN
    assert torch.equal(opened[3].latents_CHW, open_set()[3].latents_CHW)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"data": DataConfig(dataset="encoded")}, ["data.path: names no encoded set", "--set data.path=DIR"]),
        ({"data": DataConfig(dataset="encoded", path="/nowhere")}, ["data.path: /nowhere is no folder"]),
    ],
)
def test_a_missing_data_path_is_refused(
    encoded_recipe: Recipe, refusal_of: Callable[[Callable[[], object]], str], change: Any, parts: list[str]
) -> None:
    message = refusal_of(lambda: open_split(replace(encoded_recipe, **change), "train", None))
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"in_channels": 4}, ["latents (3, 16, 16)", "(4, 16, 16)", "model.in_channels"]),
        ({"text_embed_dim": 8}, ["texts (10, 6)", "(10, 8)", "text_embed_dim"]),
    ],
)
def test_an_encoded_set_of_other_shapes_is_refused_with_both(
    encoded_recipe: Recipe,
    model: ModelConfig,
    refusal_of: Callable[[Callable[[], object]], str],
    change: Any,
    parts: list[str],
) -> None:
    recipe = replace(encoded_recipe, model=replace(model, **change))
    message = refusal_of(lambda: open_split(recipe, "train", None))
    assert all(part in message for part in parts)


def test_a_model_is_of_digit_scenes_where_all_of_its_sets_and_both_encoders_are(
    open_set: OpenSet, model: ModelConfig, tmp_path: Path
) -> None:
    open_set()
    (scenes,) = map(str, folders(tmp_path))
    other, gone = str(write_set(tmp_path / "other", [((3, 16, 16), 2)])), str(tmp_path / "gone")
    own = {
        "image": {"identity": PixelVAE().identity},
        "text": {"identity": HashedWordEncoder(embed_dim=6, max_tokens=10).identity},
    }

    def judge(*paths: str, encoders: Any = own, **changes: Any) -> bool | None:
        data = DataConfig(dataset="encoded", path=paths, **changes) if paths else DataConfig()
        return is_of_digit_scenes(data, model, encoders)

    assert judge() and judge(scenes) and judge(scenes, encoders=None) and judge(encoders=None)
    assert judge(other) is judge(scenes, other) is judge(other, scenes) is judge(other, encoders=None) is False
    assert judge(scenes, encode="online") is False
    assert judge(gone) is judge(scenes, gone) is True, "the encoders decide where a set is not there any more"
    assert judge(gone, encoders=None) is judge(scenes, gone, encoders=None) is None
    assert judge(other, gone, encoders=None) is False
    for what in own:
        for changed in ({"identity": "other"}, None, "words", {}):
            assert judge(encoders=own | {what: changed}) is judge(scenes, encoders=own | {what: changed}) is False


def test_a_path_without_effect_is_refused(refusal_of: Callable[[Callable[[], object]], str]) -> None:
    message = refusal_of(lambda: DataConfig(path="somewhere"))
    assert "data.path: somewhere has no effect with data.dataset: digit_scenes" in message


def test_a_cache_that_cannot_be_looked_into_is_named(open_set: OpenSet, tmp_path: Path) -> None:
    """As root may look everywhere, a name that no file system takes stands for a folder that may not be searched."""
    for cache, why in ((tmp_path / ("x" * 300), "too long"), (tmp_path / "file", "exists")):
        (tmp_path / "file").touch()
        data = DataConfig(num_train=4, num_heldout=2, cache_dir=str(cache))
        with pytest.raises(DataError, match=rf"^data.cache_dir {cache}: cannot write .*{why}.*set data.cache_dir else"):
            open_set(data=data)
