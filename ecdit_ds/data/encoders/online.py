"""Frozen encoders that run beside training, on samples that are not encoded yet, many at once.

Suffixes: B batch, C channels, H, W pixels (of the image or of the latents), T text tokens, D text_embed_dim.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.data.encoders.base import ImageEncoder, TextEncoder
from ecdit_ds.data.latents.dataset import Samples, no_pixels
from ecdit_ds.data.sources.images import from_pixels
from ecdit_ds.errors import DataError

IMAGES_AT_ONCE = 32
"""As tools/encode_data.py has it: what an autoencoder holds of an image is many times its pixels."""
CAPTIONS_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class OnlineEncoders:
    """Both encoders of a corpus, and how samples go through them."""

    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    stream: torch.cuda.Stream | None = None
    """The encoders' own CUDA stream; on training's stream each would wait for the other."""

    def finish(self, batches: Sequence[Samples]) -> list[Samples]:
        """Return the same batches with latents and text vectors, fp32 on the host, where they were missing.

        Samples of all batches go through an encoder together. Nothing random is drawn. Any thread may call this.
        """
        with torch.no_grad(), self.on_stream():
            return self._with_text(self._with_latents(list(batches)))

    def _with_latents(self, batches: list[Samples]) -> list[Samples]:
        places = [i for i, batch in enumerate(batches) if batch.lacks_latents]
        if not places:
            return batches
        pixels = torch.cat([batches[i].pixels_BHW3 for i in places])
        parts = [self.image_encoder.encode(from_pixels(part)).float().cpu() for part in pixels.split(IMAGES_AT_ONCE)]
        latents_of = torch.cat(parts).split([len(batches[i].captions) for i in places])
        done = list(batches)
        for i, latents_BCHW in zip(places, latents_of, strict=True):
            done[i] = replace(batches[i], latents_BCHW=latents_BCHW, pixels_BHW3=no_pixels(len(latents_BCHW)))
        return done

    def _with_text(self, batches: list[Samples]) -> list[Samples]:
        places = [i for i, batch in enumerate(batches) if batch.lacks_text]
        if not places:
            return batches
        captions = [caption for i in places for caption in batches[i].captions]
        parts = [
            self.text_encoder.encode(captions[start : start + CAPTIONS_AT_ONCE])
            for start in range(0, len(captions), CAPTIONS_AT_ONCE)
        ]
        counts = [len(batches[i].captions) for i in places]
        embeds_of, mask_of, pooled_of = (
            torch.cat([getattr(part, name) for part in parts]).cpu().split(counts)
            for name in ("embeds_BTD", "mask_BT", "pooled_BD")
        )
        done = list(batches)
        for i, embeds_BTD, mask_BT, pooled_BD in zip(places, embeds_of, mask_of, pooled_of, strict=True):
            done[i] = replace(batches[i], text_embeds_BTD=embeds_BTD, text_mask_BT=mask_BT, text_pooled_BD=pooled_BD)
        return done

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Put what is done meanwhile on the encoders' GPU and their stream; a new thread begins on the first GPU."""
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield


def online_encoders(image_encoder: ImageEncoder, text_encoder: TextEncoder, device: torch.device) -> OnlineEncoders:
    """Return encoders that are on `device` already, with a stream of their own on a GPU."""
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # until their weights are there
    return OnlineEncoders(image_encoder=image_encoder, text_encoder=text_encoder, stream=stream)


def check_encoders_fit(model: ModelConfig, image_encoder: ImageEncoder, text_encoder: TextEncoder) -> None:
    """Check that what the encoders give is what the model reads.

    Raises:
        DataError: naming the fields to change.
    """
    for field, wanted, given in (
        ("text_embed_dim", model.text_embed_dim, text_encoder.embed_dim),
        ("max_text_tokens", model.max_text_tokens, text_encoder.max_tokens),
    ):
        if wanted != given:
            raise DataError(
                f"text encoder {text_encoder.identity} gives {given}, but model.{field} is {wanted}; "
                f"set model.{field}={given} or take another encoder"
            )
    latents_shape = (model.in_channels, model.latent_height, model.latent_width)
    height, width = (side * image_encoder.downsampling for side in latents_shape[1:])
    with torch.no_grad():
        given_shape = tuple(image_encoder.encode(torch.zeros(1, 3, height, width)).shape[1:])
    if given_shape != latents_shape:
        raise DataError(
            f"image encoder {image_encoder.identity} turns {height} x {width} pixels into latents "
            f"{given_shape}, but the model's are {latents_shape}; set model.in_channels, "
            "latent_height and latent_width to the former"
        )
