"""From the bytes of an image file to RGB pixels of a chosen size, whatever the file is.

Suffixes: B batch, H, W pixels.
"""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from ecdit_ds.data.sources.bad_sample import BadSample, BadSampleReason
from ecdit_ds.errors import DataError

DECODING = 3
"""Counts up when a file comes to give other pixels; half a set is not done by one and half by another."""
MAX_PIXELS = 89_000_000
"""Beyond it an image is refused by its header, before memory is taken: a PNG of 24 kB can claim 196 megapixels."""
MAX_FILE_BYTES = 2**28
RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)
"""Width over height of common pictures."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""Read by Pillow itself; others start programs (EPS) or are no photographs."""
_PAGE_STARTS = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<script")
_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    struct.error,
    zlib.error,
    OverflowError,
    MemoryError,
    ImageCms.PyCMSError,
)
"""What Pillow's readers raise for files that are damaged."""
_SAME_LEVELS = 2
"""Most levels of 255 by which two descriptions of sRGB differ: curves are sampled and numbers rounded."""
_PILLOW_FACTS = ("icc_profile", "gamma", "chromaticity", "srgb", "transparency", "interlace")
"""Keys of `info` that are numbers or bytes; a PNG's text comments go there too, under any name."""
_SRGB_GAMMA = 1 / 2.2
_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""As a PNG states them: x and y of white, red, green and blue."""
Size = tuple[int, int]
"""(height, width) in pixels."""


def decode_image(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image | BadSample:
    """Return an upright image in sRGB, transparent parts white; of an animation, the first picture.

    Its `info["converted"]` lists what was changed of it (`CMYK`, `palette`, `grey`, `16 bits`, `alpha`, `turned`,
    `colour profile`) and what was not followed, so that numbers were taken as sRGB's (`colour profile ignored`,
    `gAMA or cHRM ignored`).

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
                if max(image.width * image.height, _tile_pixels(image)) > max_pixels:
                    return BadSample(cause="too many pixels", name=name)
                converted = ["16 bits"] if _is_deep(image) else []
                _drop_remarks(image)
                image.load()
                _drop_remarks(image)  # that stood after the pixels
                rgb, told = _to_rgb(_upright(image))
                rgb.info = {"converted": [*converted, *_conversions(image), *told]}
                return rgb
        except Image.DecompressionBombError:
            return BadSample(cause="too many pixels", name=name)
        except UnidentifiedImageError:
            return BadSample(cause=_cause_of_unknown(content), name=name)
        except _FAILURES as error:
            is_short = any(word in str(error).lower() for word in ("truncated", "broken data stream", "unexpected end"))
            return BadSample(cause="truncated image" if is_short else "damaged image", name=name)


def read_image(path: Path) -> Image.Image:
    """Return the image of a file, as `decode_image` does.

    Raises:
        DataError: there is none that can be read; says why.
    """
    try:
        image = decode_image(path.read_bytes(), path.name)
    except OSError as error:
        raise DataError(f"{path}: is no picture that can be read ({error.strerror})") from None
    if isinstance(image, BadSample):
        raise DataError(f"{path}: is no picture that can be read ({image.cause})")
    return image


def _drop_remarks(image: Image.Image) -> None:
    """Take out words that a PNG has under a name by which Pillow knows facts."""
    for name in _PILLOW_FACTS:
        if isinstance(image.info.get(name), str):
            del image.info[name]


def _cause_of_unknown(content: bytes) -> BadSampleReason:
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return "web page instead of an image" if start.startswith(_PAGE_STARTS) else "not an image"


def _tile_pixels(image: Image.Image) -> int:
    """Return how many pixels each tile of a TIFF claims: memory is taken for one, whatever the image's size."""
    tags = getattr(image, "tag_v2", {})
    sides = [tags.get(tag) or 0 for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
    return int(sides[0]) * int(sides[1])


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Return whether a file that is not loaded has 16 bits a colour; of three colours, Pillow keeps the upper eight."""
    return image.mode.startswith("I") or any(";16" in str(tile) for tile in image.tile)


def _conversions(image: Image.Image) -> list[str]:
    """Return what has to be changed before an image is RGB and upright."""
    kinds = {"CMYK": "CMYK", "P": "palette", "PA": "palette", "L": "grey", "LA": "grey", "1": "grey"}
    found = [kinds[image.mode]] if image.mode in kinds else []
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


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Return an opaque image in sRGB, and what became of its description of colours."""
    alpha = None
    if image.mode == "F":
        raise ValueError("pixels of unknown range")
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut them off at 255
        deep_HW = np.asarray(image).astype(np.int64).clip(0, 65535)
        colours = Image.fromarray(((deep_HW + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = layer.getchannel("A")
        colours = layer.getchannel("R") if image.mode in ("L", "LA") else layer.convert("RGB")
        del layer  # a large picture's copies are gigabytes
    else:
        colours = image if image.mode in ("L", "CMYK") else image.convert("L" if image.mode == "1" else "RGB")
    if image.mode == "LAB" and "icc_profile" in image.info:  # of its own, that is no device's
        rgb, told = colours, ["colour profile ignored"]
    else:
        rgb, told = _in_srgb(colours, image.info)
    del colours
    if alpha is not None:  # laid on white after its colours are sRGB's, as white is
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return rgb, told


def _in_srgb(colours: Image.Image, info: Mapping[str | tuple[int, int], Any]) -> tuple[Image.Image, list[str]]:
    """Return a grey, RGB or CMYK image in sRGB, by the ICC profile in a file's `info`.

    What the profile says of other colours than the image has, or does not say at all, is not followed; nor are a PNG's
    notes on gamma and primaries, which are told where they are not sRGB's.
    """
    if "icc_profile" not in info:
        return colours.convert("RGB"), [] if _says_srgb(info) else ["gAMA or cHRM ignored"]
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(info["icc_profile"])).profile
        if colours.mode == "L" and profile.xcolor_space.strip() == "RGB":
            colours = colours.convert("RGB")
        transform = _to_srgb(info["icc_profile"], colours.mode)
        return (colours, []) if transform is None else (_applied(colours, transform), ["colour profile"])
    except _FAILURES:
        return colours.convert("RGB"), ["colour profile ignored"]


def _says_srgb(info: Mapping[str | tuple[int, int], Any]) -> bool:
    """Return whether a PNG's notes on colours, if there are any, describe sRGB."""
    if "srgb" in info:
        return True
    primaries = info.get("chromaticity", _SRGB_PRIMARIES)
    is_near = all(abs(one - other) < 0.01 for one, other in zip(primaries, _SRGB_PRIMARIES, strict=True))
    return is_near and abs(info.get("gamma", _SRGB_GAMMA) - _SRGB_GAMMA) < 0.02


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what turns colours of a profile into sRGB; None for a profile of sRGB, which must not change a byte.

    Raises:
        PyCMSError, OSError: the profile is broken, or of other colours than the mode has.
    """
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "RGB":
        return transform
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    probe_NC = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    shown_NC = np.asarray(_applied(Image.fromarray(probe_NC), transform))
    is_srgb = np.abs(shown_NC.astype(int) - probe_NC).max() <= _SAME_LEVELS
    return None if is_srgb else transform


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "not in place"
    return converted


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
