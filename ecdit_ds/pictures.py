"""Pictures for people: captioned grids and single files, and what stands beside them."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ecdit_ds.durable import make_folders, replace_durably

_INCHES_PER_PICTURE = 1.6
_CAPTION_WIDTH = 22


def to_uint8(images_B3HW: Tensor) -> np.ndarray:
    """Return (B, H, W, 3) uint8 of images in [-1, 1]."""
    pixels = ((images_B3HW.float().clamp(-1, 1) + 1) * 127.5).round()
    return rearrange(pixels, "b c h w -> b h w c").byte().cpu().numpy()


def save_png(image_HWC: np.ndarray, path: Path) -> None:
    """Write one picture as it is, whole or not at all."""
    _write(path, _png(Image.fromarray(image_HWC)))


def save_grid(
    images_BHWC: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str], columns: int, path: Path
) -> None:
    """Write the pictures with their captions, `columns` a row."""
    rows = -(-len(captions) // columns)
    figure = Figure(figsize=(columns * _INCHES_PER_PICTURE, rows * _INCHES_PER_PICTURE * 1.35), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, caption in zip(axes.flat, images_BHWC, captions, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(caption, _CAPTION_WIDTH)), fontsize=8, parse_math=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    _write(path, buffer.getvalue())


def save_text(text: str, path: Path) -> None:
    """Write a text, such as a page or numbers, whole or not at all."""
    _write(path, text.encode("utf-8"))


def name_for_file(prompt: str) -> str:
    """Return the ASCII words of a prompt, joined by underscores, at most 60 characters; a path never."""
    words = "".join(c if c.isascii() and c.isalnum() else "_" for c in prompt.lower())
    return "_".join(filter(None, words.split("_")))[:60]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    make_folders(path.parent)
    replace_durably(path, data)
