"""The digit-scenes score of a model while it trains: drawn and checked by all ranks together."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecdit_ds.data.digit_scenes.scenes import KINDS, Scene
from ecdit_ds.errors import NonFiniteError
from ecdit_ds.evaluation.digit_scenes.score import SceneAlignment, alignment_of, mismatched_specs, score_alignment
from ecdit_ds.model.sharding import ShardIndex

DrawPictures = Callable[[Sequence[str], Sequence[int]], npt.NDArray[np.uint8]]
"""(prompts, seeds) -> pictures (B, H, W, 3); may be collective."""


def drawn_alignment(
    draw: DrawPictures, scenes: Sequence[Scene], *, batch_size: int, dp: ShardIndex, total: Callable[[Tensor], Tensor]
) -> SceneAlignment:
    """Draw the captions of scenes and score the pictures; collective, equal on all ranks and layouts.

    Args:
        draw: called equally often on every rank, always for `batch_size` pictures.
        scenes: picture i has seed i.
        batch_size: pictures a rank draws at a time.
        dp: this rank's share of the pictures.
        total: sums an fp64 tensor over the data-parallel ranks.

    Raises:
        NonFiniteError: on all ranks alike, where pictures of any are not finite.
    """
    others = mismatched_specs([scene.claim for scene in scenes])
    counts_SK3 = alignment_of(np.zeros((3, len(KINDS), 3), dtype=np.int64)).counts()
    num_faults = 0
    for start in range(0, len(scenes), batch_size * dp.count):
        places = range(start + dp.index * batch_size, start + (dp.index + 1) * batch_size)
        chosen = [min(place, len(scenes) - 1) for place in places]
        try:
            images = draw([scenes[i].caption for i in chosen], chosen)
        except NonFiniteError:  # the others still draw, with this rank
            num_faults += 1
            continue
        own = [place for place in places if place < len(scenes)]
        if own:
            part = score_alignment(images[: len(own)], [scenes[i] for i in own], [others[i] for i in own])
            counts_SK3 = counts_SK3 + part.counts()
    summed = total(torch.tensor([num_faults, *counts_SK3.ravel().tolist()], dtype=torch.float64))
    num_faults, *counts = summed.round().long().tolist()
    if num_faults:
        raise NonFiniteError(f"pictures of {num_faults} batches of scenes are not finite, so there is no score")
    return alignment_of(np.array(counts).reshape(counts_SK3.shape))
