"""Models of `transformers` with tiny random weights, saved as their makers' are: what metrics are tested with.

Weights are large, so that pictures and words make a difference that survives rounding.
"""

import string
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from ecdit_ds.seeding import parameter_generator, sample_rng

_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_SQUARE = {"height": 32, "width": 32}
LABELS = {0: "mouse", 1: "cat", 2: "tvmonitor", 3: "N/A"}


def pictures(count: int, purpose: str = "pictures", *, width: int = 40, height: int = 30) -> list[Image.Image]:
    """Return different pictures of coloured noise, as large as asked."""
    drawn = []
    for i in range(count):
        rng = sample_rng(0, i, purpose)
        noise = rng.integers(0, 256, size=(6, 8, 3)).astype("uint8")
        drawn.append(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return drawn


def save_vit(folder: Path, *, with_pooler: bool = True) -> Path:
    """Save a vision transformer with 16 features, its pooler's weights among its files or not."""
    model = ViTModel(ViTConfig(**_SMALL, image_size=32, patch_size=16), add_pooling_layer=with_pooler)
    _randomize(model).save_pretrained(folder)
    ViTImageProcessorPil(size=_SQUARE).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """Save a CLIP of 8 dimensions and 16 tokens, whose tokenizer spells."""
    letters = [*string.printable.strip(), *(f"{letter}</w>" for letter in string.printable.strip())]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(marks + letters)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SQUARE).save_pretrained(folder)
    text = {"vocab_size": len(marks + letters), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**_SMALL, **text, "pad_token_id": 1},
        vision_config={**_SMALL, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    _randomize(CLIPModel(config)).save_pretrained(folder)
    return folder


def save_yolos(folder: Path) -> Path:
    """Save a detector of boxes that finds up to 12 objects of LABELS; it keeps the picture's proportions."""
    config = YolosConfig(
        **_SMALL,
        image_size=[32, 48],
        patch_size=16,
        num_detection_tokens=12,
        id2label=LABELS,
        use_mid_position_embeddings=False,
    )
    _randomize(YolosForObjectDetection(config)).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


def save_mask2former(folder: Path) -> Path:
    """Save a detector of masks, the paper's kind."""
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        id2label=LABELS,
    )
    _randomize(Mask2FormerForUniversalSegmentation(config)).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@torch.no_grad()
def _randomize(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=parameter_generator(0, name))
        parameter.copy_(noise * (1.0 if parameter.dim() < 2 else 2.0 / parameter.shape[-1] ** 0.5))
    return model
