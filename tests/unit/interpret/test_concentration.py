"""Measures of concentration and of objects' share against closed forms and cases counted by hand."""

import numpy as np
import pytest

from ecdit_ds.data.digit_scenes.scenes import Scene, SceneObject, SceneSpec, draw_scene
from ecdit_ds.interpret.concentration import (
    gini,
    ink_mask,
    normalised_entropy,
    object_mask_of_scene,
    object_share,
    top_share,
    untaken_share,
)

EVEN = [3] * 10
ONE_GETS_ALL = [0] * 9 + [20]
HALF_GET_ALL = [0] * 5 + [4] * 5


@pytest.mark.parametrize(
    ("counts", "expected"),
    [(EVEN, 0.0), (ONE_GETS_ALL, 1 - 1 / 10), (HALF_GET_ALL, 0.5), ([1, 3], 0.25), ([0] * 10, 0.0), ([7], 0.0)],
)
def test_gini_is_what_closed_forms_say(counts: list[int], expected: float) -> None:
    assert float(gini(counts)) == pytest.approx(expected, abs=1e-12)
    assert float(gini(counts[::-1])) == pytest.approx(expected, abs=1e-12)


def test_gini_is_half_the_mean_difference_of_two_patches_over_the_mean() -> None:
    counts = np.random.default_rng(0).integers(0, 9, size=37)
    mean_difference = np.abs(counts[:, None] - counts[None, :]).mean()
    assert float(gini(counts)) == pytest.approx(mean_difference / (2 * counts.mean()))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (EVEN, 1.0),
        (ONE_GETS_ALL, 0.0),
        (HALF_GET_ALL, np.log(5) / np.log(10)),
        ([0] * 10, 1.0),
        ([7], 1.0),
        ([1, 3], (0.25 * np.log(4) + 0.75 * np.log(4 / 3)) / np.log(2)),
    ],
)
def test_entropy_is_what_closed_forms_say(counts: list[int], expected: float) -> None:
    assert float(normalised_entropy(counts)) == pytest.approx(expected, abs=1e-12)


def test_measures_are_taken_for_every_leading_place() -> None:
    counts = np.array([[EVEN, ONE_GETS_ALL], [HALF_GET_ALL, [0] * 10]])
    assert gini(counts) == pytest.approx(np.array([[0, 0.9], [0.5, 0]]))
    assert normalised_entropy(counts)[0] == pytest.approx([1, 0])
    assert untaken_share(counts) == pytest.approx(np.array([[0, 0.9], [0.5, 1]]))
    assert top_share(counts, 40) == pytest.approx(np.array([[3 / 40, 0.5], [0.1, 0]]))


def test_objects_share_is_counted_by_hand() -> None:
    share = object_share([[4, 2, 1, 2], [0, 0, 3, 5]], np.array([True, True, False, False]))
    assert share.on_object == pytest.approx([3, 0])
    assert share.on_background == pytest.approx([1.5, 4])
    assert share.ratio == pytest.approx([2, 0])
    # Ranks of the counts 4, 2.5, 1, 2.5, of the mask 3.5, 3.5, 1.5, 1.5: covariance 3 over the root of 4.5 x 4.
    assert share.rank_correlation[0] == pytest.approx(3 / np.sqrt(18))


def test_rank_correlation_is_that_of_mean_places_in_sorted_order() -> None:
    rng = np.random.default_rng(1)
    counts, mask = rng.integers(0, 4, size=(6, 25)), rng.random(25) < 0.4
    found = object_share(counts, mask).rank_correlation
    expected = [np.corrcoef(mean_places(row.tolist()), mean_places(mask.tolist()))[0, 1] for row in counts]
    assert found == pytest.approx(expected)


def mean_places(values: list[int]) -> list[float]:
    """Return, for each value, the mean of the places that its equals have in sorted order."""
    order = sorted(values)
    return [float(np.mean([place for place, other in enumerate(order) if other == value])) for value in values]


def test_what_has_no_value_is_nan_and_not_a_number_that_could_be_believed() -> None:
    mask = np.array([True, True, False, False])
    assert np.isnan(object_share([2, 1, 0, 0], mask).ratio)
    assert np.isnan(object_share([2, 2, 2, 2], mask).rank_correlation)
    everywhere = object_share([2, 1, 0, 0], np.ones(4, dtype=bool))
    assert everywhere.on_object == 0.75
    assert np.isnan([everywhere.on_background, everywhere.ratio, everywhere.rank_correlation]).all()


def scene_with(cells: list[tuple[int, int]], scale: int = 1, side: int = 16) -> Scene:
    """Return a black scene with objects in those cells."""
    objects = tuple(
        SceneObject(digit=1, colour="red", row=row, column=column, scale=scale, glyph=0) for row, column in cells
    )
    claim = SceneSpec(kind="single", digits=(1,), colours=(None,))
    return Scene(image_HWC=np.zeros((side, side, 3), np.uint8), claim=claim, objects=objects)


def test_an_objects_patches_are_those_of_its_cell() -> None:
    mask = object_mask_of_scene(scene_with([(0, 1)]), patch_pixels=4)
    assert mask.tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2
    assert object_mask_of_scene(scene_with([(0, 0)], scale=2), patch_pixels=4).all()
    assert object_mask_of_scene(scene_with([(0, 0), (1, 1)]), patch_pixels=8).tolist() == [[True, False], [False, True]]


def test_a_patch_is_an_objects_when_half_of_it_is() -> None:
    # Of patches of 16 pixels, one cell of 8 pixels fills a quarter, two fill half.
    assert object_mask_of_scene(scene_with([(0, 0)], side=32), patch_pixels=16).sum() == 0
    halved = object_mask_of_scene(scene_with([(0, 0), (0, 1)], side=32), patch_pixels=16)
    assert halved.tolist() == [[True, False], [False, False]]


def test_ink_is_a_bright_pixel_in_any_colour() -> None:
    image = np.zeros((8, 12, 3), np.uint8)
    image[3, 4] = (0, 0, 65)
    image[7, 11] = (64, 64, 64)
    assert ink_mask(image, 4).tolist() == [[False, True, False], [False, False, False]]
    assert ink_mask(image, 4, threshold=63).tolist() == [[False, True, False], [False, False, True]]


def test_ink_of_a_scene_lies_in_its_objects_cells_and_in_most_of_their_patches() -> None:
    scenes = [draw_scene(seed=0, split="heldout", index=i, canvas_height=32, canvas_width=32) for i in range(20)]
    cells, ink = (
        [mask(scene) for scene in scenes]
        for mask in (lambda s: object_mask_of_scene(s, 4), lambda s: ink_mask(s.image_HWC, 4))
    )
    assert not any((i & ~c).any() for c, i in zip(cells, ink, strict=True))
    assert np.sum(ink) > 0.7 * np.sum(cells)
