"""Arrow files that say that something lies elsewhere in memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def damage_places(path: Path, texts: Sequence[str], row: int) -> None:
    """Let an Arrow file say that one of its texts lies elsewhere in memory."""
    content, ends = bytearray(path.read_bytes()), np.cumsum([0, *map(len, texts)]).astype("<i4")
    begin = content.index(ends.tobytes())
    content[begin + 4 * row : begin + 4 * row + 4] = np.array([2**31 - 5], dtype="<i4").tobytes()
    path.write_bytes(content)
