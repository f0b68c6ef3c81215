"""Digit scenes: captions are true, images show what they say, and the splits have nothing in common."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import xxhash
from sklearn.datasets import load_digits

from ecdit_ds.data.digit_scenes.scenes import KINDS, PALETTE, Scene, Split, digit_images, draw_scene

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPLITS: tuple[Split, ...] = get_args(Split)


def draw_scenes(split: Split, count: int, *, height: int = 16, width: int = 16, seed: int = 0) -> list[Scene]:
    """Draw the first scenes of a split."""
    return [draw_scene(seed=seed, split=split, index=i, canvas_height=height, canvas_width=width) for i in range(count)]


def parse(caption: str) -> tuple[list[tuple[str | None, int]], str | None]:
    """Read a caption, knowing English only: (colour or None, digit) of each thing in order, and the relation."""
    parts = re.split(r" (and|to the left of|to the right of|above|below) ", caption)
    things: list[tuple[str | None, int]] = []
    for part in parts[::2]:
        determiner, *colours, noun = part.split()
        count = 1 if determiner in ("a", "an") else NUMBERS.index(determiner)
        singular = noun if count == 1 else re.sub("(?<=six)es$|s$", "", noun)
        things += [(colours[0] if colours else None, NUMBERS.index(singular))] * count
    return things, parts[1] if len(parts) > 1 else None


def relations_of(scene: Scene) -> set[str]:
    """Return every relation of a scene's first object to its second that its cells bear out."""
    first, second = scene.objects
    if first.row == second.row:
        return {"to the left of" if first.column < second.column else "to the right of"}
    if first.column == second.column:
        return {"above" if first.row < second.row else "below"}
    return set()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24), (48, 32)])
def test_captions_say_exactly_what_the_objects_are(split: Split, height: int, width: int) -> None:
    for scene in draw_scenes(split, 400, height=height, width=width):
        things, relation = parse(scene.caption)
        assert [digit for _, digit in things] == [thing.digit for thing in scene.objects], scene.caption
        for (colour, _), thing in zip(things, scene.objects, strict=True):
            assert colour in (None, thing.colour), scene.caption
        if scene.kind == "position":
            assert relations_of(scene) == {relation}, scene.caption


@pytest.mark.parametrize("split", SPLITS)
def test_each_kind_has_the_captions_of_its_name(split: Split) -> None:
    for scene in draw_scenes(split, 600):
        things, relation = parse(scene.caption)
        digits, colours = {digit for _, digit in things}, [colour for colour, _ in things if colour]
        expected = {
            "single": (1, 1, 0),
            "colour": (1, 1, 1),
            "two": (2, 2, 0),
            "attribution": (2, 2, 2),
            "position": (2, 2, len(colours)),
            "counting": (len(things), 1, len(colours)),
        }[scene.kind]
        assert (len(things), len(digits), len(colours)) == expected, scene.caption
        if scene.kind == "counting":
            assert 2 <= len(things) <= 4
            assert len(colours) in (0, len(things))
        if scene.kind == "attribution":
            assert len(set(colours)) == 2, scene.caption
        assert (relation not in (None, "and")) == (scene.kind == "position"), scene.caption


def test_every_eight_that_stands_alone_is_an_eight() -> None:
    captions = " | ".join(scene.caption for split in SPLITS for scene in draw_scenes(split, 600))
    assert "an eight" in captions
    assert re.search(r"\ba eight\b|\ban (?!eight\b)|sixs\b", captions) is None


@pytest.mark.parametrize("split", SPLITS)
def test_all_six_kinds_come_and_position_four_times_as_often_as_any_other(split: Split) -> None:
    counts = Counter(scene.kind for scene in draw_scenes(split, 1800))
    assert set(counts) == set(KINDS)
    assert 700 < counts.pop("position") < 900  # 800 expected; the standard deviation is 21
    assert min(counts.values()) > 150  # of 200 expected; the standard deviation is 13
    assert max(counts.values()) < 250


def test_train_and_held_out_scenes_share_no_caption() -> None:
    """A caption that only swaps two things, or turns a relation around, counts as the same caption."""

    def contents(split: Split) -> set[tuple[object, ...]]:
        said: set[tuple[object, ...]] = set()
        for scene in draw_scenes(split, 3000):
            things, relation = parse(scene.caption)
            if relation in ("to the right of", "below"):
                things.reverse()
                relation = {"to the right of": "to the left of", "below": "above"}[relation]
            said.add((relation, *(sorted(things, key=str) if relation in (None, "and") else things)))
        return said

    assert not contents("train") & contents("heldout")


def test_train_and_held_out_scenes_share_no_digit_image() -> None:
    used = {split: {thing.glyph for scene in draw_scenes(split, 1500) for thing in scene.objects} for split in SPLITS}
    assert not used["train"] & used["heldout"]
    for split in SPLITS:
        assert used[split] <= set(digit_images(split).glyph_N.tolist())


def test_every_digit_image_belongs_to_one_split_and_a_fifth_is_held_out() -> None:
    train, held_out = digit_images("train"), digit_images("heldout")
    assert sorted([*train.glyph_N, *held_out.glyph_N]) == list(range(1797))
    assert 0.17 < len(held_out.glyph_N) / 1797 < 0.23
    assert set(held_out.digit_N.tolist()) == set(range(10))


def test_every_digit_is_met_in_training_though_its_lone_caption_may_be_held_out() -> None:
    held_out_alone = {scene.objects[0].digit for scene in draw_scenes("heldout", 300) if scene.kind == "single"}
    trained_alone = {scene.objects[0].digit for scene in draw_scenes("train", 1200) if scene.kind == "single"}
    trained = {thing.digit for scene in draw_scenes("train", 1200) for thing in scene.objects}
    assert held_out_alone
    assert trained_alone == set(range(10)) - held_out_alone
    assert trained == set(range(10))


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    in_order = draw_scenes("train", 20)
    for i in (13, 2, 13):
        again = draw_scene(seed=0, split="train", index=i, canvas_height=16, canvas_width=16)
        assert (again.caption, again.objects) == (in_order[i].caption, in_order[i].objects)
        assert np.array_equal(again.image_HWC, in_order[i].image_HWC)
    for others in (draw_scenes("train", 20, seed=1), draw_scenes("heldout", 20)):
        assert sum(a.objects == b.objects for a, b in zip(in_order, others, strict=True)) == 0


def test_native_scenes_show_exactly_the_digits_and_colours_of_their_objects() -> None:
    uci = load_digits()
    for scene in draw_scenes("train", 200):
        expected_HWC = np.zeros((16, 16, 3))
        for thing in scene.objects:
            assert uci.target[thing.glyph] == thing.digit
            ink_HW = uci.images[thing.glyph] / 16
            top, left = 8 * thing.row, 8 * thing.column
            expected_HWC[top : top + 8, left : left + 8] += ink_HW[:, :, None] * PALETTE[thing.colour]
        assert scene.image_HWC.dtype == np.uint8
        assert np.abs(scene.image_HWC - expected_HWC).max() <= 0.5


def test_larger_scenes_show_each_object_in_its_box_and_nothing_elsewhere() -> None:
    palette, names = np.array(list(PALETTE.values()), dtype=float), list(PALETTE)
    scales = set()
    for scene in draw_scenes("train", 200, height=48, width=56):
        rest_HWC = scene.image_HWC.copy()
        for thing in scene.objects:
            scales.add(thing.scale)
            pixels_NC = rest_HWC[thing.box].reshape(-1, 3).astype(float)
            assert len(pixels_NC) == (8 * thing.scale) ** 2, "the box leaves the canvas"
            brightest = pixels_NC[pixels_NC.sum(axis=1).argmax()]
            assert names[np.square(palette - brightest).sum(axis=1).argmin()] == thing.colour
            rest_HWC[thing.box] = 0
        assert not rest_HWC.any()
    assert scales == {1, 2, 3}


def test_objects_of_one_scene_never_share_a_cell() -> None:
    for scene in draw_scenes("train", 500):
        assert len({(thing.row, thing.column) for thing in scene.objects}) == len(scene.objects)


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 15)])
def test_a_canvas_too_small_for_four_digits_is_refused(
    height: int, width: int, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    message = refusal_of(lambda: draw_scenes("train", 1, height=height, width=width))
    assert f"{height} x {width}" in message
    assert "model.latent_height" in message


def test_objects_of_a_scene_know_their_pixels() -> None:
    thing = draw_scenes("train", 1)[0].objects[0]
    assert replace(thing, row=1, column=2, scale=3).box == (slice(24, 48), slice(48, 72))


def test_scenes_are_still_those_that_were_cached_under_this_schema_version() -> None:
    """If scenes change on purpose: raise SCHEMA_VERSION in data/folder.py and put the new checksum here."""
    checksum = xxhash.xxh3_64()
    for split in SPLITS:
        for scene in draw_scenes(split, 100, height=32, width=32):
            checksum.update(scene.caption.encode() + scene.image_HWC.tobytes())
    assert checksum.hexdigest() == "0bc38ab6c5291b85"
