"""Text encoders of today, as tiny random models of the library's own classes: each gives what its own library gives.

A folder is as `save_pretrained` of the whole model writes it, with towers of pictures, decoders and heads, and a
tokenizer that says to pad on the left.
"""

import io
import json
import shutil
import string
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from ecdit_ds.data.encoders.pretrained import load_text_encoder
from ecdit_ds.data.encoders.spec import count_encoder_parameters
from tests.helpers.tiny_encoders import randomize, save_t5

Refusal = Callable[[Callable[[], object]], str]
CAPTIONS = ["a temple", "a yellow flower", "b", ""]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
PICTURES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
QWEN_PICTURES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
DEEP_PICTURES = QWEN_PICTURES | {"deepstack_visual_indexes": [0]}
PIXTRAL = PICTURES | {"model_type": "pixtral", "head_dim": 8}
CLIP_PICTURES = PICTURES | {"model_type": "clip_vision_model"}
T5 = {"model_type": "t5", "vocab_size": 64, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1}


def whole(class_name: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Any:
    """Return a tiny model of a text tower and one of pictures."""
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(text_config=text, vision_config=vision, **more))


def t5gemma() -> Any:
    """Return a tiny T5Gemma: an encoder, a decoder and a head."""
    side = DECODER | WINDOWS
    return transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(encoder=side, decoder=side, vocab_size=64)
    )


def opt() -> Any:
    """Return a tiny OPT whose last layer is narrower than its configuration says."""
    sizes = {"ffn_dim": 16, "word_embed_proj_dim": 8, "do_layer_norm_before": False}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES | sizes))


FAMILIES: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "Qwen2-VL": (
        "Qwen2VLTextModel",
        "model",
        partial(
            whole,
            "Qwen2VLForConditionalGeneration",
            DECODER | {"rope_parameters": ROTARY},
            {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        ),
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLTextModel",
        "model",
        partial(whole, "Qwen2_5_VLForConditionalGeneration", DECODER | {"rope_parameters": ROTARY}, QWEN_PICTURES),
    ),
    "Qwen3-VL": (
        "Qwen3VLTextModel",
        "model",
        partial(whole, "Qwen3VLForConditionalGeneration", DECODER | {"rope_parameters": ROTARY}, DEEP_PICTURES),
    ),
    "Qwen3-VL-MoE": (
        "Qwen3VLMoeTextModel",
        "model",
        partial(
            whole, "Qwen3VLMoeForConditionalGeneration", DECODER | EXPERTS | {"rope_parameters": ROTARY}, DEEP_PICTURES
        ),
    ),
    "Qwen3.5": (
        "Qwen3_5TextModel",
        "model",
        partial(whole, "Qwen3_5ForConditionalGeneration", DECODER | LINEAR, QWEN_PICTURES),
    ),
    "Mistral3": (
        "MistralModel",
        "model",
        partial(whole, "Mistral3ForConditionalGeneration", DECODER | {"model_type": "mistral"}, PIXTRAL),
    ),
    "Ministral3": (
        "Ministral3Model",
        "model",
        partial(whole, "Mistral3ForConditionalGeneration", DECODER | {"model_type": "ministral3"}, PIXTRAL),
    ),
    "Gemma3": (
        "Gemma3TextModel",
        "model",
        partial(whole, "Gemma3ForConditionalGeneration", DECODER | WINDOWS, PICTURES, mm_tokens_per_image=4),
    ),
    "GLM-4.6V": (
        "Glm4vTextModel",
        "model",
        partial(whole, "Glm46VForConditionalGeneration", DECODER | {"rope_parameters": ROTARY}, QWEN_PICTURES),
    ),
    "InternVL": (
        "Qwen2Model",
        "model",
        partial(whole, "InternVLForConditionalGeneration", DECODER | {"model_type": "qwen2"}, PICTURES),
    ),
    "LLaVA": (
        "LlamaModel",
        "model",
        partial(whole, "LlavaForConditionalGeneration", DECODER | {"model_type": "llama"}, CLIP_PICTURES),
    ),
    "Llama 3.2 Vision": (
        "MllamaTextModel",
        "model.language_model",
        partial(whole, "MllamaForConditionalGeneration", DECODER | {"cross_attention_layers": [1]}, PICTURES),
    ),
    "Llama 4": (
        "Llama4TextModel",
        "language_model.model",
        partial(
            whole,
            "Llama4ForConditionalGeneration",
            DECODER | {"num_local_experts": 2, "intermediate_size_mlp": 16},
            PICTURES | {"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
        ),
    ),
    "T5Gemma": ("T5GemmaEncoder", "model.encoder", t5gemma),
    "BLIP-2, T5": (
        "T5Stack",
        "language_model.encoder",
        partial(
            whole, "Blip2ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}, PICTURES, qformer_config=SIZES
        ),
    ),
    "SigLIP": ("SiglipTextModel", "text_model", partial(whole, "SiglipModel", SIZES, PICTURES)),
    "SigLIP 2": ("Siglip2TextModel", "text_model", partial(whole, "Siglip2Model", SIZES, PICTURES)),
    "MetaCLIP 2": ("MetaClip2TextModel", "text_model", partial(whole, "MetaClip2Model", SIZES, PICTURES)),
    "OWLv2": ("Owlv2TextTransformer", "text_model", partial(whole, "Owlv2Model", SIZES, PICTURES)),
    "OPT": ("OPTModel", "model", opt),
}
"""By name: the class of the tower that is taken, where the whole model has what gives its states, and a whole model."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a T5, for its tokenizer."""
    return save_t5(tmp_path_factory.mktemp("t5"))


def copy_tokenizer(tokenizer: Path, folder: Path, **changes: Any) -> None:
    """Give a model a tokenizer whose settings say something else."""
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_is_read_as_its_own_library_reads_it_whatever_pads_it_and_whatever_is_beside_it(
    tokenizer: Path, tmp_path: Path, family: str
) -> None:
    class_name, place, make = FAMILIES[family]
    model = randomize(make()).eval()
    model.save_pretrained(tmp_path)
    copy_tokenizer(tokenizer, tmp_path, padding_side="left")
    encoder = load_text_encoder([str(tmp_path)], max_tokens=20)
    (tower,) = encoder.towers
    longer = replace(encoder, towers=(replace(tower, limit=33),))
    assert type(tower.model).__name__ == class_name and encoder.identity.startswith(f"{class_name}-")
    together = encoder.encode(CAPTIONS)
    assert together.embeds_BTD.shape == (4, 20, encoder.embed_dim) and together.pooled_BD.shape[1] == encoder.embed_dim
    for i, caption in enumerate(CAPTIONS):
        ids = tower.tokenizer(caption, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            unpadded = attrgetter(place)(model)(input_ids=ids).last_hidden_state[0]
        alone = longer.encode([caption])
        for embeds_TD in (together.embeds_BTD[i], alone.embeds_BTD[0]):
            torch.testing.assert_close(embeds_TD[: ids.shape[1]], unpadded, atol=1e-5, rtol=1e-5)
            assert (embeds_TD[ids.shape[1] :] == 0).all()
        torch.testing.assert_close(together.pooled_BD[i], alone.pooled_BD[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("class_name", "text", "more"),
    [
        ("Aimv2Model", SIZES, {}),
        ("PaliGemmaForConditionalGeneration", DECODER | {"model_type": "gemma"}, {"hidden_size": 16}),
    ],
)
def test_a_caption_that_fills_the_limit_is_read_as_one_that_does_not(
    tokenizer: Path, tmp_path: Path, class_name: str, text: dict[str, Any], more: dict[str, Any]
) -> None:
    randomize(whole(class_name, text, PICTURES, **more)).save_pretrained(tmp_path)
    copy_tokenizer(tokenizer, tmp_path)
    encoder = load_text_encoder([str(tmp_path)], max_tokens=33)
    (count,) = encoder.count_tokens(CAPTIONS[:1])
    full = replace(encoder, towers=(replace(encoder.towers[0], limit=count),)).encode(CAPTIONS[:1])
    assert full.mask_BT.all() and full.embeds_BTD.shape == (1, count, 16)
    loose = encoder.encode(CAPTIONS)
    torch.testing.assert_close(full.embeds_BTD[0], loose.embeds_BTD[0, :count], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.pooled_BD[0], loose.pooled_BD[0], atol=1e-5, rtol=1e-5)


def test_a_tower_saved_alone_is_that_of_the_whole(tokenizer: Path, tmp_path: Path) -> None:
    model = randomize(FAMILIES["SigLIP"][2]())
    for folder, part in ((tmp_path / "whole", model), (tmp_path / "alone", model.text_model)):
        part.save_pretrained(folder)
        copy_tokenizer(tokenizer, folder)
    found, expected = (load_text_encoder([str(tmp_path / name)], max_tokens=20) for name in ("alone", "whole"))
    assert torch.equal(found.encode(CAPTIONS).embeds_BTD, expected.encode(CAPTIONS).embeds_BTD)


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "SigLIP", "T5Gemma"])
def test_only_the_text_tower_is_kept_and_only_it_must_be_whole(
    tokenizer: Path, tmp_path: Path, refusal_of: Refusal, family: str
) -> None:
    model = randomize(FAMILIES[family][2]())
    model.save_pretrained(tmp_path)
    copy_tokenizer(tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    other = next(name for name in tensors if "vis" in name or "decoder" in name)
    save_file({name: value for name, value in tensors.items() if name != other}, path, metadata={"format": "pt"})
    encoder = load_text_encoder([str(tmp_path)])
    assert count_encoder_parameters(encoder)[0] < sum(parameter.numel() for parameter in model.parameters())
    own = next(name for name in tensors if name.endswith("q_proj.weight") and "vis" not in name and "dec" not in name)
    save_file({name: value for name, value in tensors.items() if name != own}, path, metadata={"format": "pt"})
    assert "1 weights are not in its files" in refusal_of(lambda: load_text_encoder([str(tmp_path)]))
    scale = own.replace("weight", "SCB")
    save_file(tensors | {scale: torch.ones(1)}, path, metadata={"format": "pt"})
    assert "1 tensors of its files have no place" in refusal_of(lambda: load_text_encoder([str(tmp_path)]))


ROBERTA = SIZES | {"max_position_embeddings": 14, "pad_token_id": 1}
POSITIONS: dict[str, tuple[dict[str, Any], int]] = {
    "XLMRobertaModel": (ROBERTA, 12),
    "RobertaModel": (ROBERTA | {"pad_token_id": 0}, 13),
    "CamembertModel": (ROBERTA, 12),
    "MPNetModel": (ROBERTA, 12),
    "Data2VecTextModel": (ROBERTA, 12),
    "LongformerModel": (ROBERTA | {"attention_window": [4, 4]}, 12),
    "BertModel": (ROBERTA, 14),
    "LEDModel": (
        {
            "vocab_size": 64,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "attention_window": [4],
            "max_encoder_position_embeddings": 12,
            "max_decoder_position_embeddings": 8,
            "pad_token_id": 0,
        },
        12,
    ),
}
"""By class: a configuration, and how many tokens it has positions for."""


@pytest.mark.parametrize("class_name", POSITIONS)
def test_an_encoder_takes_as_many_tokens_as_it_has_positions_for(
    tokenizer: Path, tmp_path: Path, class_name: str
) -> None:
    config, limit = POSITIONS[class_name]
    model_class = getattr(transformers, class_name)
    model = randomize(model_class(model_class.config_class(**config))).eval()
    model.save_pretrained(tmp_path)
    copy_tokenizer(tokenizer, tmp_path)
    encoder = load_text_encoder([str(tmp_path)], max_tokens=60)
    assert encoder.max_tokens == limit
    caption = "a" * (limit - 2)
    assert encoder.count_tokens([caption]) == [limit]
    assert encoder.encode([caption]).embeds_BTD.shape == (1, limit, 16)


def t5_of(folder: Path, vocab_size: int) -> Path:
    """Save a whole T5 without a tokenizer."""
    config = transformers.T5Config(**T5 | {"vocab_size": vocab_size}, decoder_start_token_id=0)
    randomize(transformers.T5ForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def test_a_byt5_needs_no_vocabulary(tmp_path: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(t5_of(tmp_path, 384))
    assert not list(tmp_path.glob("tokenizer.json")) + list(tmp_path.glob("vocab*")) + list(tmp_path.glob("*.model"))
    encoder = load_text_encoder([str(tmp_path)], max_tokens=20)
    assert encoder.count_tokens(["a é", ""]) == [5, 1], "bytes and an end mark"
    assert encoder.encode(["a", "b"]).embeds_BTD[:, 0].diff(dim=0).abs().max() > 0.01


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """Return a model of sentencepiece, trained on a few words."""
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a temple", "a yellow flower", "the quick brown fox jumps over a lazy dog"]),
        model_writer=out,
        vocab_size=36,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.mark.parametrize("name", ["T5Tokenizer", "SiglipTokenizer", None])
def test_a_tokenizer_of_sentencepiece_alone_reads_as_sentencepiece_does(
    tmp_path: Path, pieces: bytes, name: str | None
) -> None:
    if name == "SiglipTokenizer":
        randomize(FAMILIES["SigLIP"][2]()).save_pretrained(tmp_path)
    else:
        t5_of(tmp_path, 64)
    (tmp_path / "spiece.model").write_bytes(pieces)
    if name is not None:
        marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>" if "Sig" in name else "<pad>"}
        told = {"tokenizer_class": name, "extra_ids": 0, "model_input_names": ["input_ids"]}  # as SigLIP's: no mask
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(told | marks))
    encoder = load_text_encoder([str(tmp_path)], max_tokens=20)
    own = SentencePieceProcessor(model_proto=pieces)
    for caption in CAPTIONS:
        assert encoder.towers[0].tokenizer(caption)["input_ids"] == [*own.encode(caption), 1]
    mask_BT = encoder.encode(CAPTIONS).mask_BT
    assert mask_BT.sum(dim=1).tolist() == encoder.count_tokens(CAPTIONS)


@pytest.mark.parametrize("marks", [("<unk>", "<s>"), ("<s>",), ()])
def test_a_tokenizer_with_neither_padding_nor_end_pads_with_another_mark_or_is_refused(
    tmp_path: Path, refusal_of: Refusal, marks: tuple[str, ...]
) -> None:
    randomize(FAMILIES["OPT"][2]()).save_pretrained(tmp_path)
    vocabulary = {token: i for i, token in enumerate(("<s>", "<unk>", *string.ascii_lowercase))}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    given = {{"<unk>": "unk_token", "<s>": "bos_token"}[mark]: mark for mark in marks}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **given).save_pretrained(tmp_path)
    if not marks:
        message = refusal_of(lambda: load_text_encoder([str(tmp_path)]))
        assert message.endswith("its tokenizer has no mark to pad with; name a pad_token in its tokenizer_config.json")
        return
    encoder = load_text_encoder([str(tmp_path)], max_tokens=20)
    together, alone = encoder.encode(["abc", "abcdefgh"]), encoder.encode(["abc"])
    assert together.mask_BT.sum(dim=1).tolist() == [3, 8]
    torch.testing.assert_close(together.embeds_BTD[0], alone.embeds_BTD[0], atol=1e-5, rtol=1e-5)
