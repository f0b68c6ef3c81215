"""GenEval: is what a prompt asks for in the picture? (Ghosh et al. 2310.11513.)

A detector finds objects; whether there are enough of each class, not too many, of the right colour and in the right
place is decided here, by the rules of the paper's published script, from detections alone: no model is in this file.

The rules: objects above a confidence, the surest `max_objects` a class. A requirement of `count` objects looks at the
`count` surest of its class only: each must have the colour, and the position to each of those it is placed against.
An exclusion fails where `count` or more are seen. All requirements must hold.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ecdit_ds.errors import EvaluationError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

_NEGLIGIBLE_PIXELS = 1e-3
_SIN_30_DEGREES = 0.5


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """So many objects of a class; for an exclusion, so many are too many."""

    class_name: str
    count: int
    colour: str | None = None
    """One of COLOURS."""
    position: tuple[str, int] | None = None
    """One of RELATIONS, and the index of the requirement, an earlier one, whose objects it is relative to."""


@dataclass(frozen=True, kw_only=True)
class GenevalPrompt:
    """A prompt and what a picture of it must show."""

    tag: str
    """One of TASKS."""
    prompt: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectedObject:
    """What a detector found."""

    class_name: str
    score: float
    """Confidence in [0, 1]."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    mask: np.ndarray | None = None
    """(H, W) bool of the whole picture, True on the object."""


@dataclass(frozen=True, kw_only=True)
class GenevalRules:
    """The published thresholds."""

    confidence: float = 0.3
    """Objects must be surer than this."""
    counting_confidence: float = 0.9
    """The same, in the counting task."""
    max_objects: int = 16
    """Most objects of one class."""
    max_overlap: float = 1.0
    """Largest overlap of two boxes of one class (intersection over union); above it the less certain object is
    dropped. At 1 none is."""
    position_threshold: float = 0.1
    """Share of both objects' sizes by which their centres may differ without being beside one another."""


PUBLISHED = GenevalRules()


@dataclass(frozen=True, kw_only=True)
class GenEvalVerdict:
    """Whether a picture shows what its prompt asks for."""

    is_correct: bool
    reason: str
    """What is wrong, one clause a requirement; empty where nothing is."""


NameColours = Callable[[Sequence[DetectedObject]], Sequence[str]]
"""Gives one of COLOURS for each object, all of one class."""


def judge_geneval(
    detections: Sequence[DetectedObject],
    colours_of: NameColours,
    prompt: GenevalPrompt,
    rules: GenevalRules = PUBLISHED,
) -> GenEvalVerdict:
    """Decide whether a picture shows what its prompt asks for.

    Args:
        detections: all objects of one picture, in any order and of any confidence.
        colours_of: asked only about objects that a colour is required of.
    """
    seen = objects_in_view(detections, prompt.tag, rules)
    faults: list[str] = []
    groups: list[list[DetectedObject] | None] = []
    for wanted in prompt.include:
        objects = seen.get(wanted.class_name, [])[: wanted.count]
        fault = _fault_of(objects, wanted, groups, colours_of, rules)
        faults += [fault] if fault else []
        groups.append(None if fault else objects)
    for unwanted in prompt.exclude:
        count = len(seen.get(unwanted.class_name, []))
        if count >= unwanted.count:
            faults.append(f"expected {unwanted.class_name}<{unwanted.count}, found {count}")
    return GenEvalVerdict(is_correct=not faults, reason="; ".join(faults))


def objects_in_view(
    detections: Sequence[DetectedObject], tag: str, rules: GenevalRules
) -> dict[str, list[DetectedObject]]:
    """Return by class the objects that count, the surest first."""
    confidence = rules.counting_confidence if tag == "counting" else rules.confidence
    by_class: dict[str, list[DetectedObject]] = {}
    for found in sorted(detections, key=lambda found: -found.score):
        if found.score > confidence:
            by_class.setdefault(found.class_name, []).append(found)
    return {name: _without_overlaps(found[: rules.max_objects], rules) for name, found in by_class.items()}


def relations_of(
    box: tuple[float, float, float, float], target: tuple[float, float, float, float], *, threshold: float
) -> tuple[str, ...]:
    """Return where a box is relative to another: none, one, or two of RELATIONS.

    From the distance of the centres along each axis `threshold` times both sizes is taken off. A relation holds where
    what remains along its axis is more than half of the whole distance: far away, within 60 degrees of the axis, so on
    a diagonal two hold at once.
    """
    distance = [(box[i] + box[i + 2] - target[i] - target[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(box[i + 2] - box[i]) + abs(target[i + 2] - target[i]) for i in (0, 1)]
    clear = [math.copysign(max(abs(d) - threshold * s, 0.0), d) for d, s in zip(distance, sizes, strict=True)]
    if all(abs(part) < _NEGLIGIBLE_PIXELS for part in clear):
        return ()
    dx, dy = (part / math.hypot(*distance) for part in clear)
    holds = (dx < -_SIN_30_DEGREES, dx > _SIN_30_DEGREES, dy < -_SIN_30_DEGREES, dy > _SIN_30_DEGREES)
    return tuple(relation for relation, does in zip(RELATIONS, holds, strict=True) if does)


def _fault_of(
    objects: list[DetectedObject],
    wanted: Requirement,
    groups: list[list[DetectedObject] | None],
    colours_of: NameColours,
    rules: GenevalRules,
) -> str | None:
    """Return what is wrong with the surest objects of a requirement's class, or None."""
    name = wanted.class_name
    if len(objects) < wanted.count:
        return f"expected {name}>={wanted.count}, found {len(objects)}"
    if wanted.colour is not None:
        colours = list(colours_of(objects))
        right = colours.count(wanted.colour)
        if right < wanted.count:
            found = ", ".join(f"{colours.count(colour)} {colour}" for colour in COLOURS if colour in colours)
            return f"expected {wanted.colour} {name}>={wanted.count}, found {right}; and {found}"
    if wanted.position is None:
        return None
    relation, index = wanted.position
    targets = groups[index]
    if targets is None:
        return f"no target for {name} to be {relation}"
    for one in objects:
        for target in targets:
            true = relations_of(one.box, target.box, threshold=rules.position_threshold)
            if relation not in true:
                return f"expected {name} {relation} target, found {' and '.join(true) or 'neither side of'} target"
    return None


def _without_overlaps(objects: list[DetectedObject], rules: GenevalRules) -> list[DetectedObject]:
    """Drop each object that overlaps a surer one that stays; at max_overlap 1 even equal boxes stay."""
    if rules.max_overlap == 1.0:
        return objects
    kept: list[DetectedObject] = []
    for one in objects:
        if all(_overlap(other.box, one.box) < rules.max_overlap for other in kept):
            kept.append(one)
    return kept


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """Return intersection over union of boxes whose last pixel belongs to them, as the published script has it."""
    shared = (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    areas = [max(b[2] - b[0] + 1, 0.0) * max(b[3] - b[1] + 1, 0.0) for b in (one, other, shared)]
    union = areas[0] + areas[1] - areas[2]
    return areas[2] / union if union else 0.0


@dataclass(frozen=True, kw_only=True)
class JudgedPicture:
    """A picture's prompt and verdict."""

    prompt: GenevalPrompt
    verdict: GenEvalVerdict


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """How one task went."""

    correct: int
    pictures: int

    @property
    def share(self) -> float:
        """Correct pictures among all."""
        return self.correct / self.pictures


@dataclass(frozen=True, kw_only=True)
class GenevalSummary:
    """What GenEval reports."""

    score: float
    """Mean over the tasks of their shares, however many pictures each has."""
    correct_pictures: float
    """Share of pictures."""
    correct_prompts: float
    """Share of prompts with at least one correct picture."""
    pictures: int
    prompts: int
    """Prompts that ask for the same in the same words are one."""
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    """Tasks of which there are pictures, in the order of TASKS."""


def summarize(judged: Sequence[JudgedPicture]) -> GenevalSummary:
    """Return the scores of judged pictures, in any order; raise EvaluationError where there are none."""
    if not judged:
        raise EvaluationError("GenEval: no pictures were judged; give at least one with its prompt")
    tasks = {}
    for tag in TASKS:
        verdicts = [one.verdict.is_correct for one in judged if one.prompt.tag == tag]
        if verdicts:
            tasks[tag] = TaskScore(correct=sum(verdicts), pictures=len(verdicts))
    prompts = {one.prompt for one in judged}
    solved = {one.prompt for one in judged if one.verdict.is_correct}
    return GenevalSummary(
        score=math.fsum(task.share for task in tasks.values()) / len(tasks),
        correct_pictures=sum(one.verdict.is_correct for one in judged) / len(judged),
        correct_prompts=len(solved) / len(prompts),
        pictures=len(judged),
        prompts=len(prompts),
        tasks=tasks,
    )
