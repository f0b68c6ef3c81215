"""Encoders of other makers: they give what their own libraries give, and a doubtful folder is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models import modeling_utils
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel

from ecdit_ds.data.encoders import folders as encoder_folders
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE
from ecdit_ds.data.encoders.folders import fingerprint
from ecdit_ds.data.encoders.pretrained import PRECISIONS, Precision, load_image_encoder, load_text_encoder
from ecdit_ds.data.encoders.spec import (
    count_encoder_parameters,
    image_encoder_spec,
    open_image_encoder,
    open_text_encoder,
    text_encoder_spec,
)
from ecdit_ds.data.sources.images import to_tensor
from tests.helpers.photographs import crops
from tests.helpers.tiny_encoders import SCALING, SHIFT, save_clip_text, save_t5, save_vae

Refusal = Callable[[Callable[[], object]], str]
CAPTIONS = ["a temple", "a yellow flower", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a tiny autoencoder, a T5 and a CLIP."""
    root = tmp_path_factory.mktemp("encoders")
    return {"vae": save_vae(root / "vae"), "t5": save_t5(root / "t5"), "clip": save_clip_text(root / "clip")}


@pytest.fixture
def copy_of(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return `copy_of(name)`: a folder that may be changed."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def test_latents_are_the_mode_shifted_and_scaled_as_the_config_says(folders: dict[str, Path]) -> None:
    encoder = load_image_encoder(str(folders["vae"]))
    images = to_tensor(crops(3, side=24))
    own = AutoencoderKL.from_pretrained(folders["vae"]).eval()
    with torch.no_grad():
        mode = own.encode(images).latent_dist.mode()
        reconstruction = own(images, sample_posterior=False).sample.clamp(-1, 1)
    latents = encoder.encode(images)
    assert encoder.downsampling == 4 and latents.shape == (3, 5, 6, 6)
    torch.testing.assert_close(latents, (mode - SHIFT) * SCALING)
    torch.testing.assert_close(encoder.decode(latents), reconstruction, rtol=0, atol=1e-5)
    assert reconstruction.std() > 0.01


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5, -1.0, 2.0, 0.0, 0.25), (2.0, 0.5, 4.0, 1.0, 8.0)), ((3.0,) * 5, None), (None, (0.5,) * 5)]
)
def test_latents_have_their_mean_and_spread_taken_off_channel_by_channel(
    copy_of: Callable[[str], Path], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    folder = copy_of("vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latents_mean": mean, "latents_std": std}))
    encoder, own = load_image_encoder(str(folder)), AutoencoderKL.from_pretrained(folder).eval()
    images = to_tensor(crops(2, side=24))
    with torch.no_grad():
        mode = own.encode(images).latent_dist.mode()
        reconstruction = own.decode(mode).sample.clamp(-1, 1)
    latents = encoder.encode(images)
    for channel in range(5):  # as diffusers' pipelines do: (latents - latents_mean) * scaling_factor / latents_std
        shift = SHIFT if mean is None else mean[channel]
        spread = 1.0 if std is None else std[channel]
        torch.testing.assert_close(latents[:, channel], (mode[:, channel] - shift) * SCALING / spread)
    torch.testing.assert_close(encoder.decode(latents), reconstruction, rtol=0, atol=1e-4)
    assert reconstruction.std() > 0.01


def test_latents_of_their_own_mean_and_spread_become_those_of_unit_variance(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("vae")
    images = to_tensor(crops(4, side=32))
    with torch.no_grad():
        mode = AutoencoderKL.from_pretrained(folder).eval().encode(images).latent_dist.mode()
    own = {"latents_mean": mode.mean(dim=(0, 2, 3)).tolist(), "latents_std": mode.std(dim=(0, 2, 3)).tolist()}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | own | {"scaling_factor": 1.0}))
    latents = load_image_encoder(str(folder)).encode(images)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(5), rtol=0, atol=1e-4)


def test_t5_gives_its_last_layer_and_the_mean_of_its_tokens(folders: dict[str, Path]) -> None:
    encoder = load_text_encoder([str(folders["t5"])], max_tokens=18)
    assert (encoder.embed_dim, encoder.max_tokens) == (12, 18)
    text = encoder.encode(CAPTIONS)
    counts = encoder.count_tokens(CAPTIONS)
    assert text.mask_BT.sum(dim=1).tolist() == counts
    assert counts[2] == 1, "the end mark stands for no text"
    own = T5EncoderModel.from_pretrained(folders["t5"]).eval()
    ids = encoder.towers[0].tokenizer(CAPTIONS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        alone = own(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(text.embeds_BTD[1, : counts[1]], alone)
    torch.testing.assert_close(text.pooled_BD[1], alone.mean(dim=0))
    assert (text.embeds_BTD[~text.mask_BT] == 0).all()
    assert torch.equal(encoder.null().embeds_BTD, encoder.encode([""]).embeds_BTD)


def test_clip_gives_its_own_pooled_vector(folders: dict[str, Path]) -> None:
    encoder = load_text_encoder([str(folders["clip"])])
    assert encoder.max_tokens == 20, "its positions end there"
    own = CLIPTextModel.from_pretrained(folders["clip"]).eval()
    ids = encoder.towers[0].tokenizer(CAPTIONS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        pooled = own(input_ids=ids).pooler_output[0]
    torch.testing.assert_close(encoder.encode(CAPTIONS).pooled_BD[0], pooled)


def test_two_encoders_stand_side_by_side(folders: dict[str, Path]) -> None:
    t5, clip = (load_text_encoder([str(folders[name])], max_tokens=30) for name in ("t5", "clip"))
    both = load_text_encoder([str(folders["t5"]), str(folders["clip"])], max_tokens=30)
    text = both.encode(CAPTIONS)
    assert text.embeds_BTD.shape == (3, 30, 28) and text.pooled_BD.shape == (3, 28)
    assert torch.equal(text.embeds_BTD[:, :, :12], t5.encode(CAPTIONS).embeds_BTD)
    assert torch.equal(text.embeds_BTD[:, :20, 12:], clip.encode(CAPTIONS).embeds_BTD)
    assert (text.embeds_BTD[:, 20:, 12:] == 0).all()
    assert torch.equal(text.mask_BT[:, :20], t5.encode(CAPTIONS).mask_BT[:, :20] | clip.encode(CAPTIONS).mask_BT)
    long_caption = "a flower with 24 tokens"  # more than CLIP's 20, fewer than T5's 30
    assert clip.count_tokens([long_caption])[0] > 20
    assert both.encode([long_caption]).mask_BT.sum() == both.count_tokens([long_caption])[0]


def test_half_the_bytes_of_an_encoder_give_nearly_the_same_and_another_identity(folders: dict[str, Path]) -> None:
    images = to_tensor([crop.resize((32, 32)) for crop in crops(2)])
    full, half = (load_image_encoder(str(folders["vae"]), precision=precision) for precision in PRECISIONS)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    one, other = full.encode(images), half.encode(images)
    assert other.dtype == half.decode(other).dtype == torch.float32
    assert 0 < (one - other).abs().max() < 0.03 * one.abs().max()
    assert half.identity == f"{full.identity}-bf16"

    names = [str(folders["t5"]), str(folders["clip"])]
    words, short = (load_text_encoder(names, max_tokens=30, precision=precision) for precision in PRECISIONS)
    text, rough = words.encode(CAPTIONS), short.encode(CAPTIONS)
    assert rough.embeds_BTD.dtype == rough.pooled_BD.dtype == torch.float32
    assert torch.equal(text.mask_BT, rough.mask_BT)
    for fine, coarse in ((text.embeds_BTD, rough.embeds_BTD), (text.pooled_BD, rough.pooled_BD)):
        assert 0 < (fine - coarse).abs().max() < 0.03 * fine.abs().max()
    assert short.identity == f"{words.identity}-bf16"


def test_a_caption_over_the_limit_is_refused(folders: dict[str, Path], refusal_of: Refusal) -> None:
    encoder = load_text_encoder([str(folders["t5"])], max_tokens=10)
    assert "12 tokens are more than the text encoder's 10" in refusal_of(lambda: encoder.encode(["abcdefghij"]))


def test_an_identity_is_that_of_the_weights_and_not_of_the_place(
    folders: dict[str, Path], copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    identity = load_image_encoder(str(folders["vae"])).identity
    assert load_image_encoder(str(copy_of("vae"))).identity == identity
    assert load_image_encoder(str(save_vae(tmp_path / "other", seed=1))).identity != identity
    both = load_text_encoder([str(folders["t5"]), str(folders["clip"])])
    assert both.identity != load_text_encoder([str(folders["clip"]), str(folders["t5"])]).identity
    assert both.identity != load_text_encoder([str(folders["t5"]), str(folders["clip"])], max_tokens=64).identity


def test_one_bit_at_the_end_of_a_long_weight_makes_another_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_folders, "_CHUNK_BYTES", 4096)  # so that it is long
    weight = torch.zeros(5000)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    identity = fingerprint(tmp_path)
    weight[-1] = 1e-9
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != identity


@pytest.mark.parametrize("precision", PRECISIONS)
def test_encoders_are_opened_again_by_their_facts_in_their_precision_and_where_they_are_now(
    folders: dict[str, Path], copy_of: Callable[[str], Path], refusal_of: Refusal, precision: Precision
) -> None:
    image = load_image_encoder(str(folders["vae"]), precision=precision)
    told = image_encoder_spec(image, str(folders["vae"]))
    moved = told | {"name": "/gone"}
    for opened in (open_image_encoder(told), open_image_encoder(moved, name=str(copy_of("vae")))):
        assert (opened.identity, {p.dtype for p in opened.model.parameters()}) == (  # type: ignore[attr-defined]
            image.identity,
            {p.dtype for p in image.model.parameters()},
        )
    names = [str(folders["t5"]), str(folders["clip"])]
    text = load_text_encoder(names, max_tokens=20, precision=precision)
    told = text_encoder_spec(text, names)
    moved = told | {"names": ["/gone", "/gone"]}
    for words in (open_text_encoder(told), open_text_encoder(moved, names=[str(copy_of("t5")), names[1]])):
        assert (words.identity, words.max_tokens) == (text.identity, 20)
    assert "/gone" in refusal_of(lambda: open_text_encoder(moved))
    assert "was encoded with" in refusal_of(lambda: open_text_encoder(moved, names=names[::-1]))


def test_encoders_that_need_no_folder_are_given_none(refusal_of: Refusal) -> None:
    image, text = image_encoder_spec(PixelVAE()), text_encoder_spec(HashedWordEncoder(embed_dim=6, max_tokens=4))
    assert "--vae: has no effect" in refusal_of(lambda: open_image_encoder(image, name="somewhere"))
    assert "--text: has no effect" in refusal_of(lambda: open_text_encoder(text, names=["somewhere"]))


def test_all_weights_of_frozen_encoders_are_counted(folders: dict[str, Path]) -> None:
    one, other = (load_text_encoder([str(folders[name])]) for name in ("t5", "clip"))
    both = load_text_encoder([str(folders["t5"]), str(folders["clip"])], precision="bf16")
    (one_count, one_bytes), (other_count, _) = count_encoder_parameters(one), count_encoder_parameters(other)
    assert one_count > 0 and other_count > 0 and one_bytes == 4 * one_count
    assert count_encoder_parameters(both) == (one_count + other_count, 2 * (one_count + other_count))
    image = load_image_encoder(str(folders["vae"]))
    count = sum(parameter.numel() for parameter in image.model.parameters())
    assert count_encoder_parameters(image) == (count, 4 * count)
    assert (
        count_encoder_parameters(PixelVAE())
        == count_encoder_parameters(HashedWordEncoder(embed_dim=6, max_tokens=4))
        == (0, 0)
    )


def test_loading_an_autoencoder_warns_of_nothing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda *words, **_: said.append(words))
    for precision in PRECISIONS:
        load_image_encoder(str(folders["vae"]), precision=precision)
    assert said == []


@pytest.mark.parametrize("name", ["vae", "t5"])
def test_pickled_weights_are_refused(copy_of: Callable[[str], Path], refusal_of: Refusal, name: str) -> None:
    folder = copy_of(name)
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    load = load_image_encoder if name == "vae" else lambda folder: load_text_encoder([folder])
    message = refusal_of(lambda: load(str(folder)))
    assert "pickled weights" in message and ".bin" in message


@pytest.mark.parametrize(("name", "part"), [("vae", "conv_out"), ("t5", "layer_norm"), ("clip", "position")])
def test_a_missing_weight_is_refused(copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, part: str) -> None:
    (path,) = (folder := copy_of(name)).glob("*.safetensors")
    kept = {key: value for key, value in load_file(path).items() if part not in key}
    save_file(kept, path, metadata={"format": "pt"})
    load = load_image_encoder if name == "vae" else lambda folder: load_text_encoder([folder])
    message = refusal_of(lambda: load(str(folder)))
    assert "would be random" in message and part in message


def test_folders_that_are_no_encoders_are_refused(
    copy_of: Callable[[str], Path], refusal_of: Refusal, tmp_path: Path
) -> None:
    assert "has no config.json" in refusal_of(lambda: load_image_encoder(str(tmp_path)))
    assert "nor can it be a name on the hub" in refusal_of(lambda: load_image_encoder("/no/where"))
    folder = copy_of("vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderDC"}))
    assert "is a AutoencoderDC" in refusal_of(lambda: load_image_encoder(str(folder)))
    (folder / "config.json").write_text("{")
    assert "cannot be read" in refusal_of(lambda: load_image_encoder(str(folder)))
    folder = copy_of("t5")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in refusal_of(lambda: load_text_encoder([str(folder)]))


NONSENSE: dict[str, list[Any]] = {
    "scaling_factor": ["0.18", None, 0, math.nan, math.inf, 1e300, 1e-300, [1.0, 2.0], {}],
    "shift_factor": ["x", math.nan, 1e300, [0.1, 0.2]],
    "latents_mean": [[0.1, 0.2], ["x"] * 5, [math.nan] * 5, "x"],
    "latents_std": [[0.0] * 5, [1.0, 1.0], [math.inf] * 5, []],
    "layers_per_block": [10**9, -1, 1.5, "two", None, []],
    "block_out_channels": [[10**7] * 3, [8] * 10**4, [], 8, None, ["8"] * 3, [8, 8]],
    "norm_num_groups": [0, 3, -4, "4", None],
    "latent_channels": [10**9, -1, 0, "5", None],
    "in_channels": [4, -1, 10**9, "3"],
    "down_block_types": ["none", 7, None, ["Evil"] * 3],
    "act_fn": ["none", 7, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values])
def test_nonsense_in_an_autoencoders_configuration_is_refused_in_one_line(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, value: Any
) -> None:
    path = copy_of("vae") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    message = refusal_of(lambda: load_image_encoder(str(path.parent)))
    assert message.startswith(f"image encoder {path.parent}: ") and len(message) < 500


@pytest.mark.parametrize(
    ("name", "value", "what"), [("layers_per_block", 400, "400 layers"), ("latent_channels", 4096, "numbers")]
)
def test_an_autoencoder_far_larger_than_its_files_is_refused_before_memory_is_taken(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, value: int, what: str
) -> None:
    path = copy_of("vae") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    message = refusal_of(lambda: load_image_encoder(str(path.parent)))
    assert "its config.json tells of" in message and what in message and "its files hold" in message


@pytest.mark.parametrize(
    ("name", "field", "value", "what"),
    [
        ("t5", "num_layers", 10**7, "10000000 layers"),
        ("t5", "d_ff", 4 * 10**8, "numbers"),
        ("t5", "vocab_size", 2 * 10**9, "numbers"),
        ("clip", "num_hidden_layers", 10**7, "10000000 layers"),
        ("clip", "max_position_embeddings", 4 * 10**8, "numbers"),
    ],
)
def test_a_text_model_far_larger_than_its_files_is_refused_before_memory_is_taken(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, field: str, value: int, what: str
) -> None:
    path = copy_of(name) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    message = refusal_of(lambda: load_text_encoder([str(path.parent)]))
    assert "its config.json tells of" in message and what in message and "its files hold" in message


@pytest.mark.parametrize("text", ["[]", "7", "[" * 100_000, "\x00", '{"_class_name": ["AutoencoderKL"]}'])
def test_a_configuration_that_is_none_is_refused_in_one_line(
    copy_of: Callable[[str], Path], refusal_of: Refusal, text: str
) -> None:
    path = copy_of("vae") / "config.json"
    path.write_text(text)
    message = refusal_of(lambda: load_image_encoder(str(path.parent)))
    assert str(path.parent) in message and len(message) < 500


def test_code_in_a_folder_is_not_run(copy_of: Callable[[str], Path], refusal_of: Refusal, tmp_path: Path) -> None:
    folder = copy_of("t5")
    config = json.loads((folder / "config.json").read_text())
    changes = {"model_type": "novelty", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refusal_of(lambda: load_text_encoder([str(folder)]))
    assert not (tmp_path / "ran").exists()


def test_a_batch_does_not_change_what_a_caption_means(folders: dict[str, Path]) -> None:
    encoder = load_text_encoder([str(folders["t5"]), str(folders["clip"])], max_tokens=20)
    together, alone = encoder.encode(CAPTIONS), encoder.encode(CAPTIONS[1:2])
    np.testing.assert_allclose(together.embeds_BTD[1], alone.embeds_BTD[0], atol=1e-5)
