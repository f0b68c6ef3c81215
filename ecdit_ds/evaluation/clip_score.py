"""CLIP score: how well pictures fit their captions, as the mean of max(100 cos, 0) (Hessel et al. 2104.08718).

The cosine is torchmetrics'. Its own `CLIPScore` cuts the mean at 0 instead of each score, keeps no scores, and in
1.9.0 cannot read what `get_image_features` of transformers 5 returns; the tests compare with it through an adapter.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from PIL import Image
from torchmetrics.functional import cosine_similarity

from ecdit_ds.errors import EvaluationError
from ecdit_ds.evaluation.clip import Clip
from ecdit_ds.evaluation.pretrained import chunks


def clip_scores(pictures: Iterable[tuple[Image.Image, str]], clip: Clip, *, batch_size: int) -> Iterator[float]:
    """Yield the score of each picture and its caption, in [0, 100] and in order.

    Scores of several ranks are put together by chaining the lists; their mean does not depend on the order.
    """
    for chunk in chunks(pictures, batch_size):
        captions_BD = clip.embed_texts([caption for _, caption in chunk])
        (pictures_BD,) = clip.embed_pictures((picture for picture, _ in chunk), batch_size=batch_size)
        cosines_B = cosine_similarity(pictures_BD.double(), captions_BD.double(), reduction="none")
        yield from (100.0 * torch.as_tensor(cosines_B).clamp(min=0.0)).tolist()


def is_score(value: object) -> bool:
    """Return whether a value read from a file can be a score."""
    return isinstance(value, float) and math.isfinite(value)


def mean_clip_score(scores: Sequence[float]) -> float:
    """Return the mean, equal for every order of `scores`; raise EvaluationError where there are none."""
    if not scores:
        raise EvaluationError("CLIP score: no pictures; give at least one with its caption")
    return math.fsum(scores) / len(scores)
