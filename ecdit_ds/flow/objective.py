"""The training objective: what is drawn for a sample, and the loss.

All that is random about a sample (noise, time, whether its text is dropped) is a function of the seed and of its
index in the training stream, so every layout trains on the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from ecdit_ds.config.recipe import FlowConfig
from ecdit_ds.flow.rectified import interpolate, timesteps_from_uniform, velocity_target
from ecdit_ds.seeding import sample_rngs


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """A micro-batch; on its device it is ready for the model."""

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    timesteps_B: Tensor
    text_embeds_BTD: Tensor
    text_mask_BT: Tensor
    text_pooled_BD: Tensor
    visible_BN: Tensor | None = None
    """int64, rising: the tokens of each image that the main blocks see; None for all."""
    replaced: tuple[Any, ...] = ()
    """Bad samples that some of these stand in for, for whoever counts them."""

    def to(self, device: torch.device) -> "FlowBatch":
        """Return the batch on `device`; from pinned memory the host does not wait for the copy.

        Latents and texts that are stored as bf16 travel as such, and become fp32 there: the noise is, and so are sums.
        """
        return self._each(lambda tensor: _widened(tensor.to(device, non_blocking=True)))

    def pin_memory(self) -> "FlowBatch":
        """Return the batch in pinned memory; torch's loader asks for this by name."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "FlowBatch":
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(part) for name, part in given.items() if isinstance(part, Tensor)}
        return replace(self, **changed)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


class Predicted(Protocol):
    """What a model must return."""

    @property
    def velocity_BCHW(self) -> Tensor: ...
    @property
    def auxiliary_loss(self) -> Tensor: ...


VelocityModel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Predicted]
"""(noisy latents, timesteps, text embeds, text mask, pooled text, kept tokens) -> prediction."""


def sample_noise(shape: tuple[int, ...], stream_index_B: Tensor, seed: int, purpose: str = "noise") -> Tensor:
    """Return standard normal noise (B, *shape), each sample's from its own index."""
    draws = [
        rng.standard_normal(shape, dtype=np.float32) for rng in sample_rngs(seed, stream_index_B.tolist(), purpose)
    ]
    return torch.from_numpy(np.stack(draws))


def sample_timesteps(stream_index_B: Tensor, seed: int, global_batch_size: int, config: FlowConfig) -> Tensor:
    """Return training times, stratified over the global batch.

    The sample at place i of a global batch of N draws its quantile from [i / N, (i + 1) / N): each batch covers
    the whole density, which lowers the variance of the loss at no cost and on any layout.
    """
    jitter = [rng.random() for rng in sample_rngs(seed, stream_index_B.tolist(), "timestep")]
    place_B = (stream_index_B % global_batch_size).double()
    return timesteps_from_uniform((place_B + torch.tensor(jitter, dtype=torch.float64)) / global_batch_size, config)


def draw_text_kept(stream_index_B: Tensor, seed: int, config: FlowConfig) -> Tensor:
    """Return bool (B,): False where training shall not see the text."""
    draws = [rng.random() for rng in sample_rngs(seed, stream_index_B.tolist(), "text_dropout")]
    return torch.tensor(draws, dtype=torch.float64) >= config.text_dropout_prob


def sample_visible_tokens(stream_index_B: Tensor, seed: int, num_tokens: int, num_kept: int) -> Tensor | None:
    """Return visible_BN, `num_kept` of `num_tokens` tokens of each sample, rising; None where all are kept."""
    if num_kept == num_tokens:
        return None
    draws = [rng.permutation(num_tokens)[:num_kept] for rng in sample_rngs(seed, stream_index_B.tolist(), "mask")]
    return torch.from_numpy(np.sort(np.stack(draws), axis=1))


def apply_text_dropout(text: Tensor, kept_B: Tensor, null_text: Tensor) -> Tensor:
    """Put the null text where a sample's own is not kept, in place, and return it; leading dimension B."""
    text[~kept_B] = null_text.to(text.dtype)
    return text


class FlowLosses(NamedTuple):
    """What is minimised, unweighted; fp32."""

    flow_B: Tensor
    """Flow loss per image: mean over the visible tokens of |v_theta - (noise - latents)|^2 (arXiv 2410.02098 eq. 1)."""
    reconstruction: Tensor
    """Mean over the tokens left out of |v_theta + latents|^2; zero without a mask. Of the noise of a token that no
    block saw, nothing is known, so the best guess at its velocity has mean -latents (after MaskDiT, 2306.09305)."""
    load_balance: Tensor
    """Load-balance loss of the token-choice baseline."""


def flow_losses(model: VelocityModel, batch: FlowBatch, patch_size: int = 1) -> FlowLosses:
    """Return the losses of a micro-batch.

    Args:
        patch_size: the side of a token, in latent pixels; a batch that keeps all tokens does not ask.
    """
    noisy = interpolate(batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B)
    prediction = model(
        noisy, batch.timesteps_B, batch.text_embeds_BTD, batch.text_mask_BT, batch.text_pooled_BD, batch.visible_BN
    )
    velocity_BCHW = prediction.velocity_BCHW.float()
    error_BCHW = (velocity_BCHW - velocity_target(batch.latents_BCHW, batch.noise_BCHW).float()).square()
    if batch.visible_BN is None:
        nothing = error_BCHW.new_zeros(())
        return FlowLosses(error_BCHW.mean(dim=(1, 2, 3)), nothing, prediction.auxiliary_loss)
    flow_B = _mean_by_token(error_BCHW, patch_size).gather(1, batch.visible_BN).mean(dim=1)
    guess_BS = _mean_by_token((velocity_BCHW + batch.latents_BCHW).square(), patch_size)
    left_out_BS = torch.ones_like(guess_BS).scatter(1, batch.visible_BN, 0.0)
    return FlowLosses(flow_B, (guess_BS * left_out_BS).sum() / left_out_BS.sum(), prediction.auxiliary_loss)


def _mean_by_token(error_BCHW: Tensor, patch_size: int) -> Tensor:
    """Return (B, S), row by row as the model orders its tokens."""
    return reduce(error_BCHW, "b c (h p) (w q) -> b (h w)", "mean", p=patch_size, q=patch_size)
