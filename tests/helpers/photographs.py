"""Real photographs that come with libraries, and files that are not what they should be."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs() -> list[Image.Image]:
    """Return a temple, a flower (scikit-learn) and a portrait (matplotlib), small enough for tests."""
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    with Image.open(hopper) as portrait:
        images.append(portrait.convert("RGB"))
    return [image.resize((image.width // 4, image.height // 4)) for image in images]


def crops(count: int, *, side: int = 48) -> list[Image.Image]:
    """Return `count` different parts of the photographs."""
    pictures, parts = photographs(), []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        left, top = 7 * i % (picture.width - side), 5 * i % (picture.height - side)
        parts.append(picture.crop((left, top, left + side, top + side)))
    return parts


def encoded(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    """Return the bytes of a file that holds the image."""
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def huge_png(side: int = 14_000) -> bytes:
    """Return a valid grey PNG of 196 megapixels in about 24 kB, one bit a pixel."""
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    return _png(struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), pixels)


def deep_png(levels_HW3: npt.NDArray[np.uint16]) -> bytes:
    """Return an RGB PNG of 16 bits a colour, which Pillow does not write; big-endian."""
    height, width, _ = levels_HW3.shape
    rows = b"".join(b"\0" + row.tobytes() for row in levels_HW3)
    return _png(struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0), zlib.compress(rows))


def _png(header: bytes, pixels: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
