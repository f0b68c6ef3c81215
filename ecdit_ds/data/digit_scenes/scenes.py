"""Digit scenes: the embedded data set, real handwritten digits on a small canvas with captions known to be true.

A scene holds one to four digits of scikit-learn's UCI set (part of that library, nothing is downloaded), each in its
own cell and colour, and a caption in one of GenEval's six kinds (arXiv 2310.11513). Scene `i` is a pure function of
`(seed, split, i)`. The two splits share neither a digit image nor a caption.

Suffixes: H, W canvas or digit pixels; C colour channels; N digit images.
"""

import functools
import itertools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ecdit_ds.errors import DataError
from ecdit_ds.seeding import sample_rng, stable_seed

Split = Literal["train", "heldout"]
Kind = Literal["single", "two", "counting", "colour", "position", "attribution"]
Relation = Literal["to the left of", "to the right of", "above", "below"]

KINDS: tuple[Kind, ...] = get_args(Kind)
_KIND_DRAWS: tuple[Kind, ...] = (*KINDS, "position", "position", "position")
"""What a scene's kind is drawn from. Which side an object is on is the hardest word of a caption to learn."""
RELATIONS: tuple[Relation, ...] = get_args(Relation)
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PALETTE: Mapping[str, tuple[int, int, int]] = types.MappingProxyType(
    {
        "red": (255, 32, 32),
        "green": (32, 224, 32),
        "blue": (48, 64, 255),
        "yellow": (255, 224, 0),
        "cyan": (0, 224, 255),
        "white": (255, 255, 255),
    }
)
"""RGB of full ink; paler ink is the same colour, darker."""
DIGIT_PIXELS = 8
"""Side of a digit image at scale 1."""
MIN_CANVAS_PIXELS = 2 * DIGIT_PIXELS
"""Four digits, and every relation, need two rows and two columns of cells."""


_COUNTS = (2, 3, 4)
_EXAMPLES = ("a seven", "an eight and a two", "two red sevens", "a red seven", "a red seven above a blue two")
_MIRRORED: Mapping[str | None, Relation] = types.MappingProxyType(
    {
        "to the right of": "to the left of",
        "below": "above",
    }
)
"""Relations that say, of things named the other way round, what another relation says."""


@dataclass(frozen=True, kw_only=True)
class SceneSpec:
    """What a caption says: its digits in order, their colours where it names them, and a relation where it has one."""

    kind: Kind
    digits: tuple[int, ...]
    colours: tuple[str | None, ...]
    relation: Relation | None = None

    @property
    def caption(self) -> str:
        """The words; `parse_caption` reads them back."""
        if self.kind == "counting":
            colour = f"{self.colours[0]} " if self.colours[0] else ""
            return f"{DIGIT_NAMES[len(self.digits)]} {colour}{plural(self.digits[0])}"
        things = [_thing(digit, colour) for digit, colour in zip(self.digits, self.colours, strict=True)]
        return f" {self.relation or 'and'} ".join(things)

    @property
    def meaning(self) -> tuple[str | None, ...]:
        """Kind, relation and things, alike for all captions that say the same, whichever thing they name first."""
        things = [f"{colour or 'any'} {digit}" for digit, colour in zip(self.digits, self.colours, strict=True)]
        if self.relation is None:
            things.sort()
        elif self.relation in _MIRRORED:
            things.reverse()
        return (self.kind, _MIRRORED.get(self.relation, self.relation), *things)


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One digit of a scene. Cells count from the top left; all objects of a scene have the same scale."""

    digit: int
    colour: str
    row: int
    column: int
    scale: int
    """Canvas pixels per pixel of the digit image."""
    glyph: int
    """Which image of the UCI set, as scikit-learn numbers them."""

    @property
    def box(self) -> tuple[slice, slice]:
        """The canvas pixels of its cell, as (rows, columns)."""
        side = DIGIT_PIXELS * self.scale
        top, left = self.row * side, self.column * side
        return slice(top, top + side), slice(left, left + side)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An image, its caption, and the truth behind both; objects stand in the order the caption names them."""

    image_HWC: npt.NDArray[np.uint8]
    claim: SceneSpec
    objects: tuple[SceneObject, ...]

    @property
    def caption(self) -> str:
        """What the claim says, in words."""
        return self.claim.caption

    @property
    def kind(self) -> Kind:
        """Which of GenEval's kinds the caption is of."""
        return self.claim.kind


@dataclass(frozen=True, kw_only=True)
class DigitImages:
    """The handwritten digits of one split."""

    ink_NHW: npt.NDArray[np.float32]
    """In [0, 1], 8 x 8."""
    digit_N: npt.NDArray[np.int64]
    glyph_N: npt.NDArray[np.int64]
    """Their numbers in scikit-learn's set."""


def check_canvas(height: int, width: int) -> None:
    """Check that a canvas of so many pixels holds two rows and two columns of digits.

    Raises:
        DataError: it is smaller.
    """
    if min(height, width) < MIN_CANVAS_PIXELS:
        raise DataError(
            f"digit_scenes: a canvas of {height} x {width} pixels is smaller than {MIN_CANVAS_PIXELS} x "
            f"{MIN_CANVAS_PIXELS}, which four digits need; raise model.latent_height and model.latent_width"
        )


def draw_scene(*, seed: int, split: Split, index: int, canvas_height: int, canvas_width: int) -> Scene:
    """Draw scene `index` of a split, a pure function of its arguments.

    Args:
        seed: of the corpus.
        split: held-out scenes have digit images and captions that training scenes never have.
        index: from 0, without end.
        canvas_height: pixels, 16 or more.
        canvas_width: pixels, 16 or more.

    Returns:
        A scene on a black canvas; larger canvases also hold larger digits.

    Raises:
        DataError: the canvas cannot hold two rows and two columns of digits.
    """
    check_canvas(canvas_height, canvas_width)
    rng = sample_rng(seed, index, f"digit scene {split}")
    claim = _draw_claim(_KIND_DRAWS[_pick(rng, len(_KIND_DRAWS))], split, rng)
    scale = 1 + _pick(rng, min(canvas_height, canvas_width) // MIN_CANVAS_PIXELS)
    cells = _draw_cells(claim, canvas_height // (DIGIT_PIXELS * scale), canvas_width // (DIGIT_PIXELS * scale), rng)
    objects = tuple(
        SceneObject(
            digit=digit,
            colour=colour or _draw_colour(rng),
            row=row,
            column=column,
            scale=scale,
            glyph=_draw_glyph(split, digit, rng),
        )
        for digit, colour, (row, column) in zip(claim.digits, claim.colours, cells, strict=True)
    )
    image_HWC = _render(objects, canvas_height, canvas_width)
    return Scene(image_HWC=image_HWC, claim=claim, objects=objects)


@functools.cache
def digit_images(split: Split) -> DigitImages:
    """Return the digit images that scenes of `split` are drawn from; about a fifth of all are held out."""
    ink_NHW, digit_N = _uci_digits()
    held_out_N = np.array([stable_seed("digit_scenes image", glyph) % 5 == 0 for glyph in range(len(digit_N))])
    glyph_N = np.flatnonzero(held_out_N == (split == "heldout"))
    return DigitImages(ink_NHW=ink_NHW[glyph_N], digit_N=digit_N[glyph_N], glyph_N=glyph_N)


@functools.cache
def possible_claims(kind: Kind) -> tuple[SceneSpec, ...]:
    """Return everything that captions of a kind can say, in both splits, each once."""
    pairs, palette = tuple(itertools.permutations(range(10), 2)), tuple(PALETTE)
    any_colours = ((None, None), *itertools.product(palette, repeat=2))
    match kind:
        case "single":
            return tuple(SceneSpec(kind=kind, digits=(digit,), colours=(None,)) for digit in range(10))
        case "colour":
            said = itertools.product(range(10), palette)
            return tuple(SceneSpec(kind=kind, digits=(digit,), colours=(colour,)) for digit, colour in said)
        case "counting":
            counted = itertools.product(_COUNTS, (None, *palette), range(10))
            return tuple(
                SceneSpec(kind=kind, digits=(digit,) * n, colours=(colour,) * n) for n, colour, digit in counted
            )
        case "two":
            return tuple(SceneSpec(kind=kind, digits=pair, colours=(None, None)) for pair in pairs)
        case "position":
            related = itertools.product(pairs, any_colours, RELATIONS)
            return tuple(SceneSpec(kind=kind, digits=pair, colours=two, relation=side) for pair, two, side in related)
        case "attribution":
            coloured = itertools.product(pairs, itertools.permutations(palette, 2))
            return tuple(SceneSpec(kind=kind, digits=pair, colours=two) for pair, two in coloured)


def parse_caption(caption: str) -> SceneSpec:
    """Return what a caption says: the inverse of `SceneSpec.caption`, for every caption that a scene can have.

    Raises:
        DataError: no scene has such a caption; the message names the first unknown word, or shows the forms there are.
    """
    claim = _claims_by_caption().get(caption)
    if claim is not None:
        return claim
    known = {word for said in _claims_by_caption() for word in said.split()}
    unknown = [word for word in caption.split() if word not in known]
    where = f"the word {unknown[0]!r} is not known" if unknown else "no scene says this"
    raise DataError(f"digit_scenes: caption {caption!r}: {where}; captions read like {', '.join(map(repr, _EXAMPLES))}")


@functools.cache
def _claims_by_caption() -> Mapping[str, SceneSpec]:
    return types.MappingProxyType({claim.caption: claim for kind in KINDS for claim in possible_claims(kind)})


@functools.cache
def _uci_digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # takes a second, and a set that is encoded already needs none

    uci = load_digits()
    return (uci.images / 16.0).astype(np.float32), uci.target.astype(np.int64)


def _pick(rng: np.random.Generator, count: int) -> int:
    return int(rng.integers(count))


def _draw_colour(rng: np.random.Generator) -> str:
    return tuple(PALETTE)[_pick(rng, len(PALETTE))]


def _draw_glyph(split: Split, digit: int, rng: np.random.Generator) -> int:
    candidates = _glyphs_by_digit(split)[digit]
    return int(candidates[_pick(rng, len(candidates))])


@functools.cache
def _glyphs_by_digit(split: Split) -> tuple[npt.NDArray[np.int64], ...]:
    images = digit_images(split)
    return tuple(images.glyph_N[images.digit_N == digit] for digit in range(10))


def _draw_claim(kind: Kind, split: Split, rng: np.random.Generator) -> SceneSpec:
    """Draw what the caption says, by rejection, so that every claim of a kind and split is equally likely."""
    while True:
        claim = _propose_claim(kind, rng)
        if is_held_out(claim) == (split == "heldout"):
            return claim


def _propose_claim(kind: Kind, rng: np.random.Generator) -> SceneSpec:
    first = _pick(rng, 10)
    second = (first + 1 + _pick(rng, 9)) % 10  # of two named digits no caption names the same twice
    match kind:
        case "single":
            return SceneSpec(kind=kind, digits=(first,), colours=(None,))
        case "colour":
            return SceneSpec(kind=kind, digits=(first,), colours=(_draw_colour(rng),))
        case "counting":
            count, shared = _COUNTS[_pick(rng, len(_COUNTS))], _draw_colour(rng) if _pick(rng, 2) else None
            return SceneSpec(kind=kind, digits=(first,) * count, colours=(shared,) * count)
        case "two":
            return SceneSpec(kind=kind, digits=(first, second), colours=(None, None))
        case "position":
            relation = RELATIONS[_pick(rng, len(RELATIONS))]
            colours = (_draw_colour(rng), _draw_colour(rng)) if _pick(rng, 2) else (None, None)
            return SceneSpec(kind=kind, digits=(first, second), colours=colours, relation=relation)
        case "attribution":
            names, colour = tuple(PALETTE), _pick(rng, len(PALETTE))
            other = (colour + 1 + _pick(rng, len(names) - 1)) % len(names)
            return SceneSpec(kind=kind, digits=(first, second), colours=(names[colour], names[other]))


def is_held_out(claim: SceneSpec) -> bool:
    """Whether a caption belongs to the held-out split: about one in eight, alike for all ways to say the same thing."""
    return stable_seed("digit_scenes caption 1", *claim.meaning) % 8 == 0


def plural(digit: int) -> str:
    """Return the word for several of a digit."""
    return f"{DIGIT_NAMES[digit]}es" if digit == 6 else f"{DIGIT_NAMES[digit]}s"


def _thing(digit: int, colour: str | None) -> str:
    words = f"{colour} {DIGIT_NAMES[digit]}" if colour else DIGIT_NAMES[digit]
    # Of all digits and colours only "eight" begins with a vowel sound ("one" does not).
    return f"an {words}" if words == "eight" else f"a {words}"


def _draw_cells(claim: SceneSpec, rows: int, columns: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw a distinct (row, column) for each digit, such that a relation holds and is the only one that does."""
    if claim.relation is None:
        chosen = rng.permutation(rows * columns)[: len(claim.digits)].tolist()
        return [divmod(cell, columns) for cell in chosen]
    is_across = claim.relation in ("to the left of", "to the right of")
    line = _pick(rng, rows if is_across else columns)
    places = sorted(rng.permutation(columns if is_across else rows)[:2].tolist())
    if claim.relation in ("to the right of", "below"):
        places.reverse()
    return [(line, place) if is_across else (place, line) for place in places]


@functools.cache
def upsampling_matrix(scale: int) -> npt.NDArray[np.float32]:
    """Return the (8 * scale, 8) matrix of linear interpolation between pixel centres; the identity for scale 1."""
    centres = (np.arange(DIGIT_PIXELS * scale) + 0.5) / scale - 0.5
    distances = np.abs(np.clip(centres, 0, DIGIT_PIXELS - 1)[:, None] - np.arange(DIGIT_PIXELS))
    return np.maximum(0.0, 1.0 - distances).astype(np.float32)


def _render(objects: tuple[SceneObject, ...], canvas_height: int, canvas_width: int) -> npt.NDArray[np.uint8]:
    uci_ink_NHW, _ = _uci_digits()
    image_HWC = np.zeros((canvas_height, canvas_width, 3), dtype=np.uint8)
    for thing in objects:
        enlarge = upsampling_matrix(thing.scale)
        ink_HW = enlarge @ uci_ink_NHW[thing.glyph] @ enlarge.T
        rgb_C = np.array(PALETTE[thing.colour], dtype=np.float32)
        image_HWC[thing.box] = np.rint(ink_HW[:, :, None] * rgb_C)
    return image_HWC
