"""What turns images and captions into what the model reads, and the two embedded encoders that need no download.

A real image autoencoder and a real text encoder stand behind the same two protocols, so the training path is the
production path. Both run once, when a corpus is encoded, and again when a prompt is sampled.

Suffixes: B batch, C channels, H, W pixels (of the image or of the latents), T text tokens, D text_embed_dim, V words.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecdit_ds.errors import DataError
from ecdit_ds.seeding import sample_rng, stable_seed


@dataclass(frozen=True, kw_only=True)
class TextEmbeddings:
    """Encoded captions, fp32."""

    embeds_BTD: Tensor
    """Zero where the mask is False."""
    mask_BT: Tensor
    """bool, True at tokens; every row has at least one."""
    pooled_BD: Tensor
    """One vector a caption, for the modulation."""


class ImageEncoder(Protocol):
    """An image autoencoder, between pixels and the latents that the model learns."""

    @property
    def identity(self) -> str:
        """Name of everything that fixes its output; encoded sets of another identity are never reused."""

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along height and width alike."""

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return latents_BCHW, scaled to about unit variance, of images in [-1, 1]."""

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return images_B3HW in [-1, 1]."""


class TextEncoder(Protocol):
    """A frozen text encoder."""

    @property
    def identity(self) -> str:
        """Name of everything that fixes its output; encoded sets of another identity are never reused."""

    @property
    def embed_dim(self) -> int:
        """D of what it returns."""

    @property
    def max_tokens(self) -> int:
        """T of what it returns."""

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return how many of `max_tokens` each caption takes; `encode` refuses one that takes more."""

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Encode captions, B = len(captions); raise DataError for one longer than max_tokens."""

    def null(self) -> TextEmbeddings:
        """Return the text of no text, B = 1: the unconditional branch of guidance."""


Factor = float | tuple[float, ...]
"""One for all channels, or one a channel."""


@dataclass(frozen=True, kw_only=True)
class PixelVAE:
    """The image encoder of small canvases: a latent is a pixel, shifted and scaled to about unit variance.

    The factors, as an autoencoder's, are the statistics of its images. Those of digit scenes are the defaults: they are
    mostly black, with mean -0.83 and standard deviation 0.45 of pixels in [-1, 1]. Others have their own
    (`normalization.py`).
    """

    shift_factor: Factor = -0.83
    scaling_factor: Factor = 2.2

    @property
    def identity(self) -> str:
        """Name of this encoder and its factors."""
        factors = (self.shift_factor, self.scaling_factor)
        return "-".join(["pixels-2", *(",".join(map(str, f)) if isinstance(f, tuple) else str(f) for f in factors)])

    @property
    def downsampling(self) -> int:
        """One image pixel per latent pixel."""
        return 1

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return (images - shift) * scaling, as fp32."""
        return (images_B3HW.to(torch.float32) - _over_channels(self.shift_factor, images_B3HW)) * _over_channels(
            self.scaling_factor, images_B3HW
        )

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return the latents as an image, cut to [-1, 1] since a sampler may overshoot."""
        images_B3HW = latents_BCHW.to(torch.float32) / _over_channels(self.scaling_factor, latents_BCHW)
        return (images_B3HW + _over_channels(self.shift_factor, latents_BCHW)).clamp(-1.0, 1.0)


RAW_PIXELS = PixelVAE(shift_factor=0.0, scaling_factor=1.0)
"""What corpora without an autoencoder are stored by: pixels in [-1, 1], which training normalises."""


def _over_channels(factor: Factor, like_BCHW: Tensor) -> float | Tensor:
    return torch.tensor(factor, device=like_BCHW.device)[:, None, None] if isinstance(factor, tuple) else factor


@dataclass(frozen=True, kw_only=True)
class HashedWordEncoder:
    """The embedded text encoder: each word a fixed standard-normal vector drawn from the word itself, plus position.

    To each word's vector those of the other words are added, weaker the farther away, and with their components
    shifted by the distance: a fixed orthogonal map, so each can be told apart. Thus "seven" in "a red seven above a
    two" carries its colour and its place, as a token of a trained encoder carries its context. It knows every word and
    nothing of meaning. Case and punctuation are dropped; a caption without words is the null text, one token that
    stands for no word, so that cross-attention never meets an empty row.
    """

    embed_dim: int
    max_tokens: int

    @property
    def identity(self) -> str:
        """Name of this encoder and its sizes."""
        return f"words-3-{self.embed_dim}x{self.max_tokens}"

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the number of words of each caption; no words take one token."""
        return [max(1, len(_split_words(caption))) for caption in captions]

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Encode captions of at most `max_tokens` words.

        Returns:
            embeds_BTD: word vectors plus their context plus sinusoidal positions; padding is zero.
            pooled_BD: mean of the word vectors, times the root of their number: components of about unit variance.

        Raises:
            DataError: a caption has more words than `max_tokens`.
        """
        words_of = [_split_words(caption) or [_NULL_WORD] for caption in captions]
        for caption, words in zip(captions, words_of, strict=True):
            if len(words) > self.max_tokens:
                raise DataError(
                    f"caption {caption!r}: {len(words)} tokens are more than the text encoder's {self.max_tokens}; "
                    "shorten the caption or raise model.max_text_tokens"
                )
        vocabulary = {word: i + 1 for i, word in enumerate(dict.fromkeys(word for words in words_of for word in words))}
        vectors_VD = np.stack([np.zeros(self.embed_dim), *(_word_vector(w, self.embed_dim) for w in vocabulary)])
        ids_BT = np.zeros((len(captions), self.max_tokens), dtype=np.int64)  # 0 is padding
        for row_T, words in zip(ids_BT, words_of, strict=True):
            row_T[: len(words)] = [vocabulary[word] for word in words]

        mask_BT = ids_BT > 0
        word_vectors_BTD = vectors_VD[ids_BT]
        positions_TD = _sinusoidal_positions(self.max_tokens, self.embed_dim)
        embeds_BTD = word_vectors_BTD + (_context(word_vectors_BTD) + positions_TD) * mask_BT[:, :, None]
        pooled_BD = word_vectors_BTD.sum(axis=1) / np.sqrt(mask_BT.sum(axis=1, keepdims=True))
        return TextEmbeddings(
            embeds_BTD=torch.from_numpy(embeds_BTD.astype(np.float32)),
            mask_BT=torch.from_numpy(mask_BT),
            pooled_BD=torch.from_numpy(pooled_BD.astype(np.float32)),
        )

    def null(self) -> TextEmbeddings:
        """Return the encoding of the empty caption, B = 1."""
        return self.encode([""])


_CONTEXT_FADE = 0.8
_CONTEXT_SHIFT = 5  # up to 12 words each way, the shifts of 128 components differ

_NULL_WORD = "<null>"
"""No caption holds it: its brackets are not part of any word."""


def _split_words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


@functools.lru_cache(maxsize=65536)
def _word_vector(word: str, embed_dim: int) -> npt.NDArray[np.float64]:
    return sample_rng(0, stable_seed(word), "word vector").standard_normal(embed_dim)


def _context(word_vectors_BTD: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return for each token the sum over distances k of fade**k times the words k before and k after, shifted."""
    context_BTD = np.zeros_like(word_vectors_BTD)
    for k in range(1, word_vectors_BTD.shape[1]):
        context_BTD[:, k:] += _CONTEXT_FADE**k * np.roll(word_vectors_BTD[:, :-k], k * _CONTEXT_SHIFT, axis=-1)
        context_BTD[:, :-k] += _CONTEXT_FADE**k * np.roll(word_vectors_BTD[:, k:], -k * _CONTEXT_SHIFT, axis=-1)
    return context_BTD


@functools.cache
def _sinusoidal_positions(num_positions: int, embed_dim: int) -> npt.NDArray[np.float64]:
    """Return (T, D) sines, then cosines, of positions at wavelengths from 2 pi to 1000 times that."""
    frequencies = 1000.0 ** -np.linspace(0.0, 1.0, (embed_dim + 1) // 2)
    angles = np.arange(num_positions)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :embed_dim]
