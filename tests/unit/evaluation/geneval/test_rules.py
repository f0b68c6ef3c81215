"""GenEval's rules on hand-made detections: each task right and wrong, and the summary's arithmetic."""

from collections.abc import Callable, Sequence

import pytest

from ecdit_ds.evaluation.geneval.rules import (
    COLOURS,
    PUBLISHED,
    DetectedObject,
    GenevalPrompt,
    GenevalRules,
    GenEvalVerdict,
    JudgedPicture,
    Requirement,
    judge_geneval,
    objects_in_view,
    relations_of,
    summarize,
)

Refusal = Callable[[Callable[[], object]], str]
Box = tuple[float, float, float, float]
BOX: Box = (0.0, 0.0, 10.0, 10.0)


def seen(name: str, score: float = 0.95, box: Box = BOX) -> DetectedObject:
    """Return a detection."""
    return DetectedObject(class_name=name, score=score, box=box)


def one(name: str, count: int = 1, colour: str | None = None, position: tuple[str, int] | None = None) -> Requirement:
    """Return a requirement."""
    return Requirement(class_name=name, count=count, colour=colour, position=position)


def prompt_of(tag: str, *include: Requirement, exclude: tuple[Requirement, ...] = ()) -> GenevalPrompt:
    """Return a prompt whose words do not matter."""
    return GenevalPrompt(tag=tag, prompt="a photo", include=include, exclude=exclude)


def no_colours(_objects: Sequence[DetectedObject]) -> list[str]:
    """Fail: no colour was required."""
    raise AssertionError("asked for a colour")


def verdict_on(prompt: GenevalPrompt, *objects: DetectedObject, rules: GenevalRules = PUBLISHED) -> GenEvalVerdict:
    """Judge where colours play no part."""
    return judge_geneval(objects, no_colours, prompt, rules)


THREE_CATS = prompt_of("counting", one("cat", 3), exclude=(one("cat", 4),))
CAT_LEFT_OF_DOG = prompt_of("position", one("dog"), one("cat", position=("left of", 0)))


def test_a_single_object_must_be_there() -> None:
    prompt = prompt_of("single_object", one("cat"))
    assert verdict_on(prompt, seen("cat", 0.31), seen("dog")) == GenEvalVerdict(is_correct=True, reason="")
    assert verdict_on(prompt, seen("dog")) == GenEvalVerdict(is_correct=False, reason="expected cat>=1, found 0")
    assert not verdict_on(prompt).is_correct


def test_confidence_must_be_above_the_threshold_not_at_it() -> None:
    prompt = prompt_of("single_object", one("cat"))
    assert not verdict_on(prompt, seen("cat", 0.3)).is_correct
    assert verdict_on(prompt, seen("cat", 0.3), rules=GenevalRules(confidence=0.29)).is_correct


def test_more_than_asked_for_is_no_fault_where_nothing_is_excluded() -> None:
    assert verdict_on(prompt_of("single_object", one("cat")), *[seen("cat")] * 5).is_correct


def test_both_of_two_objects_must_be_there() -> None:
    prompt = prompt_of("two_object", one("cat"), one("dog"))
    assert verdict_on(prompt, seen("dog", 0.4), seen("cat")).is_correct
    assert verdict_on(prompt, seen("cat"), seen("cat")).reason == "expected dog>=1, found 0"
    assert verdict_on(prompt).reason == "expected cat>=1, found 0; expected dog>=1, found 0"


def test_a_count_must_be_exact() -> None:
    assert verdict_on(THREE_CATS, *[seen("cat")] * 3).is_correct
    assert verdict_on(THREE_CATS, *[seen("cat")] * 2).reason == "expected cat>=3, found 2"
    assert verdict_on(THREE_CATS, *[seen("cat")] * 4).reason == "expected cat<4, found 4"


def test_counting_sees_only_what_is_very_sure() -> None:
    three, unsure = [seen("cat", 0.91)] * 3, seen("cat", 0.9)
    assert verdict_on(THREE_CATS, unsure, *three).is_correct
    assert not verdict_on(THREE_CATS, unsure, *three[:2]).is_correct
    assert not verdict_on(THREE_CATS, unsure, *three, rules=GenevalRules(counting_confidence=0.8)).is_correct


def test_an_exclusion_of_another_class_is_a_fault_of_its_own() -> None:
    prompt = prompt_of("single_object", one("cat"), exclude=(one("dog", 2),))
    assert verdict_on(prompt, seen("cat"), seen("dog")).is_correct
    assert verdict_on(prompt, seen("cat"), seen("dog"), seen("dog")).reason == "expected dog<2, found 2"


def test_a_class_has_at_most_sixteen_objects_and_they_are_the_surest() -> None:
    many = [seen("cat", 0.4 + 0.01 * i) for i in range(20)] + [seen("dog")]
    kept = objects_in_view(many, "colors", PUBLISHED)
    assert [round(cat.score, 2) for cat in kept["cat"]] == [round(0.59 - 0.01 * i, 2) for i in range(16)]
    assert len(kept["dog"]) == 1
    assert len(objects_in_view(many, "colors", GenevalRules(max_objects=3))["cat"]) == 3


def test_overlapping_boxes_of_a_class_are_one_object_where_the_rules_say_so() -> None:
    # The last pixel belongs to a box: 10 x 10 pixels, moved by 5 of them; 50 shared of 150.
    first, moved, far = (
        seen("cat", 0.9 - 0.1 * i, box) for i, box in enumerate([(0, 0, 9, 9), (5, 0, 14, 9), (50, 0, 59, 9)])
    )
    other = seen("dog", 0.5, (0, 0, 9, 9))
    for max_overlap, kept in ((1.0, 3), (0.34, 3), (0.33, 2)):
        rules = GenevalRules(max_overlap=max_overlap)
        in_view = objects_in_view([moved, far, other, first], "two_object", rules)
        assert (len(in_view["cat"]), in_view["cat"][0], len(in_view["dog"])) == (kept, first, 1)
    assert len(objects_in_view([first, first], "two_object", PUBLISHED)["cat"]) == 2


def test_an_overlap_at_the_limit_is_one_too_many() -> None:
    half = [seen("cat", 0.9, (0, 0, 9, 9)), seen("cat", 0.8, (0, 0, 9, 19))]
    assert len(objects_in_view(half, "colors", GenevalRules(max_overlap=0.5))["cat"]) == 1
    assert len(objects_in_view(half, "colors", GenevalRules(max_overlap=0.51))["cat"]) == 2


def test_a_dropped_box_does_not_drop_others() -> None:
    # The second overlaps the first and goes; the third overlaps only the second, and stays.
    boxes: list[Box] = [(0, 0, 9, 9), (5, 0, 14, 9), (10, 0, 19, 9)]
    row = [seen("cat", 0.9 - 0.1 * i, box) for i, box in enumerate(boxes)]
    assert objects_in_view(row, "counting", GenevalRules(max_overlap=0.3, counting_confidence=0.0))["cat"] == [
        row[0],
        row[2],
    ]


def test_a_colour_is_asked_for_and_must_be_right() -> None:
    prompt = prompt_of("colors", one("cat", colour="red"))
    assert judge_geneval([seen("cat")], lambda objects: ["red"], prompt).is_correct
    wrong = judge_geneval([seen("cat")], lambda objects: ["blue"], prompt)
    assert wrong.reason == "expected red cat>=1, found 0; and 1 blue"
    assert judge_geneval([seen("dog")], no_colours, prompt).reason == "expected cat>=1, found 0"


def test_only_the_surest_object_is_asked_for_its_colour() -> None:
    prompt = prompt_of("colors", one("cat", colour="red"))
    red, blue = seen("cat", 0.6, (0, 0, 5, 5)), seen("cat", 0.8, (20, 0, 25, 5))
    colour_of = {red: "red", blue: "blue"}

    def colours(objects: Sequence[DetectedObject]) -> list[str]:
        return [colour_of[found] for found in objects]

    assert not judge_geneval([red, blue], colours, prompt).is_correct
    surer = seen("cat", 0.9, red.box)
    colour_of[surer] = "red"
    assert judge_geneval([blue, surer], colours, prompt).is_correct


def test_as_many_as_asked_for_must_have_the_colour() -> None:
    prompt = prompt_of("colors", one("cat", 2, colour="red"))
    cats = [seen("cat", 0.9), seen("cat", 0.8), seen("cat", 0.7)]
    assert judge_geneval(cats, lambda objects: ["red"] * len(objects), prompt).is_correct
    found = judge_geneval(cats, lambda objects: ["red", "white"], prompt)
    assert found.reason == "expected red cat>=2, found 1; and 1 red, 1 white"


def test_colours_belong_to_their_objects() -> None:
    prompt = prompt_of("color_attr", one("cat", colour="red"), one("dog", colour="blue"))

    def as_told(cat: str, dog: str) -> GenEvalVerdict:
        told = {"cat": cat, "dog": dog}
        return judge_geneval([seen("dog"), seen("cat")], lambda objects: [told[x.class_name] for x in objects], prompt)

    assert as_told("red", "blue").is_correct
    assert (
        as_told("blue", "red").reason
        == "expected red cat>=1, found 0; and 1 blue; expected blue dog>=1, found 0; and 1 red"
    )
    assert not as_told("red", "red").is_correct


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-30, 0, -20, 10), ("left of",)),
        ((30, 0, 40, 10), ("right of",)),
        ((0, -30, 10, -20), ("above",)),
        ((0, 30, 10, 40), ("below",)),
        ((30, -30, 40, -20), ("right of", "above")),
        ((0, 0, 10, 10), ()),
        ((2, 0, 12, 10), ()),  # centres 2 apart: 0.1 of both sizes together, and nothing remains
        ((4, 0, 14, 10), ()),  # 4 apart: 2 remain, half of 4 and not more
        ((4.01, 0, 14.01, 10), ("right of",)),
        ((-4.01, 0, 5.99, 10), ("left of",)),
    ],
)
def test_a_box_is_beside_another_when_more_than_half_its_distance_is_beyond_the_threshold(
    box: Box, expected: tuple[str, ...]
) -> None:
    assert relations_of(box, BOX, threshold=0.1) == expected


def test_far_away_a_side_reaches_sixty_degrees() -> None:
    # Points have no size: along the axis must be more than half of the distance.
    assert relations_of((10, 17.3, 10, 17.3), (0, 0, 0, 0), threshold=0.1) == ("right of", "below")
    assert relations_of((10, 17.4, 10, 17.4), (0, 0, 0, 0), threshold=0.1) == ("below",)


def test_each_axis_has_its_own_sizes() -> None:
    wide: Box = (0, 0, 100, 2)
    assert relations_of((20, 0, 120, 2), wide, threshold=0.1) == ()
    assert relations_of((0, 20, 100, 22), wide, threshold=0.1) == ("below",)


def test_the_sizes_of_both_boxes_count() -> None:
    small: Box = (18, 0, 22, 4)  # 4 and 40 wide: 4.4 are taken off the distance of the centres
    for distance, holds in ((6, False), (9, True)):
        large: Box = (-distance, 0, 40 - distance, 4)
        assert relations_of(small, large, threshold=0.1) == (("right of",) if holds else ())
        assert relations_of(large, small, threshold=0.1) == (("left of",) if holds else ())


def test_a_position_must_be_the_one_asked_for() -> None:
    dog = seen("dog", box=(50, 50, 60, 60))
    left, right = seen("cat", box=(0, 50, 10, 60)), seen("cat", box=(90, 50, 100, 60))
    assert verdict_on(CAT_LEFT_OF_DOG, left, dog).is_correct
    assert verdict_on(CAT_LEFT_OF_DOG, right, dog).reason == "expected cat left of target, found right of target"
    assert verdict_on(CAT_LEFT_OF_DOG, seen("cat", box=dog.box), dog).reason.endswith("found neither side of target")
    assert verdict_on(CAT_LEFT_OF_DOG, left).reason == "expected dog>=1, found 0; no target for cat to be left of"
    assert verdict_on(CAT_LEFT_OF_DOG, dog).reason == "expected cat>=1, found 0"


def test_a_position_on_the_threshold_is_none() -> None:
    dog = seen("dog", box=BOX)
    assert not verdict_on(CAT_LEFT_OF_DOG, seen("cat", box=(-4, 0, 6, 10)), dog).is_correct
    assert verdict_on(CAT_LEFT_OF_DOG, seen("cat", box=(-4.01, 0, 5.99, 10)), dog).is_correct
    near = GenevalRules(position_threshold=0.05)
    assert verdict_on(CAT_LEFT_OF_DOG, seen("cat", box=(-4, 0, 6, 10)), dog, rules=near).is_correct


def test_only_the_surest_pair_has_a_position() -> None:
    dog, left = seen("dog", box=(50, 50, 60, 60)), seen("cat", 0.6, (0, 50, 10, 60))
    right = seen("cat", 0.8, (90, 50, 100, 60))
    assert not verdict_on(CAT_LEFT_OF_DOG, left, right, dog).is_correct
    assert verdict_on(CAT_LEFT_OF_DOG, seen("cat", 0.9, left.box), right, dog).is_correct


def test_an_object_of_the_wrong_colour_is_no_target() -> None:
    prompt = prompt_of("position", one("dog", colour="red"), one("cat", position=("left of", 0)))
    placed = [seen("cat", box=(0, 50, 10, 60)), seen("dog", box=(50, 50, 60, 60))]
    assert judge_geneval(placed, lambda objects: ["red"], prompt).is_correct
    wrong = judge_geneval(placed, lambda objects: ["blue"], prompt)
    assert wrong.reason == "expected red dog>=1, found 0; and 1 blue; no target for cat to be left of"


def test_every_pair_of_those_asked_for_must_be_placed_right() -> None:
    prompt = prompt_of("position", one("dog", 2), one("cat", position=("above", 0)))
    cat, below = seen("cat", box=(0, 0, 10, 10)), seen("dog", box=(0, 50, 10, 60))
    beside = seen("dog", box=(90, 0, 100, 10))
    assert verdict_on(prompt, cat, below, below).is_correct
    assert not verdict_on(prompt, cat, below, beside).is_correct


def judged(prompt: GenevalPrompt, *outcomes: bool) -> list[JudgedPicture]:
    """Return pictures of one prompt."""
    return [JudgedPicture(prompt=prompt, verdict=GenEvalVerdict(is_correct=right, reason="")) for right in outcomes]


def test_a_summary_is_that_of_counting_by_hand() -> None:
    cat, dog = prompt_of("single_object", one("cat")), prompt_of("single_object", one("dog"))
    pictures = [
        *judged(THREE_CATS, False, False),
        *judged(cat, True, False, True),
        *judged(dog, False),
        *judged(CAT_LEFT_OF_DOG, True, True),
    ]
    summary = summarize(pictures)
    assert list(summary.tasks) == ["single_object", "counting", "position"]
    assert {tag: (task.correct, task.pictures, task.share) for tag, task in summary.tasks.items()} == {
        "single_object": (2, 4, 0.5),
        "counting": (0, 2, 0.0),
        "position": (2, 2, 1.0),
    }
    assert summary.score == 0.5
    assert (summary.pictures, summary.prompts) == (8, 4)
    assert (summary.correct_pictures, summary.correct_prompts) == (0.5, 0.5)
    assert summarize(pictures[::-1]) == summary


def test_the_mean_over_tasks_the_share_of_pictures_and_the_share_of_prompts_are_three_numbers() -> None:
    cat, dog, bird = (prompt_of("single_object", one(name)) for name in ("cat", "dog", "bird"))
    also_a_cat = prompt_of("two_object", one("cat"))  # the same words, another prompt
    summary = summarize(
        [
            *judged(cat, True, False, False, False),
            *judged(dog, True, False),
            *judged(bird, False),
            *judged(also_a_cat, False),
            *judged(CAT_LEFT_OF_DOG, True, True),
        ]
    )
    shares = [task.share for task in summary.tasks.values()]
    assert shares == pytest.approx([2 / 7, 0.0, 1.0])
    assert summary.score == pytest.approx((2 / 7 + 0.0 + 1.0) / 3)
    assert summary.correct_pictures == pytest.approx(4 / 10)
    assert summary.correct_prompts == pytest.approx(3 / 5)
    assert (summary.pictures, summary.prompts) == (10, 5)


def test_a_summary_of_nothing_is_refused(refusal_of: Refusal) -> None:
    assert "no pictures" in refusal_of(lambda: summarize([]))


def test_the_thresholds_are_the_published_ones() -> None:
    assert (
        GenevalRules(confidence=0.3, counting_confidence=0.9, max_objects=16, max_overlap=1.0, position_threshold=0.1)
        == PUBLISHED
    )


def test_there_are_ten_colours() -> None:
    assert len(set(COLOURS)) == 10
