"""Boxes against numpy: flat ranges become exact tilings, and a set that is no tiling is refused with the place."""

import itertools
import math

import numpy as np
import pytest

from ecdit_ds.checkpoint.boxes import Box, check_cover, flat_range_boxes, shifted
from ecdit_ds.errors import CheckpointError
from ecdit_ds.seeding import sample_rng

SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (4, 1, 3), (1, 1, 1), (2, 1, 3, 2), (2, 2, 2, 2, 2)]
TILING = [Box((0, 0), (2, 3)), Box((0, 3), (2, 1)), Box((2, 0), (1, 4))]


def ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(itertools.combinations_with_replacement(range(math.prod(shape) + 1), 2))


@pytest.mark.parametrize("shape", [*SHAPES, (0,), (3, 0, 2)])
def test_every_flat_range_is_rebuilt_from_its_boxes(shape: tuple[int, ...]) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start, stop in ranges(shape):
        fragment, rebuilt = numbers.reshape(-1)[start:stop], np.full(shape, -1)
        for box, position in flat_range_boxes(shape, start, stop):
            index = box.within((0,) * len(shape))
            assert (rebuilt[index] == -1).all(), "boxes overlap"
            rebuilt[index] = fragment[position : position + box.numel].reshape(box.shape)
        expected = np.where((numbers >= start) & (numbers < stop), numbers, -1)
        assert np.array_equal(rebuilt, expected), (start, stop)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_flat_range_of_n_dimensions_needs_at_most_2n_minus_1_boxes(shape: tuple[int, ...]) -> None:
    counts = [len(flat_range_boxes(shape, start, stop)) for start, stop in ranges(shape)]
    assert max(counts) <= max(1, 2 * len(shape) - 1)


def test_the_bound_on_boxes_is_reached() -> None:
    assert len(flat_range_boxes((4, 4, 4), 1, 63)) == 5


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_a_range_outside_the_tensor_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="does not lie in a tensor"):
        flat_range_boxes((3, 4), start, stop)


@pytest.mark.parametrize("number", range(50))
def test_intersection_is_the_set_of_common_elements(number: int) -> None:
    rng = sample_rng(0, number, "intersection")
    one, other = (Box(tuple(map(int, rng.integers(0, 4, 3))), tuple(map(int, rng.integers(0, 5, 3)))) for _ in range(2))
    masks = np.zeros((2, 9, 9, 9), dtype=bool)
    for mask, box in zip(masks, (one, other), strict=True):
        mask[box.within((0, 0, 0))] = True
    common, expected = one.intersect(other), masks[0] & masks[1]
    found = np.zeros_like(expected)
    if common is not None:
        found[common.within((0, 0, 0))] = True
        assert common.numel > 0
    assert np.array_equal(found, expected)


def test_shifting_moves_the_offset_and_keeps_the_shape() -> None:
    assert shifted(Box((1, 2), (3, 4)), (10, 20)) == Box((11, 22), (3, 4))


@pytest.mark.parametrize(("offset", "shape"), [((0,), (1, 1)), ((-1,), (2,)), ((0,), (-2,))])
def test_what_is_no_box_is_refused(offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not make a box"):
        Box(offset, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_cuts", [0, 1, 4])
def test_boxes_of_a_cut_fragment_list_cover_the_tensor(shape: tuple[int, ...], num_cuts: int) -> None:
    numel = math.prod(shape)
    cuts = sorted(map(int, sample_rng(0, num_cuts, f"cuts {shape}").integers(0, numel + 1, num_cuts)))
    spans = itertools.pairwise([0, *cuts, numel])
    check_cover(shape, [box for start, stop in spans for box, _ in flat_range_boxes(shape, start, stop)])


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_tensor_is_covered_with_and_without_a_slice(shape: tuple[int, ...]) -> None:
    check_cover(shape, [])
    check_cover(shape, [Box((0,) * len(shape), shape)])


@pytest.mark.parametrize("missing", range(3))
def test_a_gap_is_found_and_its_first_element_named(missing: int) -> None:
    first = str(list(TILING[missing].offset)).replace("[", r"\[")
    with pytest.raises(CheckpointError, match=f"element {first} .* in no slice"):
        check_cover((3, 4), [box for i, box in enumerate(TILING) if i != missing])


@pytest.mark.parametrize("twice", range(3))
def test_an_overlap_is_found_and_its_first_element_named(twice: int) -> None:
    first = str(list(TILING[twice].offset)).replace("[", r"\[")
    with pytest.raises(CheckpointError, match=f"element {first} .* in 2 slices"):
        check_cover((3, 4), [*TILING, TILING[twice]])


def test_an_overlap_that_hides_a_gap_of_equal_size_is_found() -> None:
    with pytest.raises(CheckpointError, match=r"in 2 slices|in no slice"):
        check_cover((2, 2), [Box((0, 0), (2, 1)), Box((0, 0), (2, 1))])


@pytest.mark.parametrize("boxes", [[], [Box((), ())] * 2])
def test_a_scalar_needs_exactly_one_slice(boxes: list[Box]) -> None:
    with pytest.raises(CheckpointError, match="exactly one"):
        check_cover((), boxes)


@pytest.mark.parametrize("box", [Box((2, 0), (2, 4)), Box((0,), (3,))])
def test_a_slice_that_reaches_outside_is_named(box: Box) -> None:
    with pytest.raises(CheckpointError, match="reaches outside"):
        check_cover((3, 4), [box])


def test_a_tensor_of_absurdly_many_dimensions_is_refused_at_once() -> None:
    with pytest.raises(CheckpointError, match="64 dimensions"):
        check_cover((1,) * 64, [])


ROWS = [Box((0, start, 0), (2, size, 5)) for start, size in ((0, 3), (3, 1), (4, 2))]


def test_slices_along_one_axis_are_proven_without_their_corners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("itertools.product")
    check_cover((2, 6, 5), ROWS)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_slices_along_one_axis_tile_in_any_order(order: tuple[int, ...]) -> None:
    check_cover((2, 6, 5), [ROWS[i] for i in order])


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        (ROWS[:2], r"element \[0, 4, 0\] .* in no slice"),
        (ROWS[1:], r"element \[0, 0, 0\] .* in no slice"),
        ([*ROWS, ROWS[2]], r"element \[0, 4, 0\] .* in 2 slices"),
        ([ROWS[0], Box((0, 2, 0), (2, 2, 5)), ROWS[2]], r"element \[0, 2, 0\] .* in 2 slices"),
        ([*ROWS[:2], Box((0, 4, 0), (2, 2, 4))], r"element \[0, 4, 4\] .* in no slice"),
        ([*ROWS[:2], Box((0, 4, 0), (1, 2, 5))], r"element \[1, 4, 0\] .* in no slice"),
        ([*ROWS[:2], Box((0, 4, 0), (2, 3, 5))], "reaches outside"),
        ([*ROWS[:2], Box((1, 4, 0), (2, 2, 5))], "reaches outside"),
        ([*ROWS[:2], Box((0, 4), (2, 2))], "reaches outside"),
    ],
)
def test_slices_along_one_axis_that_do_not_tile_are_found(boxes: list[Box], fault: str) -> None:
    with pytest.raises(CheckpointError, match=fault):
        check_cover((2, 6, 5), boxes)
