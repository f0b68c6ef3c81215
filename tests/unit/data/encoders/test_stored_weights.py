"""Files of frozen models: what is quantised or left over is refused by name, what is only more than needed is not."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecdit_ds.data.encoders.pretrained import load_image_encoder, load_text_encoder
from ecdit_ds.data.encoders.stored_weights import opening
from ecdit_ds.errors import DataError
from ecdit_ds.evaluation.clip import load_clip
from ecdit_ds.evaluation.features import load_feature_model
from tests.helpers.tiny_encoders import randomize, save_clip_text, save_t5, save_vae
from tests.helpers.tiny_judges import save_clip, save_vit

Refusal = Callable[[Callable[[], object]], str]
CPU = torch.device("cpu")
CAPTIONS = ["a temple", "a yellow flower", ""]
LOADERS: dict[str, Callable[[str], object]] = {
    "vae": load_image_encoder,
    "t5": lambda folder: load_text_encoder([folder]),
    "clip": lambda folder: load_text_encoder([folder]),
    "vit judge": lambda folder: load_feature_model(folder, device=CPU),
    "clip judge": lambda folder: load_clip(folder, device=CPU),
}
LAYERS = {
    "vae": "encoder.conv_in",
    "t5": "encoder.block.0.layer.0.SelfAttention.q",
    "clip": "encoder.layers.0.mlp.fc1",
    "vit judge": "encoder.layer.1.intermediate.dense",
    "clip judge": "text_model.encoder.layers.1.mlp.fc1",
}
"""One of each model's, as its file calls it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a tiny model of each kind that is loaded."""
    root = tmp_path_factory.mktemp("models")
    savers = {"vae": save_vae, "t5": save_t5, "clip": save_clip_text, "vit judge": save_vit, "clip judge": save_clip}
    return {name: saver(root / name) for name, saver in savers.items()}


@pytest.fixture
def copy_of(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return `copy_of(name)`: a folder that may be changed."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the tensors of a folder's only file of weights."""
    (path,) = folder.glob("*.safetensors")
    edit(tensors := load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def cut(folder: Path) -> Path:
    """Cut a folder's weights into two shards; only what the index names by now is in it."""
    (path,) = folder.glob("*.safetensors")
    tensors, weight_map = load_file(path), dict[str, str]()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        shard = f"{path.stem}-{number + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    path.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{path.name}.index.json").write_text(json.dumps(index))
    return folder


def quantised(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a weight in eight bits that needs its scale."""
    top = 127.0 if dtype in (torch.int8, torch.uint8) else torch.finfo(dtype).max
    scale = weight.abs().max() / top
    return (weight / scale).to(dtype), scale.reshape(1)


@pytest.mark.parametrize(
    ("dtype", "kind", "suffix", "is_cut"),
    [
        (torch.float8_e4m3fn, "F8_E4M3", "scale_weight", False),
        (torch.float8_e5m2, "F8_E5M2", None, True),  # cast and no more: an eighth of each number is gone
        (torch.int8, "I8", "SCB", True),
        (torch.uint8, "U8", "weight.absmax", False),
    ],
)
@pytest.mark.parametrize("name", LOADERS)
def test_weights_in_eight_bits_are_refused_by_name(
    copy_of: Callable[[str], Path],
    refusal_of: Refusal,
    name: str,
    dtype: torch.dtype,
    kind: str,
    suffix: str | None,
    is_cut: bool,
) -> None:
    folder, weight = copy_of(name), f"{LAYERS[name]}.weight"

    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors[weight], scale = quantised(tensors[weight], dtype)
        if suffix is not None:
            tensors[f"{LAYERS[name]}.{suffix}"] = scale

    change(folder, quantise)
    message = refusal_of(lambda: LOADERS[name](str(cut(folder) if is_cut else folder)))
    assert f"is quantised (1 tensors such as {weight!r} are stored as {kind})" in message and str(folder) in message
    assert message.endswith("name the original, or dequantise it and save it in bf16 or fp32")


@pytest.mark.parametrize(
    ("name", "part"), [("vae", None), ("t5", None), ("clip judge", "text_config"), ("vit judge", None)]
)
def test_a_configuration_that_tells_of_quantised_weights_is_believed(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, part: str | None
) -> None:
    path = copy_of(name) / "config.json"
    config = json.loads(path.read_text())
    told = {"quantization_config": {"quant_method": "novelty", "bits": 8}}
    path.write_text(json.dumps(config | (told if part is None else {part: config.get(part, {}) | told})))
    message = refusal_of(lambda: LOADERS[name](str(path.parent)))
    assert "is quantised (config.json has a quantization_config, 'novelty')" in message


@pytest.mark.parametrize(
    ("suffix", "is_cut"),
    [("scale_weight", False), ("weight_scale_inv", True), ("SCB", True), ("weight.absmax", False)],
)
@pytest.mark.parametrize("name", LOADERS)
def test_what_a_model_has_no_place_for_is_refused_by_name(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, suffix: str, is_cut: bool
) -> None:
    folder, more = copy_of(name), f"{LAYERS[name]}.{suffix}"
    if is_cut:  # into a shard, whose index does not say so
        path = min(cut(folder).glob("*.safetensors"))
        save_file(load_file(path) | {more: torch.ones(1)}, path, metadata={"format": "pt"})
    else:
        change(folder, lambda tensors: tensors.update({more: torch.ones(1)}))
    message = refusal_of(lambda: LOADERS[name](str(folder)))
    assert "1 tensors of its files have no place in the model, such as" in message
    own = more.replace("encoder.layer.1.intermediate.dense", "layers.1.mlp.fc1")  # as a ViT itself calls it
    assert repr(own) in message and message.endswith("save it anew, whole")


@pytest.mark.parametrize(("name", "layers"), [("t5", "num_layers"), ("vit judge", "num_hidden_layers")])
def test_layers_that_the_configuration_does_not_tell_of_are_refused(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, layers: str
) -> None:
    folder = copy_of(name)
    config = json.loads((folder / "config.json").read_text())
    if name == "t5":  # has but one
        double = {k.replace("block.0", "block.1"): v for k, v in load_file(folder / "model.safetensors").items()}
        change(folder, lambda tensors: tensors.update(double))
    else:
        (folder / "config.json").write_text(json.dumps(config | {layers: 1}))
    assert "have no place in the model, such as" in refusal_of(lambda: LOADERS[name](str(folder)))


def test_an_autoencoder_takes_all_of_its_file_or_none(copy_of: Callable[[str], Path], refusal_of: Refusal) -> None:
    folder = copy_of("vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_quant_conv": False}))
    assert "such as 'quant_conv.bias'" in refusal_of(lambda: load_image_encoder(str(folder)))


def test_an_autoencoder_with_the_names_of_before_is_taken(
    copy_of: Callable[[str], Path], folders: dict[str, Path]
) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for name in [name for name in tensors if "attentions" in name]:
            renamed = name
            for new, before in old.items():
                renamed = renamed.replace(new, before)
            tensors[renamed] = tensors.pop(name)

    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    encoder = load_image_encoder(str(change(copy_of("vae"), rename)))
    assert torch.equal(encoder.encode(images), load_image_encoder(str(folders["vae"])).encode(images))
    assert isinstance(encoder.model, AutoencoderKL)


def states(folder: Path) -> Tensor:
    """Return what a text encoder makes of the captions."""
    return load_text_encoder([str(folder)], max_tokens=20).encode(CAPTIONS).embeds_BTD


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 0.0), (torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_whole_weights_are_taken_in_one_file_or_several(
    copy_of: Callable[[str], Path], folders: dict[str, Path], dtype: torch.dtype, error: float, is_cut: bool
) -> None:
    folder = change(copy_of("t5"), lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    found = states(cut(folder) if is_cut else folder)
    torch.testing.assert_close(found, states(folders["t5"]), rtol=0, atol=error)
    save_file({"weight": torch.zeros(1).to(torch.float8_e4m3fn)}, folder / "model.fp8.safetensors")
    assert torch.equal(states(folder), found), "a variant beside the weights is not loaded"


@pytest.mark.parametrize("more", ["lm_head.weight", "encoder.embed_tokens.weight"])
def test_the_encoder_of_a_whole_t5_is_taken(
    folders: dict[str, Path], copy_of: Callable[[str], Path], more: str
) -> None:
    folder = copy_of("t5")
    whole = randomize(transformers.T5ForConditionalGeneration(transformers.T5Config.from_pretrained(folder)), seed=1)
    whole.encoder.load_state_dict(transformers.T5EncoderModel.from_pretrained(folder).encoder.state_dict())
    whole.save_pretrained(folder)
    change(folder, lambda tensors: tensors.update({more: tensors["shared.weight"].clone()}))
    assert any(name.startswith("decoder.") for name in load_file(folder / "model.safetensors"))
    assert torch.equal(states(folder), states(folders["t5"]))


@pytest.mark.parametrize("class_name", ["CLIPModel", "CLIPTextModelWithProjection"])
def test_the_text_tower_of_a_whole_clip_is_taken(folders: dict[str, Path], tmp_path: Path, class_name: str) -> None:
    folder = Path(shutil.copytree(folders["clip judge"], tmp_path / "clip"))
    whole = transformers.CLIPModel.from_pretrained(folder).eval()
    if class_name != "CLIPModel":
        tower = transformers.CLIPTextModelWithProjection(whole.config.text_config)
        tower.text_model.load_state_dict(whole.text_model.state_dict())
        tower.save_pretrained(folder)
    positions = {f"{tower}.embeddings.position_ids": torch.arange(24)[None] for tower in ("text_model", "vision_model")}
    change(folder, lambda tensors: tensors.update(positions))
    encoder = load_text_encoder([str(folder)])
    ids = encoder.towers[0].tokenizer(CAPTIONS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own = whole.text_model(input_ids=ids)
    text = encoder.encode(CAPTIONS[:1])
    torch.testing.assert_close(text.embeds_BTD[0, : ids.shape[1]], own.last_hidden_state[0])
    torch.testing.assert_close(text.pooled_BD, own.pooler_output)


def test_heads_poolers_and_positions_of_a_bert_are_no_loss(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("t5")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    whole = randomize(transformers.BertForPreTraining(config)).eval()
    whole.save_pretrained(folder)
    change(folder, lambda tensors: tensors.update({"bert.embeddings.position_ids": torch.arange(512)[None]}))
    encoder = load_text_encoder([str(folder)])
    ids = encoder.towers[0].tokenizer(CAPTIONS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own = whole.bert(input_ids=ids)
    text = encoder.encode(CAPTIONS[:1])
    torch.testing.assert_close(text.embeds_BTD[0, : ids.shape[1]], own.last_hidden_state[0])
    torch.testing.assert_close(text.pooled_BD, own.pooler_output)


def test_a_head_and_counts_of_a_judge_are_no_loss(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("vit judge")
    identity = load_feature_model(str(folder), device=CPU).identity
    more = {"classifier.weight": torch.ones(3, 16), "embeddings.num_batches_tracked": torch.tensor(7)}
    change(folder, lambda tensors: tensors.update(more))
    assert load_feature_model(str(folder), device=CPU).identity == identity


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 12,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize(
    "class_name",
    [
        "BartModel",
        "BartForConditionalGeneration",
        "MBartForConditionalGeneration",
        "MarianMTModel",
        "PegasusForConditionalGeneration",
        "M2M100ForConditionalGeneration",
    ],
)
def test_of_an_encoder_decoder_the_encoder_is_taken(copy_of: Callable[[str], Path], class_name: str) -> None:
    folder = copy_of("t5")
    model_class = getattr(transformers, class_name)
    randomize(model_class(model_class.config_class(**SIZES, max_position_embeddings=32))).save_pretrained(folder)
    if class_name == "BartModel":  # does not tell what it is
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": False}))
    encoder = load_text_encoder([str(folder)], max_tokens=20)
    assert type(encoder.towers[0].model).__name__.endswith("Encoder") and encoder.embed_dim == 12
    assert encoder.identity.startswith(type(encoder.towers[0].model).__name__)
    text = encoder.encode(CAPTIONS)
    whole = model_class.from_pretrained(folder).eval()
    for caption, embeds_TD in zip(CAPTIONS, text.embeds_BTD, strict=True):
        ids = encoder.towers[0].tokenizer(caption, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = whole(input_ids=ids, decoder_input_ids=ids)
        torch.testing.assert_close(embeds_TD[: ids.shape[1]], output.encoder_last_hidden_state[0], atol=1e-5, rtol=1e-5)


def test_an_encoder_that_lacks_a_weight_is_refused_and_one_whose_decoder_does_is_not(
    copy_of: Callable[[str], Path], refusal_of: Refusal
) -> None:
    folder = copy_of("t5")
    config = transformers.BartConfig(**SIZES, max_position_embeddings=32)
    randomize(transformers.BartModel(config)).save_pretrained(folder)
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("decoder.")])
    assert states(folder).shape == (3, 20, 12)
    change(folder, lambda tensors: tensors.pop("encoder.layers.0.fc1.weight"))
    message = refusal_of(lambda: states(folder))
    assert "1 weights are not in its files" in message and "encoder.layers.0.fc1.weight" in message


def test_an_encoder_that_reads_no_captions_is_refused(copy_of: Callable[[str], Path], refusal_of: Refusal) -> None:
    folder = copy_of("t5")
    transformers.WhisperModel(transformers.WhisperConfig(**SIZES)).save_pretrained(folder)
    message = refusal_of(lambda: states(folder))
    assert "is a WhisperModel, whose encoder (WhisperEncoder) cannot read captions alone" in message


def test_an_encoder_decoder_that_does_not_give_its_encoder_is_refused(
    copy_of: Callable[[str], Path], refusal_of: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("t5")
    transformers.BartModel(transformers.BartConfig(**SIZES, max_position_embeddings=32)).save_pretrained(folder)
    monkeypatch.setattr(transformers.BartModel, "get_encoder", lambda self: self)
    assert "is a BartModel, whose encoder (BartModel) cannot read captions alone" in refusal_of(lambda: states(folder))


def test_what_a_model_under_a_head_has_no_place_for_is_refused(
    copy_of: Callable[[str], Path], refusal_of: Refusal
) -> None:
    folder = copy_of("t5")
    config = transformers.BartConfig(**SIZES, max_position_embeddings=32)
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    change(folder, lambda tensors: tensors.update({"model.encoder.layers.0.fc1.SCB": torch.ones(1)}))
    assert "1 tensors of its files have no place in the model" in refusal_of(lambda: states(folder))


NAMES: dict[str, Callable[[str], str]] = {
    "scales.": lambda layer: f"scales.{layer}.weight",
    "flat": lambda layer: f"{layer}.weight_scale".replace(".", "_"),
    "peft": lambda layer: f"base_model.model.{layer}.lora_A.weight",
    "kohya": lambda layer: f"lora_te_{layer.replace('.', '_')}.lora_up.weight",
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", LOADERS)
def test_scales_and_adapters_under_names_of_their_own_are_refused(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, kind: str
) -> None:
    more = NAMES[kind](LAYERS[name])
    folder = change(copy_of(name), lambda tensors: tensors.update({more: torch.ones(2, 2)}))
    assert "1 tensors of its files have no place in the model" in refusal_of(lambda: LOADERS[name](str(folder)))


@pytest.mark.parametrize(
    "beside", ["scales", "adapter_model", "pytorch_lora_weights", "model.scales", "diffusion_pytorch_model_scales"]
)
@pytest.mark.parametrize("name", LOADERS)
def test_tensors_beside_the_weights_are_refused_by_name(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, beside: str
) -> None:
    folder = copy_of(name)
    save_file({"weight": torch.ones(1)}, folder / f"{beside}.safetensors")
    message = refusal_of(lambda: LOADERS[name](str(folder)))
    assert f"'{beside}.safetensors' lies beside its weights and would be left out" in message


@pytest.mark.parametrize("name", LOADERS)
def test_an_adapters_configuration_beside_the_weights_is_refused(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str
) -> None:
    folder = copy_of(name)
    (folder / "adapter_config.json").write_text("{}")
    assert "'adapter_config.json' lies beside its weights" in refusal_of(lambda: LOADERS[name](str(folder)))


@pytest.mark.parametrize("name", LOADERS)
def test_weights_in_other_forms_beside_are_no_loss(copy_of: Callable[[str], Path], name: str) -> None:
    folder = copy_of(name)
    (path,) = folder.glob("*.safetensors")
    for other in (f"{path.stem}.fp16", f"{path.stem}.non_ema", f"{path.stem}.fp16-00001-of-00002", "open_clip_model"):
        save_file({"weight": torch.zeros(1).to(torch.float8_e4m3fn)}, folder / f"{other}.safetensors")
    LOADERS[name](str(folder))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("name", LOADERS)
def test_weights_in_whole_numbers_are_refused(
    copy_of: Callable[[str], Path], refusal_of: Refusal, name: str, dtype: torch.dtype
) -> None:
    weight = f"{LAYERS[name]}.weight"
    folder = change(copy_of(name), lambda tensors: tensors.update({weight: (tensors[weight] * 100).to(dtype)}))
    assert f"1 tensors such as {weight!r} are stored as" in refusal_of(lambda: LOADERS[name](str(folder)))


@pytest.mark.parametrize(
    ("ending", "stored"),
    [
        ("bias", torch.ones(24).to(torch.float8_e4m3fn)),
        ("bias", torch.ones(24, dtype=torch.uint8)),
        ("weight_exponent", torch.ones(1, dtype=torch.int32)),
    ],
)
def test_biases_and_exponents_in_eight_bits_or_whole_numbers_are_refused(
    copy_of: Callable[[str], Path], refusal_of: Refusal, ending: str, stored: Tensor
) -> None:
    name = f"{LAYERS['clip']}.{ending}"
    folder = change(copy_of("clip"), lambda tensors: tensors.update({name: stored}))
    assert f"1 tensors such as {name!r} are stored as" in refusal_of(lambda: states(folder))


@pytest.mark.parametrize("is_indexed", [False, True])
def test_the_file_that_is_read_is_the_one_that_is_looked_at(
    copy_of: Callable[[str], Path], refusal_of: Refusal, is_indexed: bool
) -> None:
    folder = copy_of("vae")
    (path,) = folder.glob("*.safetensors")
    whole = path.read_bytes()
    weight = f"{LAYERS['vae']}.weight"
    change(folder, lambda tensors: tensors.update({weight: tensors[weight].to(torch.float8_e4m3fn)}))
    if is_indexed:  # which diffusers prefers
        cut(folder)
        path.write_bytes(whole)
    else:
        (folder / "model.safetensors").write_bytes(whole)
    assert f"{weight!r} are stored as F8_E4M3" in refusal_of(lambda: load_image_encoder(str(folder)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_the_masks_in_old_files_of_a_gpt2_are_no_loss(copy_of: Callable[[str], Path], dtype: torch.dtype) -> None:
    folder = copy_of("t5")
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=12, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    randomize(transformers.GPT2LMHeadModel(config)).save_pretrained(folder)
    found = states(folder)
    masks = {"bias": torch.ones(1, 1, 32, 32).to(dtype), "masked_bias": torch.tensor(-1e4)}
    more = {f"transformer.h.0.attn.{name}": value for name, value in masks.items()}
    assert torch.equal(states(change(folder, lambda tensors: tensors.update(more))), found)


def test_a_head_under_its_name_of_before_is_no_loss(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("t5")
    config = transformers.GPTNeoXConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    assert states(folder).shape == (3, 20, 16)


TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("kind", ["Siglip", "ChineseCLIP", "Blip"])
def test_of_a_model_of_two_towers_the_one_of_text_is_taken(copy_of: Callable[[str], Path], kind: str) -> None:
    folder = copy_of("t5")
    model_class = getattr(transformers, f"{kind}Model")
    text = TOWER | {"vocab_size": 64, "max_position_embeddings": 32, "projection_size": 16, "pad_token_id": 0}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    vision = TOWER | {"image_size": 16, "patch_size": 8}
    whole = randomize(model_class(model_class.config_class(text_config=text, vision_config=vision))).eval()
    whole.save_pretrained(folder)
    encoder = load_text_encoder([str(folder)], max_tokens=20)
    ids = encoder.towers[0].tokenizer(CAPTIONS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own = whole.text_model(input_ids=ids)
    found = encoder.encode(CAPTIONS[:1]).embeds_BTD[0, : ids.shape[1]]
    torch.testing.assert_close(found, own.last_hidden_state[0], atol=1e-5, rtol=1e-5)


def test_a_model_that_fails_at_captions_is_refused_in_one_line(
    copy_of: Callable[[str], Path], refusal_of: Refusal
) -> None:
    folder = copy_of("t5")
    transformers.ViTModel(transformers.ViTConfig(**TOWER, image_size=16, patch_size=8)).save_pretrained(folder)
    message = refusal_of(lambda: states(folder))
    assert "is a ViTModel, which cannot read a caption; name a model of text, such as a T5 or a CLIP" in message


def test_a_limit_below_one_is_none(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("t5")
    config = transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16, pad_token_id=0)
    transformers.XLNetModel(config).save_pretrained(folder)
    assert states(folder).shape == (3, 20, 16)


def test_an_autoencoder_with_what_training_left_is_refused_in_one_line(
    copy_of: Callable[[str], Path], refusal_of: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", said.append)
    logger = logging.getLogger("diffusers")
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    folder = change(copy_of("vae"), lambda tensors: tensors.update({"loss.logvar": torch.zeros(1)}))
    assert "no place in the model, such as 'loss.logvar'" in refusal_of(lambda: load_image_encoder(str(folder)))
    assert said == [] and logger.level == level


def test_a_configuration_that_names_other_weights_is_refused(
    copy_of: Callable[[str], Path], refusal_of: Refusal
) -> None:
    path = copy_of("t5") / "config.json"
    save_file({"weight": torch.ones(1)}, path.with_name("model.fp8.safetensors"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "model.fp8.safetensors"}))
    assert "'model.fp8.safetensors' lies beside its weights" in refusal_of(lambda: states(path.parent))


def test_what_rust_panics_over_is_one_line_and_an_interrupt_is_none(refusal_of: Refusal) -> None:
    class PanicException(BaseException):
        """As pyo3 names it, which is no Exception."""

    def fail(failure: type[BaseException]) -> None:
        with opening("it", DataError):
            raise failure("index out of bounds\nmore")

    assert refusal_of(lambda: fail(PanicException)) == "it (index out of bounds)"
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt)


@pytest.mark.parametrize("place", ["../outside.safetensors", "ABSOLUTE", "sub/a.safetensors", "gone.safetensors"])
def test_an_index_names_no_weights_outside_its_folder(
    copy_of: Callable[[str], Path], tmp_path: Path, refusal_of: Refusal, place: str
) -> None:
    folder = copy_of("t5")
    outside = folder.parent / "outside.safetensors"
    tensors = load_file(folder / "model.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub" / "a.safetensors")
    (folder / "model.safetensors").rename(outside)
    save_file({"beside": torch.ones(1)}, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, str(outside) if place == "ABSOLUTE" else place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is no file beside it" in refusal_of(lambda: load_text_encoder([str(folder)]))
