"""A random model, as checkpoints and by itself.

Every parameter is random, also those that training starts at zero, so that no part of the model is idle.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.writer import TensorShard, save_checkpoint
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.encoders.from_recipe import encoders_of
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.seeding import parameter_generator


def save_random_model(
    root: Path,
    recipe: Recipe,
    step: int = 1,
    meta: dict[str, Any] | None = None,
    kinds: tuple[str, ...] = ("weight", "ema"),
) -> Path:
    """Write `root/step_N` with tensors of all `kinds`, which may be an optimizer's too."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in ECDiT(recipe.model, serial_layers()).named_parameters()}
    pieces = [
        TensorShard(name=name, global_shape=shape, box=Box((0,) * len(shape), shape), data=random_values(name, shape))
        for name, shape in ((f"{kind}/{name}", shape) for kind in kinds for name, shape in shapes.items())
    ]
    usual = {"recipe": recipe.to_dict(), "samples_seen": recipe.train.global_batch_size * step, "num_updates": step}
    return save_checkpoint(root, step, pieces, usual if meta is None else meta, SoloPeers())


def random_pipeline(recipe: Recipe, weights: str = "ema") -> TextToImage:
    """Return what `load_generator` makes of what `save_random_model` writes, without the disk."""
    model = ECDiT(recipe.model, serial_layers()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_values(f"{weights}/{name}", tuple(parameter.shape)))
    image_encoder, text_encoder = encoders_of(recipe)
    return TextToImage(
        model=model, recipe=recipe, image_encoder=image_encoder, text_encoder=text_encoder, device=torch.device("cpu")
    )


def random_values(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers of tensor `name`: normal, about 1 for norm scales, small for moments, squares where needed."""
    normal = torch.randn(shape, generator=parameter_generator(0, name))
    if name.startswith(("exp_avg_sq/", "square_avg/")):
        return 1e-4 * normal.square()
    if name.startswith(("exp_avg/", "momentum_buffer/")):
        return 1e-3 * normal
    return (1.0 if "norm" in name else 0.0) + 0.2 * normal


def damage_average(checkpoint: Path) -> Path:
    """Flip one bit of the averaged weights and return the file."""
    (shard,) = checkpoint.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # the last tensor's last byte; `ema/` comes after `weight/`
    shard.write_bytes(bytes(data))
    return shard
