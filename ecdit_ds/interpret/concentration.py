"""How unevenly experts spread over patches, and whether they go where something is to be seen. Pure functions.

Suffixes: ... any leading dimensions, P patches of a picture, H, W pixels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from einops import rearrange

from ecdit_ds.data.digit_scenes.scenes import Scene

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_INK = 64
"""Level, of 255, above which a pixel is ink in any colour: digits of the palette are, the blur of a young model is
not."""


@dataclass(frozen=True, kw_only=True)
class ObjectShare:
    """What objects get beside what background gets; each (...), NaN where it has no value."""

    on_object: Floats
    """Mean experts per patch."""
    on_background: Floats
    ratio: Floats
    """Ratio of the two means; NaN where the background gets nothing."""
    rank_correlation: Floats
    """Spearman's, between being on an object and the number of experts; NaN where all patches get the same."""


def gini(counts: npt.ArrayLike) -> Floats:
    """Return (...): Gini's coefficient of counts (..., P), half the mean difference of two patches over the mean.

    0 where all patches get the same, or nothing; 1 - 1 / P where one gets all.
    """
    sorted_P = np.sort(np.asarray(counts, dtype=np.float64), axis=-1)
    size, total = sorted_P.shape[-1], sorted_P.sum(axis=-1)
    weighted = (sorted_P * (2 * np.arange(1, size + 1) - size - 1)).sum(axis=-1)
    return _ratio(weighted, size * total, where_zero=0.0)


def normalised_entropy(counts: npt.ArrayLike) -> Floats:
    """Return (...): the entropy of counts (..., P) as shares of their sum, over that of an even spread, log P.

    1 where all patches get the same, or nothing; 0 where one gets all.
    """
    counts_P = np.asarray(counts, dtype=np.float64)
    if counts_P.shape[-1] == 1:
        return np.ones(counts_P.shape[:-1])
    total = counts_P.sum(axis=-1, keepdims=True)
    share_P = _ratio(counts_P, np.broadcast_to(total, counts_P.shape), where_zero=1.0 / counts_P.shape[-1])
    logs_P = np.log(share_P, out=np.zeros_like(share_P), where=share_P > 0)
    return -(share_P * logs_P).sum(axis=-1) / np.log(counts_P.shape[-1])


def untaken_share(counts: npt.ArrayLike) -> Floats:
    """Return (...): the share of the patches of counts (..., P) that no expert takes."""
    return np.asarray(np.asarray(counts) == 0).mean(axis=-1)


def top_share(counts: npt.ArrayLike, num_experts: int) -> Floats:
    """Return (...): the largest share of all experts that one patch of counts (..., P) attracts (paper: up to 44 %)."""
    return np.asarray(counts).max(axis=-1) / num_experts


def object_share(counts: npt.ArrayLike, on_object_P: Bools) -> ObjectShare:
    """Compare what patches on objects get with what the others get, for counts (..., P)."""
    counts_P = np.asarray(counts, dtype=np.float64)
    on_object, on_background = _mean(counts_P[..., on_object_P]), _mean(counts_P[..., ~on_object_P])
    return ObjectShare(
        on_object=on_object,
        on_background=on_background,
        ratio=_ratio(on_object, on_background, where_zero=np.nan),
        rank_correlation=_spearman(counts_P, on_object_P.astype(np.float64)),
    )


def object_mask_of_scene(scene: Scene, patch_pixels: int) -> Bools:
    """Return bool (rows, columns): the patches of which half or more lies in an object's cell. The truth, exactly."""
    in_cell_HW = np.zeros(scene.image_HWC.shape[:2], dtype=np.bool_)
    for thing in scene.objects:
        in_cell_HW[thing.box] = True
    return np.asarray(_patches(in_cell_HW, patch_pixels).mean(axis=-1) >= 0.5)


def ink_mask(image_HWC: npt.NDArray[np.uint8], patch_pixels: int, threshold: int = _INK) -> Bools:
    """Return bool (rows, columns): the patches whose brightest pixel exceeds `threshold`, in any colour.

    On a black canvas these are the patches with something on them: the truth about a drawn picture, nearly.
    """
    return np.asarray(_patches(image_HWC.max(axis=-1), patch_pixels).max(axis=-1) > threshold)


def _patches(values_HW: npt.NDArray[np.generic], patch_pixels: int) -> npt.NDArray[np.generic]:
    return rearrange(values_HW, "(h p) (w q) -> h w (p q)", p=patch_pixels, q=patch_pixels)


def _spearman(counts_P: Floats, other_P: Floats) -> Floats:
    """Return (...): Pearson's correlation of ranks, tied values sharing their mean rank."""
    a, b = (_ranks(values) - (values.shape[-1] + 1) / 2 for values in (counts_P, other_P))
    spread = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return _ratio((a * b).sum(axis=-1), spread, where_zero=np.nan)


def _ranks(values_P: Floats) -> Floats:
    smaller = (values_P[..., None, :] < values_P[..., :, None]).sum(axis=-1)
    equal = (values_P[..., None, :] == values_P[..., :, None]).sum(axis=-1)
    return smaller + (equal + 1) / 2


def _mean(values_P: Floats) -> Floats:
    size = np.full(values_P.shape[:-1], values_P.shape[-1], dtype=np.float64)
    return _ratio(values_P.sum(axis=-1), size, where_zero=np.nan)


def _ratio(above: Floats, below: Floats, *, where_zero: float) -> Floats:
    above, below = np.asarray(above), np.asarray(below)
    return np.divide(above, below, out=np.full(above.shape, where_zero), where=below != 0)
