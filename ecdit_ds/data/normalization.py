"""Latents of about mean 0 and deviation 1: how pixels get there, and what is said of latents that are far from it.

Noise has mean 0 and deviation 1, so where latents do not, training spends its steps on the mean, or sees no noise.

Suffix: C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.data.encoders.base import Factor, PixelVAE

MAX_MEAN = 1.0
"""A channel whose mean is farther from 0 is worth a warning."""
MIN_STD, MAX_STD = 0.5, 2.0
"""So is one whose deviation is outside. Latents of known autoencoders are within all three."""
_LEAST_STD = 1 / 127.5
"""A grey level: a channel that is all one colour is not scaled up further."""
_DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and standard deviation of each channel."""

    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]

    def after(self, codec: PixelVAE) -> "Moments":
        """Return those of the latents that a codec makes of pixels with these."""
        shift_C, scale_C = (_each_channel(f, len(self.mean_C)) for f in (codec.shift_factor, codec.scaling_factor))
        return Moments(
            mean_C=tuple(
                (mean - shift) * scale for mean, shift, scale in zip(self.mean_C, shift_C, scale_C, strict=True)
            ),
            std_C=tuple(std * scale for std, scale in zip(self.std_C, scale_C, strict=True)),
        )

    @property
    def is_far(self) -> bool:
        """Whether a channel is far from mean 0 and deviation 1."""
        return not all(abs(mean) <= MAX_MEAN for mean in self.mean_C) or not all(
            MIN_STD <= std <= MAX_STD for std in self.std_C
        )

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (self.mean_C, self.std_C))
        return f"mean {mean}, deviation {std}"


def mixed(parts: Sequence[Moments], shares: Sequence[float]) -> Moments:
    """Return the moments of several sets read together.

    Args:
        parts: of each set, with the same channels.
        shares: of what is read, together 1.
    """

    def over(values_SC: Sequence[Sequence[float]]) -> tuple[float, ...]:
        return tuple(
            math.fsum(share * value for share, value in zip(shares, of_sets, strict=True))
            for of_sets in zip(*values_SC, strict=True)
        )

    mean_C = over([part.mean_C for part in parts])
    square_C = over([[m**2 + s**2 for m, s in zip(part.mean_C, part.std_C, strict=True)] for part in parts])
    std_C = tuple(math.sqrt(max(0.0, square - mean**2)) for square, mean in zip(square_C, mean_C, strict=True))
    return Moments(mean_C=mean_C, std_C=std_C)


def normalizing_codec(pixels: Moments) -> PixelVAE:
    """Return the codec whose latents of such pixels have mean 0 and deviation 1, a channel at a time.

    Its factors are rounded, so that sums in another order give the same codec.
    """
    return PixelVAE(
        shift_factor=tuple(round(mean, _DECIMALS) for mean in pixels.mean_C),
        scaling_factor=tuple(round(1 / max(std, _LEAST_STD), _DECIMALS) for std in pixels.std_C),
    )


def codec_in(data: DataConfig) -> PixelVAE | None:
    """Return the codec that a recipe asks for, if it does."""
    if not data.shift_factor:
        return None
    shift, scale = data.shift_factor, data.scaling_factor
    return PixelVAE(
        shift_factor=shift[0] if len(shift) == 1 else shift, scaling_factor=scale[0] if len(scale) == 1 else scale
    )


def warning_of(latents: Moments, *, is_of_pixels: bool) -> str | None:
    """Return what to say of latents as the model reads them, with the way out; None where all is well.

    Args:
        is_of_pixels: whether they were made without an autoencoder.
    """
    if not latents.is_far:
        return None
    way_out = (
        "encode the pictures anew with this release, and training takes their own, or set data.shift_factor and "
        "data.scaling_factor to them"
        if is_of_pixels
        else "look whether config.json of the autoencoder has its scaling_factor and shift_factor, or latents_mean and "
        "latents_std, and encode anew"
    )
    return (
        f"latents are far from mean 0 and deviation 1: {latents} by channel (within {-MAX_MEAN:g} to {MAX_MEAN:g}, and "
        f"{MIN_STD:g} to {MAX_STD:g}, is well); {way_out}"
    )


def _each_channel(factor: Factor, channels: int) -> tuple[float, ...]:
    return factor if isinstance(factor, tuple) else (factor,) * channels
