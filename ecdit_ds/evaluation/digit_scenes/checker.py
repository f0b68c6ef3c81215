"""Whether a picture shows what a caption says, by GenEval's rules (arXiv 2310.11513) for its six kinds.

A detector lists the digits of the picture (`digit_detector`), and the rules of the caption's kind decide. Objects that
the caption does not name do no harm; `is_exact` tells the pictures that show nothing else.

Suffixes: B pictures; H, W pixels; C colour channels.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ecdit_ds.data.digit_scenes.scenes import DIGIT_NAMES, Relation, SceneSpec, plural
from ecdit_ds.evaluation.digit_scenes.detector import FoundObject, find_objects

_POSITION_TOLERANCE = 0.1
_MIN_DIRECTION = 0.5
"""As in GenEval: so far, in sides of both objects, centres may be apart and count as level; and so much of the way from
one to the other must lead in a relation's direction. Both relations of a diagonal hold."""


@dataclass(frozen=True, kw_only=True)
class SceneVerdict:
    """Whether a picture shows what a caption says; plain data."""

    is_correct: bool
    is_exact: bool
    """Correct, and nothing else is to be seen."""
    reason: str
    found: tuple[FoundObject, ...]


def check_scene(image_HWC: npt.NDArray[np.uint8], claim: SceneSpec) -> SceneVerdict:
    """Return whether one picture shows what a claim says; `check_scenes` is faster for many."""
    return check_scenes(image_HWC[None], [claim])[0]


def check_scenes(images_BHWC: npt.NDArray[np.uint8], claims: Sequence[SceneSpec]) -> list[SceneVerdict]:
    """Return whether pictures show what the claims say, one claim a picture.

    Raises:
        DataError: the pictures are not uint8 RGB of 16 x 16 pixels or more.
    """
    return [judge_scene(claim, found) for claim, found in zip(claims, find_objects(images_BHWC), strict=True)]


def judge_scene(claim: SceneSpec, found: tuple[FoundObject, ...]) -> SceneVerdict:
    """Apply GenEval's rules to what a picture was found to show.

    Counting: there are exactly so many of that digit (in that colour, if the caption names one). Other kinds: among the
    objects there are some that fit the caption's things, each in its colour, and their relation if it names one.
    GenEval looks at the objects it is surest of only; here, where all are about as sure, any may serve.
    """
    if claim.kind == "counting":
        fitting = [thing for thing in found if _fits(thing, claim.digits[0], claim.colours[0])]
        is_correct = len(fitting) == len(claim.digits)
    else:
        is_correct = any(_shows(claim, chosen) for chosen in itertools.permutations(found, len(claim.digits)))
    where = claim.relation is not None
    return SceneVerdict(
        is_correct=is_correct,
        is_exact=is_correct and len(found) == len(claim.digits),
        reason=("" if is_correct else f"expected {claim.caption}, ") + f"found {_listing(found, where=where)}",
        found=found,
    )


def _fits(thing: FoundObject, digit: int, colour: str | None) -> bool:
    return thing.digit == digit and colour in (None, thing.colour)


def _shows(claim: SceneSpec, things: tuple[FoundObject, ...]) -> bool:
    if not all(map(_fits, things, claim.digits, claim.colours)):
        return False
    return claim.relation is None or claim.relation in scene_relations(*things)


def scene_relations(first: FoundObject, second: FoundObject) -> set[Relation]:
    """Return the relations of the first object to the second that hold; two on a diagonal, none in the same place."""
    tolerance = _POSITION_TOLERANCE * (first.side + second.side)
    across = (first.left + first.side / 2) - (second.left + second.side / 2)
    down = (first.top + first.side / 2) - (second.top + second.side / 2)
    least = tolerance + _MIN_DIRECTION * math.hypot(across, down)
    signed: tuple[tuple[Relation, float], ...] = (
        ("to the left of", -across),
        ("to the right of", across),
        ("above", -down),
        ("below", down),
    )
    return {relation for relation, distance in signed if distance > least}


def _listing(found: tuple[FoundObject, ...], *, where: bool) -> str:
    if where:
        things = [f"1 {o.colour} {DIGIT_NAMES[o.digit]} at row {o.top} column {o.left}" for o in found]
        return ", ".join(things) or "nothing"
    counts = Counter((thing.colour, thing.digit) for thing in found)
    named = [
        f"{count} {colour} {DIGIT_NAMES[digit] if count == 1 else plural(digit)}"
        for (colour, digit), count in counts.items()
    ]
    return ", ".join(named) or "nothing"
