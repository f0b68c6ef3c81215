"""Pictures of a user's own that are no digit scenes: a dark shape on a bright ground, with a caption each."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tools import encode_data

SIDE = 16
GROUNDS = {"white": (250, 250, 245), "yellow": (255, 235, 150), "night": (10, 10, 60)}


def write_pictures(folder: Path, count: int, *, grounds: tuple[str, ...] = ("white", "yellow"), seed: int = 0) -> Path:
    """Write `count` pictures with captions such as "a square on white", and return the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        ground, left, top = grounds[i % len(grounds)], int(rng.integers(8)), int(rng.integers(8))
        image = Image.new("RGB", (SIDE, SIDE), GROUNDS[ground])
        ImageDraw.Draw(image).rectangle((left, top, left + 7, top + 7), fill=(200, 30 + i, 40))
        image.save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a square on {ground}")
    return folder


def encode(source: Path, destination: Path, *flags: object) -> Path:
    """Encode them by tools/encode_data.py, in fp32 unless flags say otherwise, and return the set's folder."""
    arguments = ["encode", source, destination, "--size", SIDE, "--patch", 4, "--text-tokens", 12, "--dtype", "fp32"]
    arguments += flags if "--text" in flags else ["--text-width", 24, *flags]
    assert encode_data.main([str(argument) for argument in arguments]) == 0
    return destination
