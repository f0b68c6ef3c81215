"""Frozen encoders with tiny random weights, saved as their makers' are: an AutoencoderKL, a T5 and a CLIP."""

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ecdit_ds.seeding import parameter_generator

_LETTERS = string.ascii_lowercase + string.digits + ".,"
SCALING, SHIFT = 1.5, 0.1


def save_vae(folder: Path, *, channels: int = 5, seed: int = 0) -> Path:
    """Save an autoencoder of four pixels a latent pixel along each side, with its own scaling and shift."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=channels,
        scaling_factor=SCALING,
        shift_factor=SHIFT,
    )
    randomize(model, seed).save_pretrained(folder)
    return folder


def save_t5(folder: Path, *, seed: int = 0) -> Path:
    """Save a T5 encoder of width 12 that spells."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in _LETTERS)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(pieces), d_model=12, d_kv=4, num_heads=2, d_ff=16, num_layers=1, decoder_start_token_id=0
    )
    randomize(T5EncoderModel(config), seed).save_pretrained(folder)
    return folder


def save_clip_text(folder: Path) -> Path:
    """Save a CLIP text tower of width 16 and 20 tokens that spells."""
    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*marks, *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=20)
    tokenizer.save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    randomize(CLIPTextModel(config)).save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize(model: Any, seed: int = 0) -> Any:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=parameter_generator(seed, name))
        parameter.copy_(noise * (0.3 if parameter.dim() < 2 else 1.0 / parameter[0].numel() ** 0.5))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
    return model
