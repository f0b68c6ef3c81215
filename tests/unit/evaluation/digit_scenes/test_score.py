"""The alignment score: GenEval's rules on hand-made canvases, and the checker against scenes whose truth is known."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import pytest

from ecdit_ds.data.digit_scenes.scenes import (
    KINDS,
    PALETTE,
    Scene,
    SceneSpec,
    digit_images,
    draw_scene,
    is_held_out,
    parse_caption,
    possible_claims,
    upsampling_matrix,
)
from ecdit_ds.evaluation.digit_scenes.checker import check_scene, check_scenes, judge_scene, scene_relations
from ecdit_ds.evaluation.digit_scenes.detector import FoundObject, find_objects
from ecdit_ds.evaluation.digit_scenes.score import (
    alignment_of,
    heldout_prompts,
    mismatched_specs,
    score_alignment,
    score_scenes,
    scores_of,
)

Picture = npt.NDArray[np.uint8]
Thing = tuple[str, int, int, int]
"""Colour, digit, row and column of pixels."""


def canvas(*things: Thing, height: int = 16, width: int = 16, scale: int = 1, glyph: int = 0) -> Picture:
    """Paint held-out digits anywhere on a black canvas; `glyph` chooses which handwriting."""
    images = digit_images("heldout")
    image_HWC = np.zeros((height, width, 3), dtype=np.uint8)
    for colour, digit, top, left in things:
        ink_HW = upsampling_matrix(scale) @ images.ink_NHW[images.digit_N == digit][glyph] @ upsampling_matrix(scale).T
        box = (slice(top, top + 8 * scale), slice(left, left + 8 * scale))
        image_HWC[box] = np.maximum(image_HWC[box], np.rint(ink_HW[:, :, None] * PALETTE[colour]).astype(np.uint8))
    return image_HWC


def is_shown(caption: str, *things: Thing) -> bool:
    """Check a caption against a picture of things."""
    return check_scene(canvas(*things), parse_caption(caption)).is_correct


def pictures(scenes: list[Scene]) -> Picture:
    """Return the real pictures of scenes."""
    return np.stack([scene.image_HWC for scene in scenes])


@pytest.fixture(scope="module")
def prompts() -> list[Scene]:
    """Return 25 held-out scenes of each kind on a 24 x 24 canvas: digits of one scale, with room to miss the grid."""
    return heldout_prompts(seed=0, canvas_height=24, canvas_width=24, per_kind=25)


def test_every_caption_there_can_be_is_read_back() -> None:
    claims = [claim for kind in KINDS for claim in possible_claims(kind)]
    assert len(claims) == 10 + 90 + 3 * 7 * 10 + 60 + 90 * 37 * 4 + 90 * 30
    assert len({claim.caption for claim in claims}) == len(claims)
    for claim in claims:
        assert parse_caption(claim.caption) == claim


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_captions_of_drawn_scenes_say_what_their_claims_and_objects_are(split: str) -> None:
    for index in range(600):
        scene = draw_scene(seed=3, split=split, index=index, canvas_height=16, canvas_width=16)  # type: ignore[arg-type]
        claim = parse_caption(scene.caption)
        assert claim == scene.claim
        assert claim.digits == tuple(thing.digit for thing in scene.objects)
        assert is_held_out(claim) == (split == "heldout")


def test_claims_mean_the_same_whichever_thing_they_name_first() -> None:
    for one, other in [
        ("a two and a six", "a six and a two"),
        ("a red two and a blue six", "a blue six and a red two"),
        ("a red two to the left of a blue six", "a blue six to the right of a red two"),
        ("a two above a six", "a six below a two"),
    ]:
        assert parse_caption(one).meaning == parse_caption(other).meaning
    assert parse_caption("a two above a six").meaning != parse_caption("a two below a six").meaning
    assert parse_caption("a two above a six").meaning != parse_caption("a red two above a red six").meaning


@pytest.mark.parametrize(
    ("caption", "named"),
    [("a purple seven", "'purple'"), ("a seven near a two", "'near'"), ("a seven a two", "no scene"), ("", "no scene")],
)
def test_a_caption_that_no_scene_has_is_refused(
    caption: str, named: str, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    message = refusal_of(lambda: parse_caption(caption))
    assert repr(caption) in message
    assert named in message
    assert "a red seven above a blue two" in message


RED_SEVEN, BLUE_SEVEN, BLUE_TWO, RED_TWO = ("red", 7, 0, 0), ("blue", 7, 8, 8), ("blue", 2, 0, 8), ("red", 2, 8, 0)


@pytest.mark.parametrize(
    ("caption", "things", "expected"),
    [
        ("a seven", [RED_SEVEN], True),
        ("a seven", [RED_SEVEN, BLUE_TWO], True),  # GenEval ignores what the caption does not name
        ("a seven", [BLUE_TWO], False),
        ("a seven and a two", [RED_SEVEN, BLUE_TWO], True),
        ("a two and a seven", [RED_SEVEN, BLUE_TWO, RED_TWO], True),
        ("a seven and a two", [RED_SEVEN, BLUE_SEVEN], False),
        ("a seven and a two", [BLUE_TWO], False),
        ("two sevens", [RED_SEVEN, BLUE_SEVEN], True),
        ("two sevens", [RED_SEVEN, BLUE_SEVEN, BLUE_TWO], True),
        ("two sevens", [RED_SEVEN], False),
        ("two sevens", [RED_SEVEN, BLUE_SEVEN, ("red", 7, 8, 0)], False),
        ("three sevens", [RED_SEVEN, BLUE_SEVEN, ("red", 7, 8, 0)], True),
        ("two red sevens", [RED_SEVEN, ("red", 7, 8, 0)], True),
        ("two red sevens", [RED_SEVEN, ("red", 7, 8, 0), BLUE_SEVEN], True),
        ("two red sevens", [RED_SEVEN, BLUE_SEVEN], False),
        ("two red sevens", [RED_SEVEN, ("red", 7, 8, 0), ("red", 7, 8, 8)], False),
        ("a red seven", [RED_SEVEN], True),
        ("a red seven", [RED_SEVEN, BLUE_SEVEN], True),
        ("a red seven", [BLUE_SEVEN], False),
        ("a red seven", [RED_TWO, BLUE_SEVEN], False),
        ("a red seven and a blue two", [RED_SEVEN, BLUE_TWO], True),
        ("a red seven and a blue two", [BLUE_SEVEN, RED_TWO], False),
        ("a red seven and a blue two", [RED_SEVEN, RED_TWO], False),
        ("a red seven and a blue two", [RED_SEVEN], False),
        ("a seven to the left of a two", [RED_SEVEN, BLUE_TWO], True),
        ("a two to the right of a seven", [RED_SEVEN, BLUE_TWO], True),
        ("a seven to the right of a two", [RED_SEVEN, BLUE_TWO], False),
        ("a seven above a two", [RED_SEVEN, BLUE_TWO], False),
        ("a seven above a two", [RED_SEVEN, RED_TWO], True),
        ("a two below a seven", [RED_SEVEN, RED_TWO], True),
        ("a seven below a two", [RED_SEVEN, RED_TWO], False),
        ("a seven to the left of a two", [RED_SEVEN], False),
        ("a red seven to the left of a blue two", [RED_SEVEN, BLUE_TWO], True),
        ("a blue seven to the left of a red two", [RED_SEVEN, BLUE_TWO], False),
    ],
)
def test_each_kind_has_genevals_rule(caption: str, things: list[Thing], expected: bool) -> None:
    assert is_shown(caption, *things) == expected


def test_a_relation_must_hold_for_the_very_object_that_has_the_colour() -> None:
    things = [RED_SEVEN, BLUE_TWO, RED_TWO]  # the blue two is to the right of the seven, the red two below it
    assert is_shown("a red seven above a red two", *things)
    assert not is_shown("a red seven above a blue two", *things)


def test_both_relations_of_a_diagonal_hold_and_of_a_knights_move_the_longer_one() -> None:
    def at(row: int, column: int) -> FoundObject:
        return FoundObject(digit=1, colour="red", top=8 * row, left=8 * column, side=8)

    assert scene_relations(at(0, 0), at(1, 1)) == {"above", "to the left of"}
    assert scene_relations(at(1, 0), at(0, 1)) == {"below", "to the left of"}
    # (16 - 1.6) / 17.9 = 0.80 down, and (8 - 1.6) / 17.9 = 0.36 across, which is less than a half
    assert scene_relations(at(2, 1), at(0, 0)) == {"below"}
    assert scene_relations(at(0, 2), at(1, 0)) == {"to the right of"}
    assert scene_relations(at(1, 1), at(1, 1)) == set()


def test_centres_a_fifth_of_a_side_apart_are_level() -> None:
    here = FoundObject(digit=1, colour="red", top=0, left=0, side=10)
    for left, expected in ((3, set()), (4, set()), (5, {"to the left of"})):  # (left - 2) / left > 0.5
        assert scene_relations(here, FoundObject(digit=1, colour="red", top=0, left=left, side=10)) == expected


def test_things_of_two_sizes_stand_where_their_middles_are_and_both_sizes_count() -> None:
    def square(side: int, middle: int) -> FoundObject:
        return FoundObject(digit=1, colour="red", top=middle - side // 2, left=middle - side // 2, side=side)

    # 8 across is less than 0.1 x (8 + 16) and half of the whole way, 2.4 + 5.7; 10 is more than 2.4 + 7.1.
    assert scene_relations(square(8, 0), square(16, 8)) == scene_relations(square(16, 0), square(8, 8)) == set()
    assert scene_relations(square(8, 0), square(16, 10)) == {"above", "to the left of"}
    assert scene_relations(square(16, 10), square(8, 0)) == {"below", "to the right of"}


def test_a_picture_is_exact_if_it_shows_nothing_that_the_caption_does_not_name() -> None:
    for caption, things in [
        ("a seven", [RED_SEVEN]),
        ("two sevens", [RED_SEVEN, BLUE_SEVEN]),
        ("a seven and a two", [RED_SEVEN, BLUE_TWO]),
    ]:
        for extra, is_exact in (([], True), ([("green", 3, 8, 0)], False)):
            verdict = check_scene(canvas(*things, *extra), parse_caption(caption))
            assert (verdict.is_correct, verdict.is_exact) == (True, is_exact)
    assert not check_scene(canvas(BLUE_TWO), parse_caption("a seven")).is_exact


def test_a_verdict_says_what_was_expected_and_what_is_there() -> None:
    verdict = check_scene(canvas(RED_SEVEN, BLUE_SEVEN), parse_caption("two red sevens"))
    assert verdict.reason == "expected two red sevens, found 1 red seven, 1 blue seven"
    verdict = check_scene(canvas(BLUE_TWO), parse_caption("a two above a six"))
    assert verdict.reason == "expected a two above a six, found 1 blue two at row 0 column 8"
    assert check_scene(canvas(), parse_caption("a seven")).reason == "expected a seven, found nothing"
    assert check_scene(canvas(RED_SEVEN), parse_caption("a seven")).reason == "found 1 red seven"


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_digits_of_every_scale_are_found_where_they_are(scale: int) -> None:
    side = 8 * scale
    image_HWC = canvas(("cyan", 3, 0, side), ("white", 6, side, side), height=50, width=54, scale=scale)
    (found,) = find_objects(image_HWC[None])
    assert [(thing.colour, thing.digit, thing.side) for thing in found] == [("cyan", 3, side), ("white", 6, side)]
    # Half a pixel of the digit beside the place is hard to tell from it.
    assert np.array([(o.top, o.left) for o in found]) == pytest.approx(
        np.array([[0, side], [side, side]]), abs=scale / 2
    )


def test_where_digits_have_two_scales_those_with_more_light_are_the_scene() -> None:
    small_HWC = canvas(("red", 3, 0, 0), ("blue", 6, 8, 0), height=32, width=32)
    large_HWC = canvas(("white", 3, 16, 16), height=32, width=32, scale=2)
    assert [thing.side for thing in find_objects(small_HWC[None])[0]] == [8, 8]
    assert [thing.side for thing in find_objects((small_HWC + large_HWC)[None])[0]] == [16]


def test_of_three_scales_the_one_with_most_light_is_the_scene_wherever_it_comes() -> None:
    small = [("green", 6, 8 * row, 8 * column) for row in range(2) for column in range(6)]
    scene_HWC = canvas(*small, height=48, width=48)
    scene_HWC += canvas(("white", 3, 16, 0), height=48, width=48, scale=2)
    scene_HWC += canvas(("red", 3, 24, 24), height=48, width=48, scale=3)
    assert [thing.side for thing in find_objects(scene_HWC[None])[0]] == [8] * 12


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 1), (-1, -1), (1, -1)])
def test_digits_a_pixel_off_the_grid_are_found_there(down: int, right: int) -> None:
    things = [("green", 3, 8 + down, 8 + right), ("yellow", 0, 8 + down, 16 + right)]
    (found,) = find_objects(canvas(*things, height=32, width=32)[None])
    assert sorted((thing.colour, thing.digit) for thing in found) == [("green", 3), ("yellow", 0)]
    assert {(thing.top, thing.left) for thing in found} == {(8 + down, 8 + right), (8 + down, 16 + right)}


def test_touching_digits_of_four_colours_do_not_run_together() -> None:
    things = [("red", 3, 0, 0), ("blue", 8, 0, 8), ("yellow", 0, 8, 0), ("white", 6, 8, 8)]
    (found,) = find_objects(canvas(*things)[None])
    assert [(thing.colour, thing.digit, thing.top, thing.left) for thing in found] == things


@pytest.mark.parametrize("colour", list(PALETTE))
def test_pale_ink_keeps_the_name_of_its_colour(colour: str) -> None:
    image_HWC = (canvas((colour, 3, 8, 0)) * 0.7).astype(np.uint8)
    assert [(thing.colour, thing.digit) for thing in find_objects(image_HWC[None])[0]] == [(colour, 3)]


def test_what_is_no_digit_is_not_found() -> None:
    rng = np.random.default_rng(0)
    whole_HWC = canvas(*[("white", 8, 0, 0), ("white", 3, 8, 8)], glyph=1)
    padded_HWC = np.pad(whole_HWC.astype(float), ((2, 2), (2, 2), (0, 0)))
    blurred_HWC = sum(padded_HWC[i : i + 16, j : j + 16] for i in range(5) for j in range(5)) / 25
    halves_HWC = np.zeros_like(whole_HWC)
    halves_HWC[0:4, 0:8], halves_HWC[12:16, 8:16] = whole_HWC[4:8, 0:8], whole_HWC[8:12, 8:16]
    unreadable = {
        "black": np.zeros_like(whole_HWC),
        "white": np.full_like(whole_HWC, 255),
        "faint": whole_HWC // 6,
        "noise": rng.integers(0, 256, whole_HWC.shape).astype(np.uint8),
        "blurred": np.asarray(blurred_HWC).astype(np.uint8),
        "halves": halves_HWC,
    }
    assert len(find_objects(whole_HWC[None])[0]) == 2
    for name, image_HWC in unreadable.items():
        assert find_objects(image_HWC[None]) == [()], name


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 24), (32, 32)])
def test_the_ceiling_is_near_one_in_every_kind(height: int, width: int) -> None:
    scenes = heldout_prompts(seed=1, canvas_height=height, canvas_width=width, per_kind=30)
    scores = score_scenes(pictures(scenes), [scene.claim for scene in scenes])
    assert [score.count for score in scores.kinds] == [30] * 6
    assert min(score.share for score in scores.kinds) >= 0.9  # 0.95 and more of 200
    assert scores.overall > 0.97
    assert scores.exact > 0.97


def test_noise_hardly_lowers_the_ceiling(prompts: list[Scene]) -> None:
    noise = np.random.default_rng(0).normal(0, 25.5, pictures(prompts).shape)
    noisy = np.clip(pictures(prompts) + noise, 0, 255).astype(np.uint8)
    assert score_scenes(noisy, [scene.claim for scene in prompts]).overall > 0.95


def test_what_is_found_in_real_scenes_is_what_they_hold(prompts: list[Scene]) -> None:
    num_same = sum(
        Counter((thing.digit, thing.colour, thing.side) for thing in found)
        == Counter((thing.digit, thing.colour, 8 * thing.scale) for thing in scene.objects)
        for scene, found in zip(prompts, find_objects(pictures(prompts)), strict=True)
    )
    assert num_same > 0.96 * len(prompts)


def test_a_blank_picture_scores_nothing_in_any_kind(prompts: list[Scene]) -> None:
    claims = [scene.claim for scene in prompts]
    scores = score_scenes(np.zeros((len(claims), 16, 16, 3), dtype=np.uint8), claims)
    assert [(score.count, score.correct, score.exact) for score in scores.kinds] == [(25, 0, 0)] * 6


def test_a_picture_is_judged_alike_in_any_company(prompts: list[Scene]) -> None:
    some = prompts[::2]
    claims, images = [scene.claim for scene in some], pictures(some)
    together = check_scenes(images, claims)
    assert len(together) > 64, "more than are looked at at once"
    backwards = check_scenes(images[::-1], claims[::-1])
    assert backwards[::-1] == together
    assert check_scenes(images[:7], claims[:7]) + check_scenes(images[7:], claims[7:]) == together
    assert check_scene(images[3], claims[3]) == together[3]


def test_scores_of_parts_add_up_to_those_of_the_whole(prompts: list[Scene]) -> None:
    others = mismatched_specs([scene.claim for scene in prompts])
    images = np.roll(pictures(prompts), 10, axis=0)
    whole = score_alignment(images, prompts, others)
    parts = [score_alignment(images[rank::3], prompts[rank::3], others[rank::3]) for rank in range(3)]
    counts = sum(part.counts() for part in parts)
    assert alignment_of(np.asarray(counts)) == whole
    assert whole.ceiling == score_scenes(pictures(prompts), [scene.claim for scene in prompts])


def test_scores_are_shares_by_kind_and_overall_the_mean_over_kinds() -> None:
    counts = np.zeros((6, 3), dtype=int)
    counts[KINDS.index("single")] = (100, 50, 40)
    counts[KINDS.index("position")] = (100, 20, 10)
    scores = scores_of(counts)
    assert scores.overall == pytest.approx((0.5 + 0.2) / 2)
    assert scores.exact == pytest.approx((0.4 + 0.1) / 2)
    # sqrt(0.5 * 0.5 / 100) = 0.05 and sqrt(0.2 * 0.8 / 100) = 0.04, independent of one another
    assert scores.standard_error == pytest.approx(np.sqrt(0.05**2 + 0.04**2) / 2)
    assert list(scores.summary()["kinds"]) == ["single", "position"]
    assert scores_of(scores.counts()) == scores
    assert np.isnan(scores_of(np.zeros((6, 3), dtype=int)).overall)


def test_a_kind_counts_as_much_as_another_however_many_pictures_it_has() -> None:
    counts = np.zeros((6, 3), dtype=int)
    counts[KINDS.index("two")] = (10, 5, 4)
    counts[KINDS.index("colour")] = (40, 8, 4)
    summary = scores_of(counts).summary()
    assert summary["overall"] == pytest.approx((0.5 + 0.2) / 2)
    assert summary["exact"] == pytest.approx((0.4 + 0.1) / 2)
    assert summary["standard_error"] == pytest.approx(np.sqrt(0.5 * 0.5 / 10 + 0.2 * 0.8 / 40) / 2)
    assert summary["kinds"]["colour"] == {
        "count": 40,
        "correct": 8,
        "exact": 4,
        "share": 0.2,
        "standard_error": pytest.approx(np.sqrt(0.2 * 0.8 / 40)),
    }


def test_verdicts_and_summaries_are_plain_data(prompts: list[Scene]) -> None:
    some = prompts[::25]
    alignment = score_alignment(pictures(some), some, mismatched_specs([scene.claim for scene in some]))
    assert json.loads(json.dumps(alignment.summary())) == alignment.summary()
    verdict = check_scene(some[0].image_HWC, some[0].claim)
    assert json.loads(json.dumps(asdict(verdict)))["found"][0]["digit"] == some[0].objects[0].digit


def test_chance_is_what_probability_says() -> None:
    """A picture of a red one left of a blue three shows "a one left of a three"; that one shows the other 1 in 36."""
    plain, coloured = (
        parse_caption("a one to the left of a three"),
        parse_caption("a red one to the left of a blue three"),
    )
    rng, names = np.random.default_rng(0), list(PALETTE)
    scenes = []
    for i in range(144):
        one, three = ("red", "blue") if i % 2 else (names[rng.integers(6)], names[rng.integers(6)])
        image_HWC = canvas((one, 1, 0, 0), (three, 3, 0, 8), glyph=int(rng.integers(20)))
        scenes.append(Scene(image_HWC=image_HWC, claim=coloured if i % 2 else plain, objects=()))
    alignment = score_alignment(pictures(scenes), scenes, mismatched_specs([scene.claim for scene in scenes]))
    assert alignment.model.overall > 0.95
    assert alignment.model == alignment.ceiling
    # The standard deviation of the part that varies is sqrt(72 / 36) / 144 = 0.01.
    assert alignment.chance.overall == pytest.approx((1 + 1 / 36) / 2, abs=0.03)


def test_pictures_of_other_captions_score_by_chance_alone(prompts: list[Scene]) -> None:
    others = mismatched_specs([scene.claim for scene in prompts])
    truth = sum(
        judge_scene(other, tuple(_as_found(scene))).is_correct for scene, other in zip(prompts, others, strict=True)
    ) / len(prompts)
    alignment = score_alignment(pictures(prompts), prompts, others)
    assert alignment.chance.overall == pytest.approx(truth, abs=0.02)


def _as_found(scene: Scene) -> list[FoundObject]:
    return [
        FoundObject(digit=o.digit, colour=o.colour, top=o.box[0].start, left=o.box[1].start, side=8 * o.scale)
        for o in scene.objects
    ]


def test_other_claims_are_of_the_same_kind_and_never_mean_the_same(prompts: list[Scene]) -> None:
    claims = [scene.claim for scene in prompts]
    for claim, other in zip(claims, mismatched_specs(claims), strict=True):
        assert other.kind == claim.kind
        assert other.meaning != claim.meaning
    said = [parse_caption(caption) for caption in ("a two", "a six and a two", "a two", "a two and a six", "a one")]
    assert [claim.caption for claim in mismatched_specs(said)][::2] == ["a one", "a one", "a two"]
    assert {claim.kind for claim in mismatched_specs(said)[1::2]} == {"two"}


def test_the_other_claim_is_the_next_of_the_kind_that_means_something_else() -> None:
    said = ["a one", "a one and a two", "a two", "a two", "a two and a one", "a seven", "a six and a two"]
    others = [claim.caption for claim in mismatched_specs([parse_caption(caption) for caption in said])]
    two_and = "a six and a two"
    assert others == ["a two", two_and, "a seven", "a seven", two_and, "a one", "a one and a two"]


def test_heldout_prompts_are_the_first_of_each_kind_and_distinct_where_that_can_be(prompts: list[Scene]) -> None:
    assert [scene.kind for scene in prompts] == [kind for kind in KINDS for _ in range(25)]
    assert all(is_held_out(scene.claim) for scene in prompts)
    fewer = heldout_prompts(seed=0, canvas_height=24, canvas_width=24, per_kind=5)
    by_kind: dict[str, list[SceneSpec]] = {
        kind: [scene.claim for scene in prompts if scene.kind == kind] for kind in KINDS
    }
    for kind in ("position", "attribution"):
        assert len({claim.caption for claim in by_kind[kind]}) == 25
        assert [scene.claim for scene in fewer if scene.kind == kind] == by_kind[kind][:5]
    repeats = {kind: max(Counter(claim.caption for claim in claims).values()) for kind, claims in by_kind.items()}
    for kind in KINDS:
        num_captions = sum(map(is_held_out, possible_claims(kind)))
        assert repeats[kind] <= max(1, -(-2 * 25 // num_captions)), kind
    assert len({scene.image_HWC.tobytes() for scene in prompts}) == len(prompts)


@pytest.mark.parametrize("shape", [(1, 8, 16, 3), (1, 16, 16, 4), (16, 16, 3)])
def test_pictures_of_another_form_are_refused(
    shape: tuple[int, ...], refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    assert str(shape) in refusal_of(lambda: find_objects(np.zeros(shape, dtype=np.uint8)))
    assert "float64" in refusal_of(lambda: find_objects(np.zeros((1, 16, 16, 3))))  # type: ignore[arg-type]
