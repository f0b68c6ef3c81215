"""Pictures without an autoencoder: latents of mean 0 and deviation 1, whatever the pictures, and a warning else."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE
from ecdit_ds.data.encoders.from_recipe import encoders_of
from ecdit_ds.data.encoders.online import online_encoders
from ecdit_ds.data.encoders.spec import image_encoder_spec, text_encoder_spec
from ecdit_ds.data.latents.dataset import LatentDataset, Samples
from ecdit_ds.data.mixture import SampleSet
from ecdit_ds.data.normalization import Moments, mixed, normalizing_codec, warning_of
from ecdit_ds.data.precompute.job import PrecomputeJob, encode_corpus
from ecdit_ds.data.precompute.unit import EncodeSettings
from ecdit_ds.data.raw_dataset import RawImageDataset, measure_pixels, open_raw_set
from ecdit_ds.data.sources.images import from_pixels
from ecdit_ds.data.sources.open import open_source
from ecdit_ds.data.splits import open_split, validate_split
from ecdit_ds.errors import ExitCode
from ecdit_ds.training.dry_run import _data
from tests.helpers.made_sets import write_set
from tests.helpers.own_pictures import SIDE, encode, write_pictures
from tools import encode_data

Refusal = Callable[[Callable[[], object]], str]
COUNT = 12


@pytest.fixture
def recipe(tiny_recipe: Recipe, tiny_config: ModelConfig, tmp_path: Path) -> Recipe:
    """Return a recipe of bright pictures, encoded without an autoencoder, with darker ones held out."""
    write_pictures(tmp_path / "pictures", COUNT)
    write_pictures(tmp_path / "more", 4, grounds=("night", "white"), seed=1)
    data = DataConfig(
        dataset="encoded",
        path=str(encode(tmp_path / "pictures", tmp_path / "train")),
        heldout_path=str(encode(tmp_path / "more", tmp_path / "heldout")),
    )
    model = replace(tiny_config, patch_size=4, latent_height=SIDE, latent_width=SIDE, max_text_tokens=12)
    return replace(tiny_recipe, model=model, data=data)


def with_data(recipe: Recipe, **changes: object) -> Recipe:
    """Return the recipe with some fields of its data changed."""
    return replace(recipe, data=replace(recipe.data, **changes))  # type: ignore[arg-type]


def latents_of(of_set: SampleSet) -> Tensor:
    """Return all latents of a set, in order."""
    return everything(of_set).latents_BCHW.double()


def everything(of_set: SampleSet) -> Samples:
    """Return all samples of a set, in order."""
    return of_set.gather(np.arange(len(of_set)), np.arange(len(of_set)))


def moments_of(latents_BCHW: Tensor) -> list[float]:
    """Return mean and deviation of each channel."""
    return [*latents_BCHW.mean((0, 2, 3)).tolist(), *latents_BCHW.std((0, 2, 3), correction=0).tolist()]


def test_bright_pictures_become_latents_of_mean_0_and_deviation_1_and_come_back(recipe: Recipe, tmp_path: Path) -> None:
    (train,) = open_split(recipe, "train", None)
    assert moments_of(latents_of(train)) == pytest.approx([0, 0, 0, 1, 1, 1], abs=1e-4)
    stored = LatentDataset(tmp_path / "train")  # as an inspection sees it
    codec = encoders_of(recipe)[0]
    assert float(latents_of(stored).max()) == pytest.approx(1.0), "pixels"
    torch.testing.assert_close(codec.decode(latents_of(train)), latents_of(stored).float())
    assert torch.equal(train[3].latents_CHW.double(), latents_of(train)[3])  # type: ignore[index]


def test_the_held_out_set_goes_through_the_training_sets_factors(recipe: Recipe, tmp_path: Path) -> None:
    (heldout,) = open_split(recipe, "heldout", None)
    pixels = latents_of(LatentDataset(tmp_path / "heldout"))
    codec = normalizing_codec(LatentDataset(tmp_path / "train").index.moments)
    assert torch.equal(latents_of(heldout).float(), codec.encode(pixels))
    assert moments_of(latents_of(heldout))[0] < -0.5, "darker than what is trained on"
    given = PixelVAE(shift_factor=0.25, scaling_factor=3.0)  # as evaluating a checkpoint hands in its own
    (heldout,) = open_split(recipe, "heldout", (given, encoders_of(recipe)[1]))
    assert torch.equal(latents_of(heldout).float(), given.encode(pixels))


def test_several_sets_are_normalised_together_by_how_often_each_is_read(recipe: Recipe, tmp_path: Path) -> None:
    paths = (str(tmp_path / "train"), str(tmp_path / "heldout"))
    both = with_data(recipe, path=paths, weights=(1.0, 3.0), heldout_path=None)
    sets = [latents_of(of_set) for of_set in open_split(both, "train", None)]
    mean, square = (
        0.25 * (sets[0] ** power).mean((0, 2, 3)) + 0.75 * (sets[1] ** power).mean((0, 2, 3)) for power in (1, 2)
    )
    assert [*mean.tolist(), *square.tolist()] == pytest.approx([0, 0, 0, 1, 1, 1], abs=1e-4)
    assert encoders_of(both)[0].identity != encoders_of(recipe)[0].identity


def test_moments_of_a_mixture_are_those_of_all_its_numbers(draw: Callable[..., Tensor]) -> None:
    parts = [draw("a", 5, 2, 3, 4) + 3, 0.1 * draw("b", 15, 2, 3, 4)]
    moments = [Moments(mean_C=tuple(m[:2]), std_C=tuple(m[2:])) for m in (moments_of(part.double()) for part in parts)]
    found = mixed(moments, [float(Fraction(1, 4)), 0.75])
    assert [*found.mean_C, *found.std_C] == pytest.approx(moments_of(torch.cat(parts).double()))


@pytest.mark.parametrize("flag", [(), ("--captions-only",), ("--dtype", "bf16")])
def test_a_set_is_normalised_however_it_is_stored(recipe: Recipe, tmp_path: Path, flag: tuple[str, ...]) -> None:
    other = with_data(recipe, path=str(encode(tmp_path / "pictures", tmp_path / "other", *flag)))
    encoders = encoders_of(other) if "--captions-only" in flag else None
    (train,) = open_split(other, "train", encoders)
    assert moments_of(latents_of(train)) == pytest.approx([0, 0, 0, 1, 1, 1], abs=1e-4)
    if encoders:
        assert train.null_text.embeds_BTD.shape == (1, 12, 24) and not train.is_whole


def test_raw_files_go_through_the_factors_of_the_same_pictures_encoded(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "bad.png").write_bytes(b"")
    (tmp_path / "pictures" / "bad.txt").write_text("nothing")
    online = with_data(recipe, path=str(tmp_path / "pictures"), heldout_path=str(tmp_path / "more"), encode="online")
    images, words = encoders_of(online)
    assert images.identity == encoders_of(recipe)[0].identity
    (raw,) = open_split(online, "heldout", (images, words))
    assert isinstance(raw, RawImageDataset)
    finished = online_encoders(images, words, torch.device("cpu")).finish([everything(raw)])[0].latents_BCHW
    (heldout,) = open_split(recipe, "heldout", None)
    assert torch.equal(finished, latents_of(heldout).float())


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_several_raw_sources_are_normalised_as_the_same_pictures_encoded(
    recipe: Recipe, tmp_path: Path, weights: tuple[float, ...]
) -> None:
    both = {"weights": weights, "heldout_path": None}
    encoded = with_data(recipe, path=(str(tmp_path / "train"), str(tmp_path / "heldout")), **both)
    raw = with_data(recipe, path=(str(tmp_path / "pictures"), str(tmp_path / "more")), encode="online", **both)
    assert encoders_of(raw)[0].identity == encoders_of(encoded)[0].identity != encoders_of(recipe)[0].identity


def test_of_many_raw_files_some_are_looked_at(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecdit_ds.data.raw_dataset.MAX_MEASURED", 3)
    read: list[int] = []
    gather = RawImageDataset.gather

    def noted(self: RawImageDataset, indices: Any, stream_indices: Any) -> Samples:
        read.extend(indices)
        return gather(self, indices, stream_indices)

    monkeypatch.setattr(RawImageDataset, "gather", noted)
    encoders_of(with_data(recipe, path=str(tmp_path / "pictures"), encode="online", num_workers=3))
    assert read == [0, 6, 11]


def test_bad_pictures_are_not_counted_as_black_ones_wherever_they_are(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (1, 7, 9):
        sorted((tmp_path / "pictures").glob("*.png"))[place].write_bytes(b"")
    data = replace(recipe.data, path=str(tmp_path / "pictures"), encode="online")
    words = HashedWordEncoder(embed_dim=24, max_tokens=12)
    dataset = open_raw_set(str(data.path), data, latents=(3, SIDE, SIDE), downsampling=1, text_encoder=words)
    samples = everything(dataset)
    assert sorted(samples.bad) == [1, 7, 9]
    good = [place for place in range(COUNT) if place not in samples.bad]
    expected = moments_of(from_pixels(samples.pixels_BHW3[good]).double())
    for at_once in (1, 2, 5, 64):
        monkeypatch.setattr("ecdit_ds.data.raw_dataset._MEASURED_AT_ONCE", at_once)
        found = measure_pixels(dataset)
        assert [*found.mean_C, *found.std_C] == pytest.approx(expected)


def test_a_codec_leaves_latents_that_are_no_pixels_as_they_are(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [((3, 2, 2), 5)])
    as_stored = latents_of(LatentDataset(folder))
    assert torch.equal(latents_of(LatentDataset(folder, codec=PixelVAE())), as_stored)


def test_raw_files_of_which_none_can_be_used_are_refused(recipe: Recipe, tmp_path: Path, refusal_of: Refusal) -> None:
    for picture in (tmp_path / "pictures").glob("*.png"):
        picture.write_bytes(b"")
    online = with_data(recipe, path=str(tmp_path / "pictures"), encode="online")
    assert f"{tmp_path / 'pictures'}: none of {COUNT} samples looked at" in refusal_of(lambda: encoders_of(online))


@pytest.mark.parametrize("encode_when", ["offline", "online"])
def test_a_recipe_may_say_the_factors(recipe: Recipe, tmp_path: Path, encode_when: str) -> None:
    asked = with_data(recipe, shift_factor=(-0.83,), scaling_factor=(2.2,), encode=encode_when)
    if encode_when == "online":
        asked = with_data(asked, path=str(tmp_path / "pictures"))
    assert encoders_of(asked)[0] == PixelVAE(), "to the last bit what earlier releases did"
    asked = with_data(asked, shift_factor=(0.1, 0.2, 0.3), scaling_factor=(1.0, 2.0, 3.0))
    assert encoders_of(asked)[0] == PixelVAE(shift_factor=(0.1, 0.2, 0.3), scaling_factor=(1.0, 2.0, 3.0))
    if encode_when == "offline":
        (heldout,) = open_split(asked, "heldout", None)
        pixels = latents_of(LatentDataset(tmp_path / "heldout"))
        assert torch.equal(latents_of(heldout).float(), encoders_of(asked)[0].encode(pixels))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"shift_factor": (0.0, 1.0), "scaling_factor": (1.0, 1.0)}, "data.shift_factor: 2 numbers"),
        ({"shift_factor": (0.0,)}, "data.scaling_factor: 0; give one of each"),
        ({"shift_factor": (0.0,), "scaling_factor": (0.0,)}, "data.scaling_factor: [0.0]"),
        ({"shift_factor": (0.0,), "scaling_factor": (-2.0,)}, "data.scaling_factor: [-2.0]"),
        ({"shift_factor": (math.nan,), "scaling_factor": (1.0,)}, "data.shift_factor: [nan]"),
        ({"shift_factor": (0.0,), "scaling_factor": (1.0,), "encode": "online", "vae": "v"}, "with data.vae: v"),
        ({"dataset": "digit_scenes", "shift_factor": (0.0,), "scaling_factor": (1.0,)}, "data.dataset: digit_scenes"),
    ],
)
def test_factors_that_cannot_work_or_have_no_effect_are_refused(
    change: dict[str, object], part: str, refusal_of: Refusal
) -> None:
    assert part in refusal_of(lambda: DataConfig(**({"dataset": "encoded"} | change)))  # type: ignore[arg-type]


def test_factors_for_a_set_of_latents_are_refused(recipe: Recipe, tmp_path: Path, refusal_of: Refusal) -> None:
    made = write_set(tmp_path / "made", [((3, SIDE, SIDE), 4)], tokens=12, width=24)
    asked = with_data(recipe, path=str(made), heldout_path=None, shift_factor=(0.0,), scaling_factor=(1.0,))
    assert f"no effect on {made}, which holds latents of made pictures" in refusal_of(
        lambda: validate_split(asked, "train")
    )


def encode_as_before(pictures: Path, folder: Path) -> Path:
    """Encode as earlier releases did, all pictures by the factors of digit scenes."""
    image, text = PixelVAE(), HashedWordEncoder(embed_dim=24, max_tokens=12)
    encoding = EncodeSettings(
        image_encoder=image, text_encoder=text, sizes=((SIDE, SIDE),), dtype="float32", batch_size=4, threads=1
    )
    encode_corpus(
        PrecomputeJob(
            source=open_source(str(pictures), unit_samples=8),
            destination=folder,
            encoding=encoding,
            image_facts=image_encoder_spec(image),
            text_facts=text_encoder_spec(text),
            settings={},
        )
    )
    return folder


def test_a_set_of_an_earlier_release_stays_as_it_was_and_is_warned_of(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal_of: Refusal
) -> None:
    before = encode_as_before(tmp_path / "pictures", tmp_path / "before")
    old = with_data(recipe, path=str(before), heldout_path=None)
    (train,) = open_split(old, "train", None)
    assert encoders_of(old)[0] == PixelVAE()
    pixels = latents_of(LatentDataset(tmp_path / "train"))
    assert torch.equal(latents_of(train).float(), PixelVAE().encode(pixels)) and moments_of(latents_of(train))[0] > 2
    assert encode_data.main(["inspect", str(before)]) == ExitCode.DONE
    for said in (capsys.readouterr().err, "\n".join(_data(old))):
        assert said.count("warning") == 1 and str(before) in said
        assert "far from mean 0 and deviation 1: mean 3." in said and "encode the pictures anew" in said
    mixture = with_data(recipe, path=(str(before), str(tmp_path / "train")))
    assert "image encoder pixels-2--0.83-2.2 in the former" in refusal_of(lambda: validate_split(mixture, "train"))


def test_pixels_that_training_normalises_are_not_warned_of(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert encode_data.main(["inspect", str(tmp_path / "train")]) == ExitCode.DONE
    shown = capsys.readouterr()
    assert "warning" not in shown.err and "pixels  mean" in shown.out and "training normalises them" in shown.out
    lines = "\n".join(_data(with_data(recipe, heldout_path=str(tmp_path / "train"))))
    assert "warning" not in lines and "by the training set's own factors: minus 0." in lines
    wrong = with_data(recipe, shift_factor=(-3.0,), scaling_factor=(1.0,))
    lines = "\n".join(_data(wrong))
    assert lines.count("warning") == 2 and "as data.shift_factor and scaling_factor say: minus -3, times 1" in lines


@pytest.mark.parametrize(
    ("mean", "std", "is_well"),
    [
        ((0.9, -0.9), (0.6, 1.9), True),
        ((0.0, 1.1), (1.0, 1.0), False),
        ((-1.1, 0.0), (1.0, 1.0), False),
        ((0.0, 0.0), (1.0, 2.1), False),
        ((0.0, 0.0), (0.4, 1.0), False),
        ((0.0, math.nan), (1.0, 1.0), False),
    ],
)
def test_latents_of_an_autoencoder_are_warned_of_where_a_channel_is_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mean: tuple[float, ...], std: tuple[float, ...], is_well: bool
) -> None:
    warning = warning_of(Moments(mean_C=mean, std_C=std), is_of_pixels=False)
    assert (warning is None) == is_well
    assert is_well or (warning is not None and "scaling_factor" in warning and "within -1 to 1" in warning)
    if not all(map(math.isfinite, mean)):
        return
    folder = write_set(tmp_path / "made", [((2, 4, 4), 2)])
    index = json.loads((folder / "index.json").read_text()) | {"latents_mean": mean, "latents_std": std}
    (folder / "index.json").write_text(json.dumps(index))
    encode_data.main(["inspect", str(folder)])  # it cannot draw a sheet of these
    assert ("warning" in capsys.readouterr().err) != is_well


def test_a_channel_of_one_colour_is_not_scaled_without_bound(draw: Callable[..., Tensor]) -> None:
    codec = normalizing_codec(Moments(mean_C=(1.0, 0.0, 0.0), std_C=(0.0, 0.5, 0.25)))
    assert codec.scaling_factor == (127.5, 2.0, 4.0)
    images = draw("images", 2, 3, 4, 5).clamp(-1, 1)
    torch.testing.assert_close(codec.decode(codec.encode(images)), images)
    assert torch.equal(from_pixels(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)), torch.ones(1, 3, 2, 2))
