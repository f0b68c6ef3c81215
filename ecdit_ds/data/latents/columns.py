"""Encoded samples as rows of a shard, and the sums that a set's statistics of latents are made of.

Suffixes: B batch, C channels, H, W pixels of latents.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ecdit_ds.data.encoders.base import TextEmbeddings, TextEncoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def to_table(
    *,
    keys: Sequence[str],
    captions: Sequence[str],
    kinds: Sequence[str],
    latents_BCHW: Tensor,
    text: TextEmbeddings | None,
    dtype: torch.dtype,
) -> pa.Table:
    """Return B rows of a shard; floats are stored as `dtype`, the mask as a byte a token, and no text not at all."""
    columns = {
        "key": list(keys),
        "caption": list(captions),
        "kind": list(kinds),
        "latents": _binary_column(latents_BCHW, dtype),
    }
    if text is not None:
        columns |= {
            "text_embeds": _binary_column(text.embeds_BTD, dtype),
            "text_mask": _binary_column(text.mask_BT, torch.bool),
            "text_pooled": _binary_column(text.pooled_BD, dtype),
        }
    return pa.table(columns)


def null_columns(encoder: TextEncoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the text of no text by column, rounded as captions are."""
    with torch.no_grad():
        null = encoder.null()
    parts = {"text_embeds": null.embeds_BTD, "text_mask": null.mask_BT, "text_pooled": null.pooled_BD}
    return {name: part.to("cpu", torch.bool if name == "text_mask" else dtype) for name, part in parts.items()}


def _binary_column(tensor: Tensor, dtype: torch.dtype) -> pa.Array:
    rows = tensor.detach().to("cpu", dtype).reshape(len(tensor), -1).contiguous().view(torch.uint8).numpy()
    return pa.array([row.tobytes() for row in rows], type=pa.binary())


@dataclass(frozen=True, kw_only=True)
class LatentStats:
    """What mean and spread of latents follow from, a number a channel; sums of parts give the whole's."""

    numbers: int = 0
    """Values of each channel."""
    sums_C: tuple[float, ...] = ()
    squares_C: tuple[float, ...] = ()

    @classmethod
    def of(cls, latents_BCHW: Tensor) -> "LatentStats":
        """Return the sums of a batch, in fp64."""
        values_CN = latents_BCHW.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)
        squares_C = (values_CN**2).sum(dim=1)
        return cls(
            numbers=values_CN.shape[1], sums_C=tuple(values_CN.sum(dim=1).tolist()), squares_C=tuple(squares_C.tolist())
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what `LatentStats(**...)` reads again, exactly."""
        return {"numbers": self.numbers, "sums_C": list(self.sums_C), "squares_C": list(self.squares_C)}

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel."""
        means = [total / self.numbers for total in self.sums_C]
        squares = [total / self.numbers for total in self.squares_C]
        variances = [max(0.0, square - mean**2) for square, mean in zip(squares, means, strict=True)]
        return tuple(means), tuple(math.sqrt(variance) for variance in variances)


def sum_stats(parts: Iterable[LatentStats]) -> LatentStats:
    """Return the sums over all parts, added in their order."""
    total = LatentStats()
    for part in parts:
        if not total.numbers:
            total = part
        elif part.numbers:
            total = LatentStats(
                numbers=total.numbers + part.numbers,
                sums_C=tuple(a + b for a, b in zip(total.sums_C, part.sums_C, strict=True)),
                squares_C=tuple(a + b for a, b in zip(total.squares_C, part.squares_C, strict=True)),
            )
    return total
