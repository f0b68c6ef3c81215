"""Micro-batches for the model: what is drawn for samples, and, where encoders run beside training, what they add.

Suffixes: B batch, C channels, H, W latent height and width, T text tokens, D text_embed_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.encoders.base import TextEmbeddings
from ecdit_ds.data.encoders.online import OnlineEncoders
from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.data.replacement import replace_nonfinite
from ecdit_ds.data.sources.bad_sample import ReplacedSample
from ecdit_ds.flow.objective import (
    FlowBatch,
    apply_text_dropout,
    draw_text_kept,
    sample_noise,
    sample_timesteps,
    sample_visible_tokens,
)


@dataclass(frozen=True, kw_only=True)
class PendingBatch:
    """A micro-batch whose latents, or text vectors, or both have yet to be made of what its samples hold."""

    batch: FlowBatch
    """All that is drawn for it; what is missing has no numbers in it."""
    samples: Samples
    has_text_B: Tensor
    """bool, False where training shall not see the text."""


class MakeBatch:
    """Samples to a micro-batch, in the loader's worker; a class so that a worker of any kind can be handed it."""

    def __init__(self, recipe: Recipe, null_text: TextEmbeddings) -> None:
        self._recipe, self._null = recipe, null_text

    def __call__(self, samples: Samples) -> FlowBatch | PendingBatch:
        seed, flow, index_B = self._recipe.train.seed, self._recipe.flow, samples.stream_index_B
        kept_B, shape = draw_text_kept(index_B, seed, flow), self._latents_shape(samples)
        batch = FlowBatch(
            latents_BCHW=samples.latents_BCHW,
            noise_BCHW=sample_noise(shape, index_B, seed),
            timesteps_B=sample_timesteps(index_B, seed, self._recipe.train.global_batch_size, flow),
            text_embeds_BTD=samples.text_embeds_BTD,
            text_mask_BT=samples.text_mask_BT,
            text_pooled_BD=samples.text_pooled_BD,
            visible_BN=self._draw_kept(index_B, shape),
            replaced=_replaced(samples),
        )
        if samples.lacks_latents or samples.lacks_text:
            return PendingBatch(batch=batch, samples=samples, has_text_B=kept_B)
        return with_text(batch, samples, kept_B, self._null)

    def _latents_shape(self, samples: Samples) -> tuple[int, ...]:
        model = self._recipe.model
        if samples.lacks_latents:
            return model.in_channels, model.latent_height, model.latent_width
        return tuple(samples.latents_BCHW.shape[1:])

    def _draw_kept(self, stream_index_B: Tensor, latents_shape: tuple[int, ...]) -> Tensor | None:
        train, model = self._recipe.train, self._recipe.model.resized(*latents_shape[-2:])
        num_kept = model.num_kept_tokens(train.mask_ratio_at(int(stream_index_B[0]) // train.global_batch_size))
        return sample_visible_tokens(stream_index_B, train.seed, model.num_tokens, num_kept)


def _replaced(samples: Samples) -> tuple[ReplacedSample, ...]:
    return tuple(bad for place in sorted(samples.replaced) for bad in samples.replaced[place])


def with_text(batch: FlowBatch, samples: Samples, has_text_B: Tensor, null_text: TextEmbeddings) -> FlowBatch:
    """Return the batch with the samples' texts; where they are not kept, the text of no text is written over them."""
    return replace(
        batch,
        text_embeds_BTD=apply_text_dropout(samples.text_embeds_BTD, has_text_B, null_text.embeds_BTD),
        text_mask_BT=apply_text_dropout(samples.text_mask_BT, has_text_B, null_text.mask_BT),
        text_pooled_BD=apply_text_dropout(samples.text_pooled_BD, has_text_B, null_text.pooled_BD),
    )


@dataclass(frozen=True, kw_only=True)
class EncodeBatch:
    """A step's micro-batches through the frozen encoders, all at once; for `encoded_ahead`."""

    encoders: OnlineEncoders
    mixture: Mixture
    """What the samples are of, to name those that nothing finite comes of."""

    def __call__(self, step: Sequence[FlowBatch | PendingBatch]) -> list[FlowBatch]:
        raw = [part for part in step if isinstance(part, PendingBatch)]
        with self.encoders.on_stream():
            finished = iter(self.encoders.finish([part.samples for part in raw]))
            return [part if isinstance(part, FlowBatch) else self._whole(part, next(finished)) for part in step]

    def _whole(self, part: PendingBatch, samples: Samples) -> FlowBatch:
        samples = replace_nonfinite(self.mixture, samples)
        batch = replace(part.batch, latents_BCHW=samples.latents_BCHW, replaced=_replaced(samples))
        batch = with_text(batch, samples, part.has_text_B, self.mixture.null_text)
        return batch if self.encoders.stream is None else batch.pin_memory()
