"""Image files of every kind become RGB pictures of a size, and what is none is named by its cause."""

import ast
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sklearn.datasets
import torch
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from ecdit_ds.data.sources.bad_sample import BadSample
from ecdit_ds.data.sources.images import buckets_of, decode_image, fit_image, nearest_bucket, read_image, to_tensor
from tests.helpers.colour_profiles import (
    ADOBE_CURVE,
    ADOBE_RGB,
    ADOBE_TO_SRGB,
    DISPLAY_P3,
    P3_TO_SRGB,
    SRGB,
    SRGB_CURVE,
    in_srgb,
    ink_profile,
    linear_grey_profile,
    rgb_profile,
)
from tests.helpers.photographs import deep_png, encoded, huge_png, photographs

Refusal = Callable[[Callable[[], object]], str]
P3 = rgb_profile()
PAGE = b"\n <!DOCTYPE html><html><body>404 Not Found</body></html>"


def decoded(content: bytes) -> Image.Image:
    """Return an image that must be good."""
    image = decode_image(content, "name")
    assert isinstance(image, Image.Image), image
    assert image.mode == "RGB"
    return image


def pixels(image: Image.Image) -> npt.NDArray[np.int64]:
    """Return (H, W, 3)."""
    return np.asarray(image).astype(np.int64)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """Return a temple."""
    return photographs()[0]


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda content: b"", "empty image file"),
        (lambda content: PAGE, "web page instead of an image"),
        (lambda content: b"\xef\xbb\xbf<html>", "web page instead of an image"),
        (lambda content: b"MZ\x90 a program", "not an image"),
        (lambda content: content[: len(content) // 2], "truncated image"),
        (lambda content: content[:6], "truncated image"),
        (lambda content: huge_png(), "too many pixels"),
        (lambda content: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_a_file_that_is_no_whole_image_is_named_by_its_cause(
    photograph: Image.Image, damage: Callable[[bytes], bytes], cause: str
) -> None:
    bad = decode_image(damage(encoded(photograph)), "a/b.jpg")
    assert bad == BadSample(cause=cause, name="a/b.jpg")  # type: ignore[arg-type]


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_of_any_format_is_bad(photograph: Image.Image, file_format: str) -> None:
    content = encoded(photograph, file_format)
    bad = decode_image(content[: len(content) * 2 // 3], "cut")
    assert isinstance(bad, BadSample)
    assert bad.cause in ("truncated image", "damaged image", "not an image")


def test_a_png_that_claims_196_megapixels_takes_no_memory() -> None:
    content = huge_png()
    assert len(content) < 30_000
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(decode_image(content, "bomb"), BadSample)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_limit_of_pixels_counts_the_whole_image(photograph: Image.Image) -> None:
    count = photograph.width * photograph.height
    assert isinstance(decode_image(encoded(photograph), "x", max_pixels=count), Image.Image)
    assert decode_image(encoded(photograph), "x", max_pixels=count - 1) == BadSample(cause="too many pixels", name="x")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_camera_was_held(photograph: Image.Image, orientation: int) -> None:
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    turned = photograph
    for step in stored:
        turned = turned.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(decoded(encoded(turned, "PNG", exif=exif))), pixels(photograph))


def test_cmyk_palette_and_grey_pictures_look_as_they_did(photograph: Image.Image) -> None:
    grey = photograph.convert("L")
    assert np.array_equal(pixels(decoded(encoded(grey, "PNG"))), pixels(grey.convert("RGB")))
    palette = photograph.quantize(64)
    assert np.array_equal(pixels(decoded(encoded(palette, "PNG"))), pixels(palette.convert("RGB")))
    cmyk = pixels(decoded(encoded(photograph.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(cmyk - pixels(photograph)).mean() < 4


def test_sixteen_bits_become_eight_by_scaling() -> None:
    deep = np.array([[0, 257, 128 * 257, 65535, 128, 129, 200 * 257 + 129, 200 * 257 - 128]], dtype=np.uint16)
    for file_format in ("PNG", "TIFF"):
        shown = pixels(decoded(encoded(Image.fromarray(deep), file_format)))
        assert shown[0, :, 0].tolist() == [0, 1, 128, 255, 0, 1, 201, 200]


def test_transparent_parts_are_white() -> None:
    layer = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    layer.putpixel((1, 0), (200, 0, 0, 0))
    layer.putpixel((2, 0), (0, 0, 0, 51))
    assert pixels(decoded(encoded(layer, "PNG"))).tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert pixels(decoded(encoded(grey, "PNG"))).tolist() == [[[255, 255, 255]]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    assert pixels(decoded(encoded(palette, "PNG", transparency=0))).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("primaries", "curve", "matrix"), [(DISPLAY_P3, SRGB_CURVE, P3_TO_SRGB), (ADOBE_RGB, ADOBE_CURVE, ADOBE_TO_SRGB)]
)
def test_a_picture_with_a_colour_profile_becomes_srgb(
    photograph: Image.Image, file_format: str, primaries: Any, curve: Any, matrix: Any
) -> None:
    profile = rgb_profile(primaries, curve)
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = decoded(encoded(photograph, file_format, icc_profile=profile, **options))
    assert image.info["converted"] == ["colour profile"]
    truth = in_srgb(np.asarray(photograph), matrix, curve)
    assert np.abs(pixels(image) - truth).max() <= 1  # the transform's tables and rounding
    assert np.abs(pixels(photograph) - truth).mean() > 1, "as they stand, its numbers are others"


def test_a_jpeg_with_a_colour_profile_becomes_srgb_before_it_is_turned_or_not(photograph: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    plain = decoded(encoded(photograph, exif=exif))
    image = decoded(encoded(photograph, exif=exif, icc_profile=P3))
    assert image.info["converted"] == ["turned", "colour profile"]
    assert np.abs(pixels(image) - in_srgb(np.asarray(plain), P3_TO_SRGB, SRGB_CURVE)).max() <= 1


def test_a_profile_of_srgb_changes_no_byte(photograph: Image.Image) -> None:
    with Image.open(Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg") as flower:
        of_cameras = flower.info["icc_profile"]
    of_pillow = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (of_cameras, of_pillow, rgb_profile(SRGB, SRGB_CURVE)):
        image = decoded(encoded(photograph, "PNG", icc_profile=profile))
        assert np.array_equal(pixels(image), pixels(photograph)) and image.info["converted"] == []
        grey = decoded(encoded(photograph.convert("L"), "PNG", icc_profile=profile))
        assert np.array_equal(pixels(grey), pixels(photograph.convert("L").convert("RGB")))
        assert grey.info["converted"] == ["grey"], "a grey picture may have a profile of three colours"


def test_palettes_greys_and_alpha_follow_their_profile_too() -> None:
    colour = (200, 40, 90)
    wanted = in_srgb(np.array([[colour]], dtype=np.uint8), P3_TO_SRGB, SRGB_CURVE)
    layer = Image.new("RGBA", (2, 1), (*colour, 255))
    layer.putpixel((1, 0), (*colour, 0))
    shown = decoded(encoded(layer, "PNG", icc_profile=P3))
    assert np.abs(pixels(shown)[:, :1] - wanted).max() <= 1
    assert pixels(shown)[0, 1].tolist() == [255, 255, 255], "white on which it lies is of sRGB"
    assert shown.info["converted"] == ["alpha", "colour profile"]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette(colour)
    assert np.abs(pixels(decoded(encoded(palette, "PNG", icc_profile=P3))) - wanted).max() <= 1
    # Half of the light is 188 of 255 in sRGB.
    for mode, value in (("L", 128), ("LA", (128, 255))):
        grey = decoded(encoded(Image.new(mode, (1, 1), value), "PNG", icc_profile=linear_grey_profile()))
        assert pixels(grey).tolist() == [[[188, 188, 188]]]
        assert grey.info["converted"][-1] == "colour profile"
    deep = Image.fromarray(np.array([[128 * 257]], dtype=np.uint16))
    assert pixels(decoded(encoded(deep, "PNG", icc_profile=linear_grey_profile()))).tolist() == [[[188, 188, 188]]]


def test_inks_follow_their_profile() -> None:
    inks = Image.new("CMYK", (16, 8), (0, 0, 0, 0))
    inks.paste((255, 0, 0, 0), (8, 0, 16, 8))
    image = decoded(encoded(inks, "TIFF", icc_profile=ink_profile()))
    assert image.info["converted"] == ["CMYK", "colour profile"]
    # L* of 50 is 119 of 255; without the profile, cyan is (0, 255, 255).
    assert np.abs(pixels(image)[0, [0, 15]] - [[255] * 3, [119] * 3]).max() <= 2


@pytest.mark.parametrize("profile", [b"no profile", P3[:200], ink_profile(), linear_grey_profile()])
def test_a_profile_that_is_broken_or_of_other_colours_is_told_and_not_followed(
    photograph: Image.Image, profile: bytes
) -> None:
    image = decoded(encoded(photograph, "PNG", icc_profile=profile))
    assert image.info["converted"] == ["colour profile ignored"]
    assert np.array_equal(pixels(image), pixels(photograph))


def test_a_jpeg_that_lost_a_part_of_its_profile_is_told(photograph: Image.Image) -> None:
    content = encoded(photograph, icc_profile=P3)
    image = decoded(content.replace(b"ICC_PROFILE\0\x01\x01", b"ICC_PROFILE\0\x01\x02"))
    assert image.info["converted"] == ["colour profile ignored"]


def test_a_png_whose_notes_on_colours_are_not_followed_is_told(photograph: Image.Image) -> None:
    for gamma, told in ((100_000, ["gAMA or cHRM ignored"]), (45_455, [])):
        notes = PngImagePlugin.PngInfo()
        notes.add(b"gAMA", struct.pack(">I", gamma))
        image = decoded(encoded(photograph, "PNG", pnginfo=notes))
        assert image.info["converted"] == told
        assert np.array_equal(pixels(image), pixels(photograph))
        notes.add(b"sRGB", b"\0")  # which stands above the others
        assert decoded(encoded(photograph, "PNG", pnginfo=notes)).info["converted"] == []
    primaries = PngImagePlugin.PngInfo()
    primaries.add(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
    assert decoded(encoded(photograph, "PNG", pnginfo=primaries)).info["converted"] == ["gAMA or cHRM ignored"]


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("name", ["gamma", "chromaticity", "srgb", "icc_profile", "transparency", "interlace"])
def test_remarks_of_a_png_are_not_taken_for_facts(photograph: Image.Image, mode: str, name: str) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add(b"gAMA", struct.pack(">I", 100_000))
    if name != "gamma":  # which Pillow has overwritten
        told = decoded(encoded(photograph.convert(mode), "PNG", pnginfo=notes)).info["converted"]
        assert told[-1] == "gAMA or cHRM ignored"
    plain = decoded(encoded(photograph.convert(mode), "PNG"))
    for is_after in (False, True):
        notes.add_text(name, "0.45455")
        remarks = PngImagePlugin.PngInfo()
        remarks.add(b"tEXt", f"{name}\x000.45455".encode(), after_idat=is_after)
        image = decoded(encoded(photograph.convert(mode), "PNG", pnginfo=remarks))
        assert image.info == plain.info and np.array_equal(pixels(image), pixels(plain))
    if name != "gamma":
        assert decoded(encoded(photograph.convert(mode), "PNG", pnginfo=notes)).info["converted"] == told


def test_a_profile_of_rgb_is_not_followed_for_a_picture_in_lab(photograph: Image.Image) -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(photograph.crop((0, 0, 64, 64)), to_lab)
    assert lab is not None
    lab.info.clear()
    plain, shown = decoded(encoded(lab, "TIFF")), decoded(encoded(lab, "TIFF", icc_profile=P3))
    assert np.array_equal(pixels(shown), pixels(plain))
    assert plain.info["converted"] == [] and shown.info["converted"] == ["colour profile ignored"]


def test_sixteen_bits_a_colour_are_told() -> None:
    levels = np.array([[[0, 257, 65535]]], dtype=">u2")
    image = decoded(deep_png(levels))
    assert image.info["converted"] == ["16 bits"]
    assert pixels(image).tolist() == [[[0, 1, 255]]]


def test_a_file_is_read_as_samples_are(photograph: Image.Image, tmp_path: Path, refusal_of: Refusal) -> None:
    (tmp_path / "a.png").write_bytes(encoded(photograph.convert("RGBA"), "PNG", icc_profile=P3))
    truth = in_srgb(np.asarray(photograph), P3_TO_SRGB, SRGB_CURVE)
    assert np.abs(pixels(read_image(tmp_path / "a.png")) - truth).max() <= 1
    (tmp_path / "b.png").write_bytes(PAGE)
    assert "b.png: is no picture that can be read (web page" in refusal_of(lambda: read_image(tmp_path / "b.png"))
    assert "(No such file or directory)" in refusal_of(lambda: read_image(tmp_path / "c.png"))


def test_a_picture_is_cut_at_its_middle() -> None:
    bars = np.zeros((10, 30, 3), dtype=np.uint8)
    bars[:, 10:20] = 255
    assert pixels(fit_image(Image.fromarray(bars), (10, 10))).min() == 255
    assert fit_image(Image.fromarray(bars), (8, 16)).size == (16, 8)


def lanczos_weights(inputs: int, outputs: int) -> npt.NDArray[np.float64]:
    """Return what each of `outputs` pixels takes of `inputs`: Lanczos of three lobes, wider where pixels get fewer."""
    scale = max(1.0, inputs / outputs)
    centres = (np.arange(outputs) + 0.5) * inputs / outputs
    t = (np.arange(inputs)[None] + 0.5 - centres[:, None]) / scale
    weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0.0)
    normalized: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalized


@pytest.mark.parametrize("size", [(16, 24), (10, 15), (32, 48), (40, 60)])
def test_pixels_are_resampled_by_lanczos(size: tuple[int, int]) -> None:
    noise_HW3 = np.random.default_rng(0).integers(60, 196, size=(32, 48, 3)).astype(np.uint8)
    rows, columns = lanczos_weights(32, size[0]), lanczos_weights(48, size[1])
    exact = np.einsum("yh,hwc,xw->yxc", rows, noise_HW3, columns).clip(0, 255)
    assert np.abs(pixels(fit_image(Image.fromarray(noise_HW3), size)) - exact).max() <= 1.5  # rounded twice


def test_pixels_span_minus_one_to_one() -> None:
    images = to_tensor([Image.new("RGB", (4, 2), (0, 255, 51))])
    assert images.shape == (1, 3, 2, 4)
    assert images[0, :, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])
    assert images.dtype == torch.float32


def test_buckets_have_no_more_patches_than_the_square() -> None:
    for side, unit in ((256, 16), (512, 16), (1024, 16), (96, 8)):
        buckets = buckets_of(side * side, unit // 8, 8)
        assert (side, side) in buckets
        assert all(height % unit == 0 and width % unit == 0 for height, width in buckets)
        assert all(0.7 * side * side <= height * width <= side * side for height, width in buckets)
        assert {(width, height) for height, width in buckets} == set(buckets)


def test_buckets_by_hand() -> None:
    # 16 x 16 patches of 16 pixels; at 1:2 the short side is round(11.3) = 11, the long one 256 // 11 = 23
    assert buckets_of(256 * 256, 2, 8, (0.5, 1.0)) == ((368, 176), (256, 256))


def test_a_picture_goes_to_the_bucket_of_the_nearest_proportions() -> None:
    buckets = ((400, 200), (256, 256), (200, 400))
    assert nearest_bucket((1000, 1000), buckets) == 1
    assert nearest_bucket((300, 1000), buckets) == 2
    # Half way by the logarithm is the root of two, not one and a half.
    assert nearest_bucket((100, 141), buckets) == 1
    assert nearest_bucket((100, 142), buckets) == 2


ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize("name", ["picture.png", "picture.eps"])
def test_postscript_starts_no_program_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    """Pillow hands EPS to Ghostscript; here a Ghostscript that would leave a mark is the first on the path."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    path = tmp_path / name
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    program = (
        "import sys; from pathlib import Path; from ecdit_ds.data.sources.images import read_image\n"
        "from ecdit_ds.errors import DataError\n"
        "try: read_image(Path(sys.argv[1]))\nexcept DataError as error: print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert name in told.stdout and "not an image" in told.stdout
    assert not (tmp_path / "ran").exists()


def test_pictures_are_opened_in_one_place_and_by_readers_that_are_named() -> None:
    calls = [
        (str(path.relative_to(ROOT)), call)
        for folder in ("ecdit_ds", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("Image.open", "PIL.Image.open")
    ]
    assert {name for name, _ in calls} == {"ecdit_ds/data/sources/images.py"}
    assert all("formats" in {keyword.arg for keyword in call.keywords} for _, call in calls)


def tiled_tiff(tile_width: int, tile_length: int) -> bytes:
    """Return a TIFF of 16 x 16 pixels that says how large its only tile is."""
    data = zlib.compress(bytes(16 * 16 * 3))
    facts = {
        TiffImagePlugin.IMAGEWIDTH: 16,
        TiffImagePlugin.IMAGELENGTH: 16,
        TiffImagePlugin.BITSPERSAMPLE: 8,
        TiffImagePlugin.COMPRESSION: 8,
        TiffImagePlugin.PHOTOMETRIC_INTERPRETATION: 2,
        TiffImagePlugin.SAMPLESPERPIXEL: 3,
        TiffImagePlugin.PLANAR_CONFIGURATION: 1,
        TiffImagePlugin.TILEWIDTH: tile_width,
        TiffImagePlugin.TILELENGTH: tile_length,
        TiffImagePlugin.TILEOFFSETS: 0,
        TiffImagePlugin.TILEBYTECOUNTS: len(data),
    }
    end = 8 + 2 + 12 * len(facts) + 4
    entries = [
        struct.pack("<HHII", tag, 4, 1, end if tag == TiffImagePlugin.TILEOFFSETS else value)
        for tag, value in sorted(facts.items())
    ]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0) + data


def test_a_tiff_whose_tiles_claim_more_than_an_image_may_have_takes_no_memory() -> None:
    assert isinstance(decode_image(tiled_tiff(16, 16), "small"), Image.Image)
    assert isinstance(decode_image(tiled_tiff(1024, 64), "padded"), Image.Image | BadSample)
    bad = decode_image(tiled_tiff(16384, 16384), "large")
    assert bad == BadSample(cause="too many pixels", name="large")
