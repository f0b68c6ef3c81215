"""Which digits a picture shows, in which colours, and where: a detector for pictures that should be digit scenes.

Digit scenes stand in a grid of cells, so the detector looks at each cell that has ink, and up to one digit pixel around
it. A window is named by the palette colour its light is nearest to and by a kernel classifier that has seen the
training split's digits, and also shapes that are none: so it may say "no digit". All objects of a scene have one
scale; it is the one at which digits explain most of the light.

Suffixes: B pictures; H, W pixels of a picture or window; C colour channels; N windows; O offsets; K palette colours.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ecdit_ds.data.digit_scenes.scenes import DIGIT_PIXELS, MIN_CANVAS_PIXELS, PALETTE, digit_images, upsampling_matrix
from ecdit_ds.errors import DataError

Floats = npt.NDArray[np.float32]

_MIN_SCORE = 0.35
"""Below it a window is no digit. Of the held-out digits 1 in 100 is lost, of two digits' averages 1 in 3 passes."""
_MIN_LIGHT = 3.0
"""Sum of squared brightness, at scale 1, of a cell worth looking at; the faintest of the real digits has 8.6."""
_KERNEL_WIDTH = 0.15
_RIDGE = 0.01
_NON_DIGITS_A_KIND = 100
_PICTURES_AT_ONCE = 64
"""Bounds the memory; the result does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class FoundObject:
    """One digit that a picture shows. Pixels count from the top left, and are negative where it is partly outside."""

    digit: int
    colour: str
    top: int
    left: int
    side: int
    """Pixels of its square box: 8 times its scale."""


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """For each window of one scale with a digit in it: the picture, how well the digit explains it, and the object."""

    picture_N: npt.NDArray[np.int64]
    weight_N: Floats
    objects: tuple[FoundObject, ...]


def find_objects(images_BHWC: npt.NDArray[np.uint8]) -> list[tuple[FoundObject, ...]]:
    """Return the digits of each picture, from the top left to the bottom right; pictures do not influence one another.

    Raises:
        DataError: the pictures are not uint8 RGB of 16 x 16 pixels or more.
    """
    shape = images_BHWC.shape
    if images_BHWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape[1:3]) < MIN_CANVAS_PIXELS:
        raise DataError(
            f"pictures of shape {shape} and type {images_BHWC.dtype} cannot be checked: uint8 of (pictures, height, "
            f"width, 3) is needed, {MIN_CANVAS_PIXELS} pixels or more high and wide"
        )
    found: list[tuple[FoundObject, ...]] = []
    for start in range(0, len(images_BHWC), _PICTURES_AT_ONCE):
        found += _find_at_best_scale(images_BHWC[start : start + _PICTURES_AT_ONCE])
    return found


def _find_at_best_scale(images_BHWC: npt.NDArray[np.uint8]) -> list[tuple[FoundObject, ...]]:
    num_pictures, height, width, _ = images_BHWC.shape
    pixels_BHWC = images_BHWC.astype(np.float32) / np.float32(255)
    best: list[tuple[FoundObject, ...]] = [()] * num_pictures
    best_weight_B = np.zeros(num_pictures)
    for scale in range(1, min(height, width) // MIN_CANVAS_PIXELS + 1):
        candidates = _candidates(pixels_BHWC, scale)
        weight_B = np.bincount(candidates.picture_N, candidates.weight_N, minlength=num_pictures)
        for i in np.flatnonzero(weight_B > best_weight_B).tolist():
            best[i] = tuple(candidates.objects[n] for n in np.flatnonzero(candidates.picture_N == i))
        best_weight_B = np.maximum(weight_B, best_weight_B)
    return best


def _candidates(pixels_BHWC: Floats, scale: int) -> _Candidates:
    """Look at every cell with light, through windows at several offsets, and keep each cell's best window."""
    side = DIGIT_PIXELS * scale
    picture_N, top_N, left_N, light_N = _cells_with_light(pixels_BHWC, side)
    offsets_O = np.unique(np.rint(np.array([-1, -0.5, 0, 0.5, 1]) * scale)).astype(int)
    offsets_O2 = np.stack(np.meshgrid(offsets_O, offsets_O, indexing="ij"), axis=-1).reshape(-1, 2)
    margin = ((0, 0), (scale, scale), (scale, scale), (0, 0))
    windows_BYXCHW = np.lib.stride_tricks.sliding_window_view(np.pad(pixels_BHWC, margin), (side, side), axis=(1, 2))
    top_NO, left_NO = top_N[:, None] + offsets_O2[:, 0], left_N[:, None] + offsets_O2[:, 1]
    windows_NOCHW = windows_BYXCHW[picture_N[:, None], top_NO + scale, left_NO + scale]
    colour_NO, digit_NO, score_NO = (
        values.reshape(top_NO.shape) for values in _name_windows(windows_NOCHW.reshape(-1, 3, side, side), scale)
    )
    chosen_N = (np.arange(len(score_NO)), score_NO.argmax(axis=1))
    is_digit_N = score_NO[chosen_N] >= _MIN_SCORE
    named = zip(digit_NO[chosen_N], colour_NO[chosen_N], top_NO[chosen_N], left_NO[chosen_N], is_digit_N, strict=True)
    names = tuple(PALETTE)
    return _Candidates(
        picture_N=picture_N[is_digit_N],
        weight_N=(light_N * score_NO[chosen_N])[is_digit_N],
        objects=tuple(
            FoundObject(digit=int(digit), colour=names[colour], top=int(top), left=int(left), side=side)
            for digit, colour, top, left, is_digit in named
            if is_digit
        ),
    )


def _cells_with_light(pixels_BHWC: Floats, side: int) -> tuple[Any, Any, Any, Floats]:
    """Return (picture, top, left, light) of each cell that has enough of it."""
    rows, columns = pixels_BHWC.shape[1] // side, pixels_BHWC.shape[2] // side
    light_BHW = np.square(pixels_BHWC[:, : rows * side, : columns * side].max(axis=3))
    light_BRC = light_BHW.reshape(-1, rows, side, columns, side).sum(axis=(2, 4))
    picture_N, row_N, column_N = np.nonzero(light_BRC > _MIN_LIGHT * (side / DIGIT_PIXELS) ** 2)
    return picture_N, row_N * side, column_N * side, light_BRC[picture_N, row_N, column_N]


def _name_windows(windows_NCHW: Floats, scale: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
    """Return the palette colour, the digit, and how sure it is (about 1 for a clear digit, about 0 for none)."""
    palette_KC = np.array(list(PALETTE.values()), dtype=np.float32) / 255
    brightness_NHW = np.sqrt(np.square(windows_NCHW).sum(axis=1))
    light_NC = np.einsum("nhw,nchw->nc", brightness_NHW, windows_NCHW)
    # Paler ink is the same colour, darker: the direction tells the colour, not the length.
    colour_N = (light_NC @ (palette_KC / np.linalg.norm(palette_KC, axis=1, keepdims=True)).T).argmax(axis=1)
    rgb_NC = palette_KC[colour_N]
    ink_NHW = np.einsum("nchw,nc->nhw", windows_NCHW, rgb_NC / np.square(rgb_NC).sum(axis=1, keepdims=True))
    reduce = np.linalg.pinv(
        upsampling_matrix(scale)
    )  # the least squares fit of 8 x 8 pixels to what was enlarged from them
    ink_NHW = np.clip(reduce @ ink_NHW @ reduce.T, 0, 1)
    score_ND = _digit_classifier().predict(ink_NHW.reshape(len(ink_NHW), -1)) if len(ink_NHW) else np.zeros((0, 10))
    return colour_N, score_ND.argmax(axis=1), score_ND.max(axis=1)


@functools.cache
def _digit_classifier() -> Any:
    """Return the classifier of (N, 64) ink: ten scores, near 1 for the digit it is and near 0 where it is none.

    Kernel ridge regression to one-hot targets. A Gaussian kernel vanishes far from all it has seen, so an unknown shape
    scores 0; shapes that are near digits and are none are in the training set with target 0.
    """
    images = digit_images("train")
    none_NHW = np.concatenate(_non_digits(images.ink_NHW, images.digit_N))
    ink_NHW = np.concatenate([images.ink_NHW, none_NHW])
    target_ND = np.concatenate([np.eye(10)[images.digit_N], np.zeros((len(none_NHW), 10))])
    from sklearn.kernel_ridge import KernelRidge  # takes a second, which only who checks pictures need wait

    classifier = KernelRidge(kernel="rbf", gamma=_KERNEL_WIDTH, alpha=_RIDGE)
    classifier.fit(ink_NHW.reshape(len(ink_NHW), -1), target_ND)
    # As the kernel matrices are; with fp64 each prediction spends three quarters of its time on their conversion.
    classifier.dual_coef_ = classifier.dual_coef_.astype(np.float32)
    return classifier


def _non_digits(ink_NHW: Floats, digit_N: npt.NDArray[np.int64]) -> Sequence[Floats]:
    """Return what a detector meets that is no digit: blurs, mixtures, halves of one or two digits, quarters of one."""
    rng, half = np.random.default_rng(0), DIGIT_PIXELS // 2

    def some() -> Floats:
        return ink_NHW[rng.integers(len(ink_NHW), size=_NON_DIGITS_A_KIND)]

    def sometimes() -> Floats:
        return some() * (rng.random((_NON_DIGITS_A_KIND, 1, 1)) < 0.5).astype(np.float32)

    first_N, second_N = rng.integers(len(ink_NHW), size=(2, _NON_DIGITS_A_KIND))
    differ_N = digit_N[first_N] != digit_N[second_N]
    quarters_NHW = upsampling_matrix(2) @ some() @ upsampling_matrix(2).T
    corners = rng.integers(2, size=(_NON_DIGITS_A_KIND, 2)) * DIGIT_PIXELS
    return [
        _blur(_blur(some())),
        ((ink_NHW[first_N] + ink_NHW[second_N]) / 2)[differ_N],
        np.concatenate([some()[:, :, half:], sometimes()[:, :, :half]], axis=2),
        np.concatenate([sometimes()[:, :, half:], some()[:, :, :half]], axis=2),
        np.concatenate([some()[:, half:], sometimes()[:, :half]], axis=1),
        np.concatenate([sometimes()[:, half:], some()[:, :half]], axis=1),
        np.stack(
            [
                quarter[top : top + DIGIT_PIXELS, left : left + DIGIT_PIXELS]
                for quarter, (top, left) in zip(quarters_NHW, corners.tolist(), strict=True)
            ]
        ),
    ]


def _blur(ink_NHW: Floats) -> Floats:
    """Return means of 3 x 3 pixels."""
    padded = np.pad(ink_NHW, ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).mean(axis=(3, 4))
