"""Raw pictures read beside training: the samples that encoding would store, and what is wrong with the others."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data import raw_dataset as raw_set
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE
from ecdit_ds.data.encoders.from_recipe import check_encodable, encoders_of
from ecdit_ds.data.encoders.spec import image_encoder_spec, text_encoder_spec
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.loader import evaluation_batches
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.data.precompute.job import PrecomputeJob, encode_corpus
from ecdit_ds.data.precompute.unit import EncodeSettings
from ecdit_ds.data.raw_dataset import RawImageDataset, open_raw_set
from ecdit_ds.data.replacement import read_valid
from ecdit_ds.data.sources.bad_sample import BadSample, SystemFile
from ecdit_ds.data.sources.base import ImageSource, RawSample, Unit
from ecdit_ds.data.sources.open import open_source
from ecdit_ds.data.splits import open_split, validate_split
from tests.helpers.made_sets import write_set
from tests.helpers.photographs import crops, encoded
from tests.helpers.tiny_encoders import save_t5, save_vae

Refusal = Callable[[Callable[[], object]], str]
COUNT, LATENTS, TOKENS = 9, (3, 8, 8), 6
FILES = [encoded(image) for image in crops(COUNT)]
CAPTIONS = [f"part {i} of a photograph" for i in range(COUNT)]


def write_folder(root: Path, files: list[bytes] = FILES, captions: list[str] = CAPTIONS) -> Path:
    """Write pictures with captions beside them."""
    root.mkdir()
    for i, (content, caption) in enumerate(zip(files, captions, strict=True)):
        (root / f"{i}.jpg").write_bytes(content)
        (root / f"{i}.txt").write_text(caption)
    return root


def write_list(root: Path) -> Path:
    """Write a CSV beside the pictures that it names."""
    write_folder(root)
    with (root / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *((f"{i}.jpg", CAPTIONS[i]) for i in range(COUNT))])
    return root / "list.csv"


def write_parquet(root: Path) -> Path:
    """Write two files of several row groups."""
    root.mkdir()
    for name, part in (("a", slice(5)), ("b", slice(5, COUNT))):
        table = pa.table({"image": FILES[part], "caption": CAPTIONS[part]})
        pq.write_table(table, root / f"{name}.parquet", row_group_size=2, compression="none", write_page_checksum=True)
    return root


def write_tars(root: Path) -> Path:
    """Write three archives."""
    root.mkdir()
    for name, part in (("a", range(5)), ("b", range(5, 8)), ("c", range(8, COUNT))):
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for i in part:
                for suffix, content in (("jpg", FILES[i]), ("txt", CAPTIONS[i].encode())):
                    info = tarfile.TarInfo(f"{i}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


def write_saved(root: Path) -> Path:
    """Write what `save_to_disk` writes."""
    images = [{"bytes": content, "path": None} for content in FILES]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": images, "caption": CAPTIONS}, features=features)
    rows.save_to_disk(str(root))
    return root


def opened(path: Path, **changes: str) -> RawImageDataset:
    """Open a source with the embedded encoders."""
    data = DataConfig(dataset="encoded", encode="online", path=str(path), **changes)  # type: ignore[arg-type]
    words = HashedWordEncoder(embed_dim=24, max_tokens=TOKENS)
    return open_raw_set(str(path), data, latents=LATENTS, downsampling=2, text_encoder=words)


def encoded_report(path: Path, destination: Path) -> tuple[dict[str, list[str]], LatentDataset]:
    """Encode a source; return the names that were left out by cause, and the set."""
    image, text = PixelVAE(), HashedWordEncoder(embed_dim=24, max_tokens=TOKENS)
    report = encode_corpus(
        PrecomputeJob(
            source=open_source(str(path), unit_samples=4),
            destination=destination,
            image_facts=image_encoder_spec(image),
            encoding=EncodeSettings(
                image_encoder=image, text_encoder=text, sizes=((16, 16),), dtype="float32", batch_size=4, threads=1
            ),
            text_facts=text_encoder_spec(text),
            settings={},
            max_bad=0.99,
        )
    )
    assert report is not None
    return {cause: facts["names"] for cause, facts in report["causes"].items()}, LatentDataset(destination)


@pytest.mark.parametrize("write", [write_folder, write_list, write_parquet, write_tars, write_saved])
def test_every_source_gives_the_samples_that_encoding_stores(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "source")
    _, stored = encoded_report(path, tmp_path / "set")
    dataset = opened(path)
    assert len(dataset) == len(stored) == COUNT and not dataset.is_whole
    assert (dataset.buckets, dataset.runs) == ((LATENTS,), [(0, COUNT)])
    places = np.array([8, 0, 3, 3, 5, 7])
    samples, wanted = dataset.gather(places, places + 100), stored.gather(places, places + 100)
    assert samples.captions == wanted.captions and samples.bad == {}
    assert torch.equal(samples.stream_index_B, wanted.stream_index_B)
    images = samples.pixels_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    assert torch.equal(PixelVAE().encode(images), wanted.latents_BCHW)
    assert torch.equal(dataset.null_text.embeds_BTD, stored.null_text.embeds_BTD)
    assert samples.lacks_latents and samples.lacks_text and not wanted.lacks_latents


def test_what_encoding_leaves_out_is_bad_by_the_same_cause_and_name(tmp_path: Path) -> None:
    files = [*FILES[:7], b"", b"<html>no picture</html>"]
    captions = [*CAPTIONS]
    captions[2], captions[4] = " ", "one two three four five six seven"
    path = write_folder(tmp_path / "source", files, captions)
    (path / "9.jpg").write_bytes(FILES[0])
    (path / "5.jpg").write_bytes(FILES[5][:300])
    causes, stored = encoded_report(path, tmp_path / "set")
    samples = opened(path).gather(np.arange(10), np.arange(10))
    found: dict[str, list[str]] = {}
    for place in sorted(samples.bad):
        found.setdefault(samples.bad[place].cause, []).append(samples.bad[place].name)
        assert not samples.pixels_BHW3[place].any() and samples.captions[place] == ""
    assert found == causes and len(causes) == 6
    good = [i for i in range(10) if i not in samples.bad]
    assert [samples.captions[i] for i in good] == stored.texts("caption", np.arange(len(stored)))


def test_what_systems_leave_in_a_tar_takes_no_sample_s_place(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(COUNT):
            for name, content in ((f"._{i}.jpg", b"x"), (f"{i}.jpg", FILES[i]), (f"{i}.txt", CAPTIONS[i].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    dataset = opened(path)
    assert len(dataset) == COUNT
    samples = dataset.gather(np.array([8, 0, 3]), np.arange(3))
    assert samples.bad == {} and samples.captions == tuple(CAPTIONS[i] for i in (8, 0, 3))


def test_a_damaged_page_is_told_at_every_place_that_it_took(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "source") / "a.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(FILES[3][-200:-150])] ^= 1  # what pictures do not share
    path.write_bytes(content)
    samples = opened(path.parent).gather(np.arange(COUNT), np.arange(COUNT))
    assert {(place, bad.cause, bad.samples) for place, bad in samples.bad.items()} == {
        (place, "damaged archive", 1) for place in (2, 3, 4)
    }
    assert samples.captions[5:] == tuple(CAPTIONS[5:])


def test_archives_are_kept_up_to_a_size_and_read_again_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened(write_tars(tmp_path / "source"))
    reads: list[str] = []
    source_type = type(dataset._source)
    read = source_type.read

    def noted(self: ImageSource, unit: Unit) -> Iterator[RawSample | BadSample | SystemFile]:
        reads.append(unit.name)
        yield from read(self, unit)

    monkeypatch.setattr(source_type, "read", noted)
    order = np.array([0, 6, 1, 7, 2])
    first = dataset.gather(order, order)
    assert reads == ["a.tar", "b.tar"]
    monkeypatch.setattr(raw_set, "_CACHED_BYTES", 1)
    small = opened(tmp_path / "source")
    reads.clear()
    second = small.gather(order, order)
    assert reads == ["a.tar", "b.tar", "a.tar", "b.tar", "a.tar"]
    assert torch.equal(first.pixels_BHW3, second.pixels_BHW3) and first.captions == second.captions
    reads.clear()
    small.gather(np.array([6, 5, 7]), np.arange(3))
    assert reads == ["b.tar"], "one that is larger than all that is kept stays until the next"
    monkeypatch.setattr(raw_set, "_CACHED_BYTES", sum(map(len, FILES[:8])))  # a and b, or a and c
    medium = opened(tmp_path / "source")
    reads.clear()
    order = np.array([0, 6, 1, 8, 2, 7])
    medium.gather(order, order)
    assert reads == ["a.tar", "b.tar", "c.tar", "b.tar"], "the one that was not used for longest goes first"


def test_one_picture_of_a_folder_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened(write_folder(tmp_path / "source"))
    (tmp_path / "source" / "0.jpg").unlink()
    assert dataset.gather(np.array([4]), np.array([4])).bad == {}
    samples = dataset.gather(np.array([0, 4]), np.array([0, 4]))
    assert {place: bad.cause for place, bad in samples.bad.items()} == {0: "no image"}


def test_a_source_that_is_gone_is_not_told_to_be_encoded_anew(tmp_path: Path, refusal_of: Refusal) -> None:
    path = write_folder(tmp_path / "source")
    mixture = Mixture([opened(path)], seed=0, global_batch_size=4)
    for picture in path.glob("*.*"):
        picture.unlink()
    said = refusal_of(lambda: read_valid(mixture, np.arange(4)))
    assert "files are still there" in said and "inspect" not in said and "anew" not in said


def test_a_source_named_twice_by_other_names_is_refused(online: Recipe, tmp_path: Path, refusal_of: Refusal) -> None:
    source = tmp_path / "train"
    (tmp_path / "link").symlink_to(source)
    for other in (f"{source}/", str(tmp_path / "link")):
        twice = replace(online, data=replace(online.data, path=(str(source), other)))
        assert f"data.path: {source} and {other} are the same" in refusal_of(lambda: validate_split(twice, "train"))  # noqa: B023


def test_bad_samples_weigh_nothing_in_the_held_out_loss(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "source", [*FILES[:3], b"", *FILES[4:]])
    weights = torch.cat([w for _, w in evaluation_batches(opened(path), batch_size=4, dp_rank=0, dp_size=1)])
    assert weights.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]


@pytest.fixture
def online(tiny_recipe: Recipe, tiny_config: ModelConfig, tmp_path: Path) -> Recipe:
    """Return a recipe that trains on a folder, holds out another, and mixes nothing."""
    data = DataConfig(
        dataset="encoded",
        encode="online",
        path=str(write_folder(tmp_path / "train")),
        heldout_path=str(write_folder(tmp_path / "heldout", FILES[:2], CAPTIONS[:2])),
    )
    return replace(tiny_recipe, model=replace(tiny_config, max_text_tokens=TOKENS), data=data)


def test_a_recipe_names_raw_sources_and_several_of_them(online: Recipe, tmp_path: Path) -> None:
    check_encodable(online)
    assert (validate_split(online, "train").count, validate_split(online, "heldout").count) == (COUNT, 2)
    (dataset,) = open_split(online, "train", encoders_of(online))
    assert dataset.gather(np.array([0]), np.array([0])).pixels_BHW3.shape == (1, 8, 8, 3)
    both = (str(tmp_path / "train"), str(write_tars(tmp_path / "more")))
    mixed = replace(online, data=replace(online.data, path=both, weights=(1.0, 1.0)))
    assert validate_split(mixed, "train").count == 2 * COUNT
    mixture = Mixture(open_split(mixed, "train", encoders_of(mixed)), weights=(1, 1), seed=0, global_batch_size=8)
    samples = mixture.read(np.arange(8))
    assert samples.pixels_BHW3.shape == (8, 8, 8, 3) and samples.lacks_latents and not mixture.is_whole


def test_pictures_have_the_size_that_the_autoencoder_makes_the_models_latents_of(
    online: Recipe, tmp_path: Path, refusal_of: Refusal
) -> None:
    vae, t5 = save_vae(tmp_path / "vae"), save_t5(tmp_path / "t5")
    recipe = replace(online, data=replace(online.data, vae=str(vae), text=(str(t5),)))
    assert "model.text_embed_dim=12" in refusal_of(lambda: check_encodable(recipe))
    recipe = replace(recipe, model=replace(recipe.model, text_embed_dim=12, max_text_tokens=40))
    assert "latents (5, 8, 8), but the model's are (3, 8, 8)" in refusal_of(lambda: check_encodable(recipe))
    recipe = replace(recipe, model=replace(recipe.model, in_channels=5))
    check_encodable(recipe)
    (dataset,) = open_split(recipe, "train", encoders_of(recipe))
    assert dataset.gather(np.array([0]), np.array([0])).pixels_BHW3.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"path": None}, ["data.path: names no pictures", "--set data.path=SRC"]),
        ({"path": "owner/name"}, ["owner/name: is no file or folder", "on this machine"]),
        ({"path": "{root}/empty"}, ["empty: holds no picture"]),
        ({"path": "{root}/none.tar"}, ["none.tar: holds no sample"]),
        ({"path": "{root}/list.jsonl", "caption_column": "alt"}, ["list.jsonl: has no column 'alt'", "it has image"]),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_before_training(
    online: Recipe, tmp_path: Path, refusal_of: Refusal, change: dict[str, str | None], parts: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.tar").write_bytes(bytes(10240))
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "train/0.jpg", "caption": "a"}) + "\n")
    given = {name: value and value.format(root=tmp_path) for name, value in change.items()}
    recipe = replace(online, data=replace(online.data, **given))  # type: ignore[arg-type]
    message = refusal_of(lambda: validate_split(recipe, "train"))
    assert all(part in message for part in parts), message


def captions_only(folder: Path) -> Path:
    """Write a set without text vectors."""
    text = HashedWordEncoder(embed_dim=24, max_tokens=TOKENS).identity
    return write_set(folder, [(LATENTS, 4)], tokens=TOKENS, width=24, has_text=False, text=text)


def test_a_set_without_text_vectors_gives_captions_alone(tmp_path: Path, refusal_of: Refusal) -> None:
    dataset = LatentDataset(captions_only(tmp_path / "set"))
    samples = dataset.gather(np.array([3, 1]), np.array([0, 1]))
    assert samples.captions == ("set 3", "set 1") and not dataset.is_whole
    assert samples.lacks_text and not samples.lacks_latents
    assert [tuple(t.shape) for t in (samples.text_embeds_BTD, samples.text_mask_BT, samples.text_pooled_BD)] == [
        (2, 0, 0),
        (2, 0),
        (2, 0),
    ]
    assert samples.latents_BCHW[:, 0, 0, 0].tolist() == [3, 1]
    assert "no strings 'text_embeds'" in refusal_of(lambda: dataset.texts("text_embeds", np.array([0])))


def test_sets_with_and_without_text_vectors_are_not_mixed(
    tiny_recipe: Recipe, tiny_config: ModelConfig, tmp_path: Path, refusal_of: Refusal
) -> None:
    text = HashedWordEncoder(embed_dim=24, max_tokens=TOKENS).identity
    paths = (
        str(captions_only(tmp_path / "a")),
        str(write_set(tmp_path / "b", [(LATENTS, 4)], tokens=TOKENS, width=24, text=text)),
    )
    recipe = replace(tiny_recipe, model=tiny_config, data=DataConfig(dataset="encoded", path=paths))
    message = refusal_of(lambda: validate_split(recipe, "train"))
    assert "text vectors not stored in the former, stored in the latter" in message


def test_captions_are_encoded_by_the_encoder_that_the_set_names_and_no_other(
    tiny_recipe: Recipe, tiny_config: ModelConfig, tmp_path: Path, refusal_of: Refusal
) -> None:
    def recipe_of(folder: Path, heldout: Path | None = None) -> Recipe:
        data = DataConfig(dataset="encoded", path=str(folder), heldout_path=str(heldout) if heldout else None)
        return replace(tiny_recipe, model=tiny_config, data=data)

    words = {"kind": "words", "embed_dim": 24, "max_tokens": TOKENS}
    pixels = {"kind": "pixels", "shift_factor": -0.83, "scaling_factor": 2.2, "identity": PixelVAE().identity}

    def name_encoders(folder: Path, identity: str) -> Path:
        index = json.loads((folder / "index.json").read_text())
        index |= {"text_encoder": words | {"identity": identity}, "image_encoder": pixels}
        (folder / "index.json").write_text(json.dumps(index))
        return folder

    own = HashedWordEncoder(embed_dim=24, max_tokens=TOKENS).identity
    good = name_encoders(captions_only(tmp_path / "good"), own)
    check_encodable(recipe_of(good))
    other = name_encoders(captions_only(tmp_path / "other"), "words of another release")
    message = refusal_of(lambda: check_encodable(recipe_of(other)))
    assert "words of another release" in message and own in message
    message = refusal_of(lambda: check_encodable(recipe_of(good, other)))
    assert f"{other}: its captions are for the text encoder words of another release" in message
