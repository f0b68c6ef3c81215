"""Single pictures as files, and the texts that stand beside them; `figures.py` makes grids."""

import io
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from ecdit_ds.files.durable import make_folders, replace_durably


def to_uint8(images_B3HW: Tensor) -> np.ndarray:
    """Return (B, H, W, 3) uint8 of images in [-1, 1]."""
    pixels = ((images_B3HW.float().clamp(-1, 1) + 1) * 127.5).round()
    return rearrange(pixels, "b c h w -> b h w c").byte().cpu().numpy()


def save_png(image_HWC: np.ndarray, path: Path) -> None:
    """Write one picture as it is, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="png")
    save_bytes(buffer.getvalue(), path)


def save_text(text: str, path: Path) -> None:
    """Write a text, such as a page or numbers, whole or not at all."""
    save_bytes(text.encode("utf-8"), path)


def name_for_file(prompt: str) -> str:
    """Return the ASCII words of a prompt, joined by underscores, at most 60 characters; a path never."""
    words = "".join(c if c.isascii() and c.isalnum() else "_" for c in prompt.lower())
    return "_".join(filter(None, words.split("_")))[:60]


def save_bytes(data: bytes, path: Path) -> None:
    """Write a file, whole or not at all, into a folder that may not exist yet."""
    make_folders(path.parent)
    replace_durably(path, data)
