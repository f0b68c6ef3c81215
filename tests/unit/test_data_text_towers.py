"""Text encoders of today, as tiny random models of the library's own classes: each gives what its own library gives.

A folder is as `save_pretrained` of the whole model writes it, with towers of pictures, decoders and heads, and a
tokenizer that says to pad on the left.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ecdit_ds.data.pretrained import load_text_encoder
from tests.helpers.tiny_encoders import randomize, save_t5

Refusal = Callable[[Callable[[], object]], str]
CAPTIONS = ["a temple", "a yellow flower", "b", ""]
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
PICTURES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
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
    "Qwen2-VL": ("Qwen2VLTextModel", "model", partial(
        whole, "Qwen2VLForConditionalGeneration", DECODER | {"rope_parameters": ROTARY},
        {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    )),
    "Qwen2.5-VL": ("Qwen2_5_VLTextModel", "model", partial(
        whole, "Qwen2_5_VLForConditionalGeneration", DECODER | {"rope_parameters": ROTARY}, QWEN_PICTURES
    )),
    "Qwen3-VL": ("Qwen3VLTextModel", "model", partial(
        whole, "Qwen3VLForConditionalGeneration", DECODER | {"rope_parameters": ROTARY}, DEEP_PICTURES
    )),
    "Qwen3-VL-MoE": ("Qwen3VLMoeTextModel", "model", partial(
        whole, "Qwen3VLMoeForConditionalGeneration", DECODER | EXPERTS | {"rope_parameters": ROTARY}, DEEP_PICTURES
    )),
    "Qwen3.5": ("Qwen3_5TextModel", "model", partial(
        whole, "Qwen3_5ForConditionalGeneration", DECODER | LINEAR, QWEN_PICTURES
    )),
    "Mistral3": ("MistralModel", "model", partial(
        whole, "Mistral3ForConditionalGeneration", DECODER | {"model_type": "mistral"}, PIXTRAL
    )),
    "Ministral3": ("Ministral3Model", "model", partial(
        whole, "Mistral3ForConditionalGeneration", DECODER | {"model_type": "ministral3"}, PIXTRAL
    )),
    "Gemma3": ("Gemma3TextModel", "model", partial(
        whole, "Gemma3ForConditionalGeneration", DECODER | WINDOWS, PICTURES, mm_tokens_per_image=4
    )),
    "GLM-4.6V": ("Glm4vTextModel", "model", partial(
        whole, "Glm46VForConditionalGeneration", DECODER | {"rope_parameters": ROTARY}, QWEN_PICTURES
    )),
    "InternVL": ("Qwen2Model", "model", partial(
        whole, "InternVLForConditionalGeneration", DECODER | {"model_type": "qwen2"}, PICTURES
    )),
    "LLaVA": ("LlamaModel", "model", partial(
        whole, "LlavaForConditionalGeneration", DECODER | {"model_type": "llama"}, CLIP_PICTURES
    )),
    "Llama 3.2 Vision": ("MllamaTextModel", "model.language_model", partial(
        whole, "MllamaForConditionalGeneration", DECODER | {"cross_attention_layers": [1]}, PICTURES
    )),
    "Llama 4": ("Llama4TextModel", "language_model.model", partial(
        whole, "Llama4ForConditionalGeneration", DECODER | {"num_local_experts": 2, "intermediate_size_mlp": 16},
        PICTURES,
    )),
    "T5Gemma": ("T5GemmaEncoder", "model.encoder", t5gemma),
    "BLIP-2, T5": ("T5Stack", "language_model.encoder", partial(
        whole, "Blip2ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}, PICTURES, qformer_config=SIZES
    )),
    "SigLIP": ("SiglipTextModel", "text_model", partial(whole, "SiglipModel", SIZES, PICTURES)),
    "SigLIP 2": ("Siglip2TextModel", "text_model", partial(whole, "Siglip2Model", SIZES, PICTURES)),
    "MetaCLIP 2": ("MetaClip2TextModel", "text_model", partial(whole, "MetaClip2Model", SIZES, PICTURES)),
    "OWLv2": ("Owlv2TextTransformer", "text_model", partial(whole, "Owlv2Model", SIZES, PICTURES)),
    "OPT": ("OPTModel", "model", opt),
}  # fmt: skip
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
