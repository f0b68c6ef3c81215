"""Boxes of tensors: the arithmetic that lets any layout read what any other layout wrote.

A process holds flat ranges of its local tensors, and a local tensor is itself a box of a global one. Here a flat
range becomes boxes, boxes move from local to global coordinates, and a set of boxes is proven to tile a tensor.
Coordinates are row-major and in elements; `stop` and `end` are exclusive. No tensor is touched.
"""

import itertools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

from ecdit_ds.errors import CheckpointError

MAX_DIMENSIONS = 8
"""Most dimensions of a tensor in a checkpoint: `check_cover` costs 2**dimensions per box, and a damaged manifest may
ask for any number."""


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a tensor; `()` and `()` is the whole of a 0-dimensional one.

    Raises:
        ValueError: offset and shape differ in length, or hold a negative number.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.shape) or min(self.offset + self.shape, default=0) < 0:
            raise ValueError(f"offset {self.offset} and shape {self.shape} do not make a box")

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-dimensional box."""
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """One past the last coordinate, per axis."""
        return tuple(map(operator.add, self.offset, self.shape))

    def intersect(self, other: "Box") -> "Box | None":
        """Return the common part, or None where the boxes share no element."""
        offset = tuple(map(max, zip(self.offset, other.offset, strict=True)))
        end = tuple(map(min, zip(self.end, other.end, strict=True)))
        if any(stop <= start for start, stop in zip(offset, end, strict=True)):
            return None
        return Box(offset, tuple(stop - start for start, stop in zip(offset, end, strict=True)))

    def within(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the index of this box in a tensor whose first element lies at `origin`."""
        spans = zip(self.offset, self.end, origin, strict=True)
        return tuple(slice(start - zero, stop - zero) for start, stop, zero in spans)


def shifted(box: Box, by: tuple[int, ...]) -> Box:
    """Return `box` moved by `by`, such as from local to global coordinates."""
    return Box(tuple(start + step for start, step in zip(box.offset, by, strict=True)), box.shape)


def flat_range_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[Box, int]]:
    """Cut elements `[start, stop)` of a flattened row-major tensor into boxes of that tensor.

    Args:
        shape: of the tensor, N dimensions.
        start: first element of the range.
        stop: one past the last; equal to `start` for an empty range, which has no boxes.

    Returns:
        At most max(1, 2N-1) pairs `(box, position)` in the order of the data. The boxes are disjoint and cover the
        range exactly; the `box.numel` elements from `position` on in the range are the box, row-major, so the box is
        a contiguous view of the fragment.

    Raises:
        ValueError: the range does not lie within the tensor.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"range [{start}, {stop}) does not lie in a tensor of shape {shape}")
    boxes = _range_boxes(shape, start, stop)
    positions = itertools.accumulate((box.numel for box in boxes), initial=0)
    return list(zip(boxes, positions, strict=False))


def _range_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    row_numel = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row_numel), stop // row_numel
    if first_whole > end_whole:  # starts and stops inside one row
        return _row_boxes(shape, end_whole, start - end_whole * row_numel, stop - end_whole * row_numel)
    head = _row_boxes(shape, first_whole - 1, row_numel - (first_whole * row_numel - start), row_numel)
    body = Box((first_whole,) + (0,) * (len(shape) - 1), (end_whole - first_whole, *shape[1:]))
    tail = _row_boxes(shape, end_whole, 0, stop - end_whole * row_numel)
    return head + ([body] if body.numel else []) + tail


def _row_boxes(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    boxes = _range_boxes(shape[1:], start, stop)
    return [Box((row, *box.offset), (1, *box.shape)) for box in boxes]


def check_cover(shape: tuple[int, ...], boxes: Iterable[Box]) -> None:
    """Prove that the boxes tile a tensor: every element in exactly one of them.

    The number of boxes over an element is a sum of step functions, and a step function is fixed by the signs at the
    corners of its box. So the boxes tile the tensor if and only if all corners but the tensor's own cancel, and the
    first corner that does not is the first element covered too often or not at all. O(n * 2**N) for n boxes; where
    they follow each other along an axis, as most do, a walk along it proves the same in O(n).

    Raises:
        CheckpointError: naming that element, or a box that reaches outside the tensor.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"has {len(shape)} dimensions; a checkpoint holds tensors of at most {MAX_DIMENSIONS}")
    whole, boxes = Box((0,) * len(shape), shape), list(boxes)
    if _follow_each_other(shape, boxes):
        return
    signs = [math.prod(ends) for ends in itertools.product((1, -1), repeat=len(shape))]
    corners: dict[tuple[int, ...], int] = {}
    for corner, sign in zip(itertools.product(*zip(whole.offset, whole.end, strict=True)), signs, strict=True):
        corners[corner] = corners.get(corner, 0) - sign
    for box in boxes:
        end = box.end
        if len(end) != len(shape) or any(map(operator.gt, end, shape)):
            raise CheckpointError(
                f"slice at {list(box.offset)} of shape {list(box.shape)} reaches outside the tensor's {list(shape)}"
            )
        for corner, sign in zip(itertools.product(*zip(box.offset, end, strict=True)), signs, strict=True):
            corners[corner] = corners.get(corner, 0) + sign
    left_over = [corner for corner, sign in corners.items() if sign]
    if left_over:
        element = min(left_over)
        times = 1 + corners[element]
        fault = f"is in {times} slices" if times else "is in no slice"
        raise CheckpointError(f"element {list(element)} of shape {list(shape)} {fault}; each must be in exactly one")


def _follow_each_other(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """Return whether boxes tile a tensor in their order along one axis; if not, they may tile it otherwise."""
    first = boxes[0].shape if boxes else ()
    cut = [axis for axis, size in enumerate(shape) if len(first) == len(shape) and first[axis] != size]
    if len(cut) != 1:
        return False
    (axis,), position = cut, 0
    before, after = shape[:axis], shape[axis + 1 :]
    zeros_before, zeros_after = (0,) * len(before), (0,) * len(after)
    for box in boxes:
        if box.offset != (*zeros_before, position, *zeros_after):
            return False
        size = box.shape[axis]
        if box.shape != (*before, size, *after):
            return False
        position += size
    return position == shape[axis]
