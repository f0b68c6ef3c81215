"""Figures of matplotlib as files: captioned grids of pictures, and whatever else is drawn."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ecdit_ds.errors import escape_unprintable
from ecdit_ds.inference.images import save_bytes

_INCHES_PER_PICTURE = 1.6
_CAPTION_WIDTH = 22


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
        axis.set_title(
            "\n".join(textwrap.wrap(escape_unprintable(caption), _CAPTION_WIDTH)), fontsize=8, parse_math=False
        )
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    save_bytes(buffer.getvalue(), path)
