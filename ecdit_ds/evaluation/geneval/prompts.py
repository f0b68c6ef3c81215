"""GenEval's prompts: drawn by the published rule, or read from a metadata file (Ghosh et al. 2310.11513).

Numbers of prompts and their words are those that were published; which objects meet which is a draw of our own. To
compare with printed scores, read the official `evaluation_metadata.jsonl`.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecdit_ds.errors import EvaluationError
from ecdit_ds.evaluation.geneval.rules import COLOURS, RELATIONS, TASKS, GenevalPrompt, Requirement
from ecdit_ds.seeding import sample_rng

COCO_CLASSES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "computer mouse",
    "tv remote",
    "computer keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
"""COCO's 80 classes as GenEval words them: three say which mouse, remote and keyboard is meant."""

NUM_PROMPTS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
"""As published: 553 in all."""

_OTHER_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""COCO's own three names, and Pascal VOC's, which some detectors' labels use."""
_NUMBER_WORDS = ("zero", "one", "two", "three", "four")
_MOST_DRAWS = 1000


def canonical_class(name: str) -> str:
    """Return GenEval's word for a class, whatever a detector or a file calls it."""
    return _OTHER_NAMES.get(name, name)


def draw_prompts(
    class_names: Sequence[str] = COCO_CLASSES, *, seed: int, numbers: dict[str, int] | None = None
) -> list[GenevalPrompt]:
    """Return distinct prompts of the six tasks; equal for equal arguments, each task's free of the others' numbers.

    Coloured objects are never persons.

    Args:
        class_names: objects to draw from, at least 3: two that are not persons.
        numbers: how many prompts of each task; NUM_PROMPTS by default.

    Raises:
        EvaluationError: so many distinct prompts cannot be drawn from so few classes.
    """
    prompts: list[GenevalPrompt] = []
    for tag, number in (NUM_PROMPTS if numbers is None else numbers).items():
        rng = sample_rng(seed, 0, f"geneval {tag}")
        found: dict[GenevalPrompt, None] = {}
        for _ in range(_MOST_DRAWS + 100 * number):
            if len(found) == number:
                break
            found[_DRAW[tag](rng, class_names)] = None
        if len(found) < number:
            raise EvaluationError(
                f"GenEval: {number} distinct prompts of {tag} cannot be drawn from {len(class_names)} classes; "
                "ask for fewer"
            )
        prompts += found
    return prompts


def as_metadata(prompt: GenevalPrompt) -> str:
    """Return a line of a metadata file, in the published format."""
    line: dict[str, Any] = {"tag": prompt.tag, "include": [_as_dict(wanted) for wanted in prompt.include]}
    if prompt.exclude:
        line["exclude"] = [_as_dict(unwanted) for unwanted in prompt.exclude]
    return json.dumps({**line, "prompt": prompt.prompt})


def read_prompts(path: Path, class_names: Iterable[str] = COCO_CLASSES) -> list[GenevalPrompt]:
    """Read a metadata file: one JSON object a line, empty lines left out.

    Args:
        class_names: what the detector knows, in GenEval's words.

    Raises:
        EvaluationError: names the file, the line and what is wrong with it; or the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as GenEval metadata ({error})") from error
    known = frozenset(class_names)
    prompts = [parse_prompt(line, f"{path} line {i}", known) for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise EvaluationError(f"{path}: holds no prompts; expected one JSON object a line")
    return prompts


def parse_prompt(line: str, where: str, class_names: frozenset[str]) -> GenevalPrompt:
    """Return the prompt of one line of metadata; raise EvaluationError that begins with `where`."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
        raise EvaluationError(f"{where}: not JSON ({error})") from error
    _require(isinstance(content, dict), where, f"a JSON object is expected, not {type(content).__name__}")
    for key, kind in (("tag", str), ("prompt", str), ("include", list)):
        _require(key in content, where, f"key {key!r} is missing")
        _require(isinstance(content[key], kind), where, f"{key} must be a {kind.__name__}, not {content[key]!r}")
    tag, exclude = content["tag"], content.get("exclude", [])
    _require(tag in TASKS, where, f"tag {tag!r} is not one of {', '.join(TASKS)}")
    _require(isinstance(exclude, list), where, f"exclude must be a list, not {exclude!r}")
    _require(len(content["include"]) > 0, where, "include is empty, so every picture would be right")
    return GenevalPrompt(
        tag=tag,
        prompt=content["prompt"],
        include=tuple(_requirement(item, i, where, class_names) for i, item in enumerate(content["include"])),
        exclude=tuple(_requirement(item, 0, where, class_names) for item in exclude),
    )


def _requirement(item: Any, index: int, where: str, class_names: frozenset[str]) -> Requirement:
    """Check one entry of include, its `index`-th, or of exclude (0, so that it can have no position)."""
    _require(isinstance(item, dict), where, f"an entry of include or exclude must be an object, not {item!r}")
    unknown = sorted(item.keys() - {"class", "count", "color", "position"})
    _require(not unknown, where, f"key {unknown[0] if unknown else ''!r} is none of class, count, color, position")
    for key in ("class", "count"):
        _require(key in item, where, f"key {key!r} is missing in {item!r}")
    name, count, colour, position = item["class"], item["count"], item.get("color"), item.get("position")
    _require(isinstance(name, str), where, f"class must be a name, not {name!r}")
    is_known = canonical_class(name) in class_names
    _require(is_known, where, f"class {name!r} is not one of the detector's {len(class_names)} classes")
    _require(
        type(count) is int and count >= 1, where, f"count of {name!r} must be a whole number from 1, not {count!r}"
    )
    _require(colour is None or colour in COLOURS, where, f"color {colour!r} is not one of {', '.join(COLOURS)}")
    if position is not None:
        is_pair = isinstance(position, list) and len(position) == 2 and type(position[1]) is int
        _require(is_pair, where, f'position must be as ["left of", 0], not {position!r}')
        _require(position[0] in RELATIONS, where, f"position {position[0]!r} is not one of {', '.join(RELATIONS)}")
        is_earlier = 0 <= position[1] < index
        _require(is_earlier, where, f"position {position!r} of {name!r} must name an earlier entry of include")
        position = (position[0], position[1])
    return Requirement(class_name=canonical_class(name), count=count, colour=colour, position=position)


def _require(is_so: bool, where: str, message: str) -> None:
    if not is_so:
        raise EvaluationError(f"{where}: {message}")


def _as_dict(wanted: Requirement) -> dict[str, Any]:
    item: dict[str, Any] = {"class": wanted.class_name, "count": wanted.count}
    if wanted.colour is not None:
        item["color"] = wanted.colour
    if wanted.position is not None:
        item["position"] = list(wanted.position)
    return item


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    """Return the plural of the published prompts, which has no exceptions: "sheeps", "knifes", "skises"."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _some(rng: np.random.Generator, items: Sequence[str], number: int) -> list[str]:
    """Return different items."""
    return [items[i] for i in rng.choice(len(items), size=number, replace=False)]


def _without_persons(class_names: Sequence[str]) -> list[str]:
    return [name for name in class_names if name != "person"]


def _single_object(rng: np.random.Generator, class_names: Sequence[str]) -> GenevalPrompt:
    (name,) = _some(rng, class_names, 1)
    return GenevalPrompt(
        tag="single_object",
        include=(Requirement(class_name=name, count=1),),
        prompt=f"a photo of {_with_article(name)}",
    )


def _two_object(rng: np.random.Generator, class_names: Sequence[str]) -> GenevalPrompt:
    names = _some(rng, class_names, 2)
    return GenevalPrompt(
        tag="two_object",
        include=tuple(Requirement(class_name=name, count=1) for name in names),
        prompt=f"a photo of {' and '.join(map(_with_article, names))}",
    )


def _counting(rng: np.random.Generator, class_names: Sequence[str]) -> GenevalPrompt:
    (name,) = _some(rng, class_names, 1)
    count = int(rng.integers(2, len(_NUMBER_WORDS)))
    return GenevalPrompt(
        tag="counting",
        include=(Requirement(class_name=name, count=count),),
        exclude=(Requirement(class_name=name, count=count + 1),),
        prompt=f"a photo of {_NUMBER_WORDS[count]} {_plural(name)}",
    )


def _colors(rng: np.random.Generator, class_names: Sequence[str]) -> GenevalPrompt:
    (name,), (colour,) = _some(rng, _without_persons(class_names), 1), _some(rng, COLOURS, 1)
    return GenevalPrompt(
        tag="colors",
        include=(Requirement(class_name=name, count=1, colour=colour),),
        prompt=f"a photo of {_with_article(colour)} {name}",
    )


def _position(rng: np.random.Generator, class_names: Sequence[str]) -> GenevalPrompt:
    (name, target), (relation,) = _some(rng, class_names, 2), _some(rng, RELATIONS, 1)
    return GenevalPrompt(
        tag="position",
        include=(
            Requirement(class_name=target, count=1),
            Requirement(class_name=name, count=1, position=(relation, 0)),
        ),
        prompt=f"a photo of {_with_article(name)} {relation} {_with_article(target)}",
    )


def _color_attr(rng: np.random.Generator, class_names: Sequence[str]) -> GenevalPrompt:
    names, colours = _some(rng, _without_persons(class_names), 2), _some(rng, COLOURS, 2)
    pairs = list(zip(names, colours, strict=True))
    return GenevalPrompt(
        tag="color_attr",
        include=tuple(Requirement(class_name=name, count=1, colour=colour) for name, colour in pairs),
        prompt=f"a photo of {' and '.join(f'{_with_article(colour)} {name}' for name, colour in pairs)}",
    )


_DRAW: dict[str, Callable[[np.random.Generator, Sequence[str]], GenevalPrompt]] = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
