"""The training objective: what is drawn for a sample, and the loss.

All that is random about a sample (noise, time, whether its text is dropped) is a function of the seed and of its
index in the training stream, so every layout trains on the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ecdit_ds.config import FlowConfig
from ecdit_ds.flow.rectified import interpolate, timesteps_from_uniform, velocity_target
from ecdit_ds.seeding import sample_rng


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """A micro-batch, ready for the model."""

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    timesteps_B: Tensor
    text_embeds_BTD: Tensor
    text_mask_BT: Tensor
    text_pooled_BD: Tensor

    def to(self, device: torch.device) -> "FlowBatch":
        """Return the batch on `device`; from pinned memory the host does not wait for the copy."""
        return FlowBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin_memory(self) -> "FlowBatch":
        """Return the batch in pinned memory; torch's loader asks for this by name."""
        return FlowBatch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


class Predicted(Protocol):
    """What a model must return."""

    @property
    def velocity_BCHW(self) -> Tensor: ...
    @property
    def auxiliary_loss(self) -> Tensor: ...


VelocityModel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Predicted]
"""(noisy latents, timesteps, text embeds, text mask, pooled text) -> prediction."""


def draw_noise(shape: tuple[int, ...], stream_index_B: Tensor, seed: int, purpose: str = "noise") -> Tensor:
    """Return standard normal noise (B, *shape), each sample's from its own index."""
    draws = [sample_rng(seed, int(index), purpose).standard_normal(shape, dtype=np.float32) for index in stream_index_B]
    return torch.from_numpy(np.stack(draws))


def draw_timesteps(stream_index_B: Tensor, seed: int, global_batch_size: int, config: FlowConfig) -> Tensor:
    """Return training times, stratified over the global batch.

    The sample at place i of a global batch of N draws its quantile from [i / N, (i + 1) / N): each batch covers
    the whole density, which lowers the variance of the loss at no cost and on any layout.
    """
    jitter = [sample_rng(seed, int(index), "timestep").random() for index in stream_index_B]
    place_B = (stream_index_B % global_batch_size).double()
    return timesteps_from_uniform((place_B + torch.tensor(jitter, dtype=torch.float64)) / global_batch_size, config)


def draw_text_kept(stream_index_B: Tensor, seed: int, config: FlowConfig) -> Tensor:
    """Return bool (B,): False where training shall not see the text."""
    draws = [sample_rng(seed, int(index), "text_dropout").random() for index in stream_index_B]
    return torch.tensor(draws, dtype=torch.float64) >= config.text_dropout_prob


def where_text(kept_B: Tensor, text: Tensor, null_text: Tensor) -> Tensor:
    """Return each sample's text tensor, or the null text's where it is not kept; leading dimension B."""
    return torch.where(kept_B.view(-1, *[1] * (text.dim() - 1)), text, null_text)


def flow_loss(model: VelocityModel, batch: FlowBatch) -> tuple[Tensor, Tensor]:
    """Return (fp32 losses (B,), auxiliary loss): mean over the latent of |v_theta - (noise - latents)|^2.

    Source: arXiv 2410.02098 eq. 1.
    """
    noisy = interpolate(batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B)
    prediction = model(noisy, batch.timesteps_B, batch.text_embeds_BTD, batch.text_mask_BT, batch.text_pooled_BD)
    error = prediction.velocity_BCHW.float() - velocity_target(batch.latents_BCHW, batch.noise_BCHW).float()
    return error.square().mean(dim=(1, 2, 3)), prediction.auxiliary_loss
