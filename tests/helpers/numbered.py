"""Pictures, captions and encoders by number: all that is made of sample i is i, and can be taken for no other's.

Picture i is grey of level 5 i, its caption is `picture i`, its latents are i, its text has 1 + i % 4 tokens of i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ecdit_ds.data.encoders.base import TextEmbeddings
from ecdit_ds.data.latents.dataset import Samples
from tests.helpers.photographs import encoded

TOKENS, WIDTH, LEVEL = 4, 6, 5


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (8, 8), wide: tuple[int, int] = (8, 8)) -> Path:
    """Write pictures of one size (width, height), every third of another."""
    folder.mkdir()
    for i in range(count):
        picture = Image.new("RGB", wide if i % 3 == 0 else size, (LEVEL * i,) * 3)
        (folder / f"{i:02}.png").write_bytes(encoded(picture, "PNG"))
        (folder / f"{i:02}.txt").write_text(f"picture {i}")
    return folder


@dataclass(frozen=True)
class NumberedImages:
    """An `ImageEncoder` whose latents of picture i are i, and not finite for some."""

    overflows: Sequence[int] = ()
    identity: str = "numbered pictures"
    downsampling: int = 1

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return latents of three channels."""
        latents_BCHW = ((images_B3HW + 1) * 127.5 / LEVEL).round()
        for latents_CHW in latents_BCHW:
            if int(latents_CHW[0, 0, 0]) in self.overflows:
                latents_CHW[1, -1, -1] = torch.inf
        return latents_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return the pictures."""
        return latents_BCHW * LEVEL / 127.5 - 1


@dataclass(frozen=True)
class NumberedTexts:
    """A `TextEncoder` whose vectors of caption `picture i` are i; for some, one of embeds or of pooled is no number."""

    broken_embeds: Sequence[int] = ()
    broken_pooled: Sequence[int] = ()
    identity: str = "numbered words"
    embed_dim: int = WIDTH
    max_tokens: int = TOKENS

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return 1 to 4."""
        return [1 + _number_of(caption) % TOKENS for caption in captions]

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Return vectors of one number."""
        numbers_B = torch.tensor([float(_number_of(caption)) for caption in captions])
        mask_BT = torch.arange(TOKENS)[None] < torch.tensor(self.count_tokens(captions))[:, None]
        embeds_BTD, pooled_BD = (mask_BT * numbers_B[:, None])[:, :, None].repeat(1, 1, WIDTH), numbers_B[:, None]
        pooled_BD = pooled_BD.repeat(1, WIDTH)
        for row, number in enumerate(numbers_B.int().tolist()):
            if number in self.broken_embeds:
                embeds_BTD[row, 0, -1] = torch.nan
            if number in self.broken_pooled:
                pooled_BD[row, -1] = -torch.inf
        return TextEmbeddings(embeds_BTD=embeds_BTD, mask_BT=mask_BT, pooled_BD=pooled_BD)

    def null(self) -> TextEmbeddings:
        """Return the vectors of `picture 0`."""
        return self.encode(["picture 0"])


def _number_of(caption: str) -> int:
    return int(caption.split()[-1])


def numbers_in(samples: Samples) -> list[int]:
    """Return the number of each sample of a batch, after comparing everything that is there of it with its caption."""
    numbers = [_number_of(caption) for caption in samples.captions]
    assert len(samples.stream_index_B) == len(numbers)
    own = NumberedTexts().encode(samples.captions)
    for i, number in enumerate(numbers):
        if samples.pixels_BHW3.numel():
            assert (samples.pixels_BHW3[i] == LEVEL * number).all(), f"pixels beside caption {number}"
        else:
            assert (samples.latents_BCHW[i] == number).all(), f"latents beside caption {number}"
        if not samples.lacks_text:
            assert torch.equal(samples.text_embeds_BTD[i].float(), own.embeds_BTD[i]), f"text beside caption {number}"
            assert torch.equal(samples.text_mask_BT[i], own.mask_BT[i]), f"mask beside caption {number}"
            assert torch.equal(samples.text_pooled_BD[i].float(), own.pooled_BD[i]), f"pooled beside caption {number}"
    return numbers
