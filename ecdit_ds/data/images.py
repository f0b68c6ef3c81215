"""From the bytes of an image file to RGB pixels of a chosen size, whatever the file is.

Suffixes: B batch, H, W pixels.
"""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ecdit_ds.data.causes import BadSample, Cause

MAX_PIXELS = 89_000_000
"""Beyond it an image is refused by its header, before memory is taken: a PNG of 24 kB can claim 196 megapixels."""
MAX_FILE_BYTES = 2**28
RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)
"""Width over height of common pictures."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""Read by Pillow itself; others start programs (EPS) or are no photographs."""
_PAGE_STARTS = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<script")
_FAILURES = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error, zlib.error,
             OverflowError, MemoryError)  # fmt: skip
"""What Pillow's readers raise for files that are damaged."""
Size = tuple[int, int]
"""(height, width) in pixels."""


def decode_image(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image | BadSample:
    """Return an upright RGB image, transparent parts white; of an animation, the first picture.

    Its `info["converted"]` lists what was changed of it: `CMYK`, `palette`, `grey`, `16 bits`, `alpha`, `turned`.

    Args:
        content: of the file.
        name: of the sample, for a BadSample.
        max_pixels: more are refused before any is decoded.
    """
    if not content:
        return BadSample(cause="empty image file", name=name)
    if len(content) > MAX_FILE_BYTES:
        return BadSample(cause="too many bytes", name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what is told as a cause, or mended
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    return BadSample(cause="too many pixels", name=name)
                image.load()
                converted = _conversions(image)
                rgb = _to_rgb(_upright(image))
                rgb.info = {"converted": converted}
                return rgb
        except Image.DecompressionBombError:
            return BadSample(cause="too many pixels", name=name)
        except UnidentifiedImageError:
            return BadSample(cause=_cause_of_unknown(content), name=name)
        except _FAILURES as error:
            is_short = any(word in str(error).lower() for word in ("truncated", "broken data stream", "unexpected end"))
            return BadSample(cause="truncated image" if is_short else "damaged image", name=name)


def _cause_of_unknown(content: bytes) -> Cause:
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return "web page instead of an image" if start.startswith(_PAGE_STARTS) else "not an image"


def _conversions(image: Image.Image) -> list[str]:
    """Return what has to be changed before an image is RGB and upright."""
    kinds = {"CMYK": "CMYK", "P": "palette", "PA": "palette", "L": "grey", "LA": "grey", "1": "grey"}
    found = [kinds[image.mode]] if image.mode in kinds else []
    if image.mode.startswith("I"):
        found.append("16 bits")
    if image.has_transparency_data:
        found.append("alpha")
    if _orientation(image) in range(2, 9):
        found.append("turned")
    return found


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except _FAILURES:  # as `_upright`
        return None


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; pixels are good even where the note about them is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except _FAILURES:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut them off at 255
        deep_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((deep_HW + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels of unknown range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def fit_image(image: Image.Image, size: Size) -> Image.Image:
    """Cut the largest part of the size's proportions from the middle, and resample it by Lanczos."""
    return ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Return images_B3HW, fp32 in [-1, 1], of RGB images of one size."""
    return from_pixels(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


def from_pixels(pixels_BHW3: Tensor) -> Tensor:
    """Return images_B3HW, fp32 in [-1, 1], of uint8 pixels."""
    return pixels_BHW3.permute(0, 3, 1, 2).to(torch.float32).contiguous() / 127.5 - 1.0


def buckets_of(area: int, patch: int, downsampling: int, ratios: Sequence[float] = RATIOS) -> tuple[Size, ...]:
    """Return image sizes of about one area and different proportions, none with more patches than the square.

    Args:
        area: pixels of the square.
        patch: latent pixels that a patch covers along a side.
        downsampling: image pixels per latent pixel.
        ratios: width over height.

    Returns:
        Sizes (height, width), sides multiples of patch x downsampling, from tall to wide, each once.
    """
    unit = patch * downsampling
    budget = max(1, round(math.sqrt(area) / unit)) ** 2
    sizes = []
    for ratio in sorted(ratios):
        # The shorter side is rounded and the longer one takes what is left, so that r and 1/r are mirror images.
        short = max(1, round(math.sqrt(budget * min(ratio, 1 / ratio))))
        long = budget // short
        sizes.append((long * unit, short * unit) if ratio < 1 else (short * unit, long * unit))
    return tuple(dict.fromkeys(sizes))


def nearest_bucket(image_size: Size, buckets: Sequence[Size]) -> int:
    """Return which bucket loses least of an image by cutting: the nearest by the logarithm of width over height."""
    ratio = math.log(image_size[1] / image_size[0])
    return min(range(len(buckets)), key=lambda i: (abs(math.log(buckets[i][1] / buckets[i][0]) - ratio), i))
