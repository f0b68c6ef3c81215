"""ICC profiles, written byte by byte: what phones, cameras and printers put into pictures.

Numbers are the published ones: primaries adapted to D50, as profiles hold them, and curves.
"""

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Triple = tuple[float, float, float]
WHITE: Triple = (0.9642, 1.0, 0.8249)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
"""y = (a x + b)^g from d on, c x below; in the order g, a, b, c, d."""
ADOBE_CURVE = (563 / 256, 1.0, 0.0, 0.0, 0.0)
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
P3_TO_SRGB = ((1.22494, -0.22494, 0.0), (-0.04206, 1.04206, 0.0), (-0.01964, -0.07864, 1.09827))
"""Of linear light, as the standards of both (D65) give it."""
ADOBE_TO_SRGB = ((1.39836, -0.39836, 0.0), (0.0, 1.0, 0.0), (0.0, -0.04293, 1.04293))


def rgb_profile(primaries: Sequence[Triple] = DISPLAY_P3, curve: Sequence[float] = SRGB_CURVE) -> bytes:
    """Return a profile of three primaries (X, Y, Z of D50) and a curve."""
    points = {name: _xyz(point) for name, point in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"para" + struct.pack(">IHH5i", 0, 3, 0, *map(_fixed, curve)))
    return _profile(b"mntr", b"RGB ", b"XYZ ", points | curves)


def linear_grey_profile() -> bytes:
    """Return a profile of greys that are amounts of light."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": b"curv" + bytes(8)})


def ink_profile() -> bytes:
    """Return a profile of CMYK in which cyan alone is a grey of L* 50, and any other ink black."""
    corners = [(255, 128, 128) if inks == 0 else (128, 128, 128) if inks == 8 else (0, 128, 128) for inks in range(16)]
    identity = struct.pack(">9i", *(_fixed(float(i % 4 == 0)) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + bytes(range(256)) * 4
    table += bytes(level for corner in corners for level in corner) + bytes(range(256)) * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def in_srgb(
    pixels_HW3: npt.NDArray[np.uint8], matrix: Sequence[Triple], curve: Sequence[float]
) -> npt.NDArray[np.int64]:
    """Return what pixels of other primaries and another curve are in sRGB, by the closed form."""
    gamma, a, b, c, d = curve
    x = pixels_HW3 / 255
    light = np.where(x >= d, (a * x + b) ** gamma, c * x) @ np.array(matrix).T
    light = light.clip(0, 1)
    shown = np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)
    return np.rint(255 * shown).astype(np.int64)


def _fixed(number: float) -> int:
    return round(number * 65536)


def _xyz(point: Triple) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *map(_fixed, point))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"desc" + struct.pack(">II", 0, 5) + b"test\0" + bytes(79)
    tags = {b"desc": text, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": _xyz(WHITE)} | tags
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, kind, space, connection, b"acsp")
    head += struct.pack(">3i", *map(_fixed, WHITE))
    return head.ljust(128, b"\0") + table + body
